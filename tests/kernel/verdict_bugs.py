# Owns: bugs that a compiler, a dispatcher or a packet filter may have, as patches of the product, and changes that are
# none. Each names what is replaced, and by what.
from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

import hostd.compiler.calc
import hostd.compiler.chains
import hostd.compiler.compile
import hostd.compiler.host_chains
import hostd.compiler.sets
import hostd.dataplane.iptables.classes
import hostd.dataplane.iptables.rules
from dispatcher.registry.registry import Registry
from hostd.compiler.desired import ClassChains
from hostd.compiler.host_chains import in_order
from hostd.compiler.ruleset import Family, IcmpIs, InNets, InSet, Ports, Protocol, Rule, SetKind, Side, Verdict
from slash32 import verdict
from slash32.net import Prefix
from slash32.pack import AddressSet
from slash32.policy import Action, NetworkSet, Policy, PortRange

Bug = tuple[str, Any]  # what, by its dotted name; instead of it
Compiled = Iterator[Rule]
_compile, _rules = hostd.compiler.compile.compile_rule, hostd.compiler.compile.compile_rules
_walk = hostd.compiler.calc.walk_of
COMPILE, RULES = "hostd.compiler.compile.compile_rule", "hostd.compiler.chains.compile_rules"
STEPS, WALK = "hostd.compiler.calc.steps", "hostd.compiler.calc.walk_of"
_NETS = (SetKind.NET4, SetKind.NET6)


@contextlib.contextmanager
def patched(bug: Bug) -> Iterator[None]:
    """What is made of rules is made anew before and afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*bug)
        hostd.dataplane.iptables.rules.lines.cache_clear()
        yield
    hostd.dataplane.iptables.rules.lines.cache_clear()


def altered(change: Callable[[Any], Any]) -> Callable[..., Compiled]:
    """The compiler, with each of its matches changed; None takes it away."""

    def compile_rule(*args: Any) -> Compiled:
        for rule in _compile(*args):
            yield rule._replace(matches=tuple(m for m in map(change, rule.matches) if m is not None))

    return compile_rule


def on(kind: type, change: Callable[..., Any]) -> Callable[..., Compiled]:
    return altered(lambda m: change(m) if isinstance(m, kind) else m)


def positive(match: Any) -> Any:
    return match._replace(negate=False)


def forgotten(match: Any) -> Any:
    return None if match.negate else match


def cut(first: int, last: int) -> Callable[[Ports], Ports]:
    def change(match: Ports) -> Ports:
        ranges = (PortRange(min(r.first + first, r.last), max(r.first, r.last - last)) for r in match.ranges)
        return match._replace(ranges=tuple(ranges))

    return change


def swapped(match: Any) -> Any:
    if not isinstance(match, Ports | InNets | InSet):
        return match
    return match._replace(side=Side.DST if match.side is Side.SRC else Side.SRC)


def only(keep: Callable[[Rule], bool]) -> Callable[..., Compiled]:
    return lambda *args: (r for r in _compile(*args) if keep(r))


def become(what: Callable[[Rule], bool], verdict_: Any) -> Callable[..., Any]:
    """Rules of a policy say something else."""
    return lambda *a: tuple(
        e._replace(rule=e.rule._replace(verdict=verdict_)) if what(e.rule) else e for e in _rules(*a)
    )


def tiers(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **named: change(verdict.steps(*args, **named))


def default(action: Action) -> Callable[..., Any]:
    return tiers(lambda found: [(replace(tier, default_action=action), policies) for tier, policies in found])


def _backwards_by_name(policy: Policy) -> Any:
    return policy.sort_key()[:2], [-ord(c) for c in policy.name]


def ties(found: Any) -> Any:
    return [(tier, sorted(policies, key=_backwards_by_name)) for tier, policies in found]


def enforced(found: Any) -> Any:
    return [(tier, [replace(p, staged=False) for p in policies]) for tier, policies in found]


def without_forward(found: Any, way: Any, profiles: Any) -> Any:
    """What is forwarded is not asked."""
    return _walk(found, way, profiles) if profiles is not None else _walk([], way, None)


def is_pass(rule: Rule) -> bool:
    return (not isinstance(rule.verdict, Verdict) and type(rule.verdict).__name__ == "Goto") or (
        isinstance(rule.verdict, Verdict) and rule.verdict.value == "return"
    )


def is_log(rule: Rule) -> bool:
    return type(rule.verdict).__name__ == "Log"


def only_present(selection: Any, group: Any) -> None:
    """In the dispatcher: `!=` and `not in` do not hold where the label is missing."""
    words = str(selection.selector)
    if ("!=" in words or "not in" in words) and words.split(maxsplit=1)[0].lstrip("(") not in group.labels:
        return
    if selection.selector.matches(group.labels):
        selection.classes.add(group)
        group.selections.add(selection)


def crossed(egress: str, ingress: str) -> ClassChains:
    return ClassChains(ingress, egress)


_members_of, _changed = hostd.compiler.sets.members_of, hostd.compiler.sets.Sets.changed
_put_set = Registry.put_network_set
_local_changed = hostd.compiler.calc.Calculation.local_changed


def no_prefixes(value: AddressSet, kind: SetKind) -> Any:
    return () if kind in _NETS else _members_of(value, kind)


def stale(self: Any, name: str, add: Any, remove: Any, dirty: Any) -> bool:
    """Who left a set stays in the kernel's."""
    return _changed(self, name, add, (), dirty)


def deaf(self: Any, name: str, add: Any, remove: Any, dirty: Any) -> bool:
    """Who joins a set is not let in."""
    return _changed(self, name, (), remove, dirty)


def stale_class(self: Any, key: Any) -> Any:
    """Who is tagged anew keeps the class it had."""
    before = self._memo_of.get(key)
    dirty = _local_changed(self, key)
    if before is not None and key in self._memo_of and before in self._classes:
        tap = self.desired.taps[self._tap_of[key]]
        self._place_tap(key, tap._replace(chains=self._classes[before]), dirty)
    return dirty


def without_prefixes(self: Registry, found: NetworkSet) -> None:
    nets = [net for net in found.nets if net.length == 8 * len(net.network)]
    _put_set(self, replace(found, nets=tuple(nets)))


def without_addresses(self: Registry, found: NetworkSet) -> None:
    nets = [net for net in found.nets if net.length < 8 * len(net.network)]
    _put_set(self, replace(found, nets=tuple(nets)))


_hosts = hostd.compiler.host_chains.host_chains


def one_way(standing: Sequence[Any]) -> Any:
    """Forwarded packets are asked by every policy that selects the host endpoint."""
    return _hosts([s._replace(forward=(s.local.egress, s.local.ingress)) for s in standing])


BUGS: dict[str, Bug] = {
    "notProtocol is protocol": (COMPILE, on(Protocol, positive)),
    "notProtocol is forgotten": (COMPILE, on(Protocol, forgotten)),
    "notPorts is ports": (COMPILE, on(Ports, positive)),
    "the first port of a range is left out": (COMPILE, on(Ports, cut(1, 0))),
    "the last port of a range is left out": (COMPILE, on(Ports, cut(0, 1))),
    "notNets is nets": (COMPILE, on(InNets, positive)),
    "notNets is forgotten": (COMPILE, on(InNets, forgotten)),
    "notSelector is selector": (COMPILE, on(InSet, positive)),
    "notSelector is forgotten": (COMPILE, on(InSet, forgotten)),
    "source is destination": (COMPILE, altered(swapped)),
    "IPv6 is forgotten": (COMPILE, only(lambda r: Family(6) not in r.matches)),
    "what is behind a guest is forgotten": (
        COMPILE, only(lambda r: not any(isinstance(m, InSet) and m.kind in _NETS for m in r.matches)),
    ),
    "sets of prefixes are empty": ("hostd.compiler.sets.members_of", no_prefixes),
    "the code of ICMP is forgotten": (COMPILE, on(IcmpIs, lambda m: m._replace(icmp=m.icmp._replace(code=None)))),
    "notICMP is icmp": (COMPILE, on(IcmpIs, positive)),
    "notICMP is forgotten": (COMPILE, on(IcmpIs, forgotten)),
    "only the first alternative": (COMPILE, lambda *args: itertools.islice(_compile(*args), 1)),
    "policies run backwards": (STEPS, tiers(lambda found: [(tier, policies[::-1]) for tier, policies in found])),
    "of equal orders the last name goes first": (STEPS, tiers(ties)),
    "tiers run backwards": (STEPS, tiers(lambda found: found[::-1])),
    "only the first tier is asked": (STEPS, tiers(lambda found: found[:1])),
    "every tier passes": (STEPS, default(Action.PASS)),
    "every tier denies": (STEPS, default(Action.DENY)),
    "egress is ingress": ("hostd.compiler.calc.ClassChains", crossed),
    "Pass allows": (RULES, become(is_pass, Verdict.ACCEPT)),
    "Pass denies": (RULES, become(is_pass, Verdict.DROP)),
    "Pass is ignored": (RULES, become(is_pass, Verdict.CONTINUE)),
    "Log allows": (RULES, become(is_log, Verdict.ACCEPT)),
    "Log denies": (RULES, become(is_log, Verdict.DROP)),
    "profiles are asked although a policy applies": (
        STEPS, tiers(lambda found: [(replace(t, default_action=Action.PASS), p) for t, p in found]),
    ),
    "profiles are forgotten": (WALK, lambda found, way, profiles: _walk(found, way, profiles and ())),
    "profiles run backwards": (WALK, lambda found, way, profiles: _walk(found, way, profiles and profiles[::-1])),
    "staged policies are enforced": (STEPS, tiers(enforced)),
    "what is forwarded is asked by all policies": ("hostd.compiler.calc.host_chains", one_way),
    "what is forwarded is not asked": (WALK, without_forward),
    "the one for all interfaces goes first": ("hostd.compiler.calc.in_order", lambda found: in_order(found)[::-1]),
    "who leaves a set stays in the kernel's": ("hostd.compiler.sets.Sets.changed", stale),
    "who joins a set does not in the kernel": ("hostd.compiler.sets.Sets.changed", deaf),
    "who is tagged anew keeps its class": ("hostd.compiler.calc.Calculation.local_changed", stale_class),
    "!= does not hold where the label is missing": ("dispatcher.registry.selections._meet", only_present),
    "network sets have no prefixes": ("dispatcher.registry.registry.Registry.put_network_set", without_prefixes),
    "network sets have nothing but prefixes": (
        "dispatcher.registry.registry.Registry.put_network_set", without_addresses,
    ),
}  # fmt: skip


# -- of the iptables backend alone -------------------------------------------------------------------------------------

_ports, _tree = hostd.dataplane.iptables.rules._ports, hostd.dataplane.iptables.classes.tree
_PORTS = "hostd.dataplane.iptables.rules._ports"


def first_piece(*args: Any) -> Any:
    return _ports(*args)[:1]


def any_piece(source: bool, ranges: Any, negate: bool) -> Any:
    """Of several pieces of a negation one is enough."""
    found = _ports(source, ranges, False)
    return [("-m", "multiport", "!", *words[2:]) for words in found] if negate else found


def no_zero(prefix: Prefix) -> tuple[Prefix, ...]:
    return (prefix,) if prefix.length else ()


def half_of_zero(prefix: Prefix) -> tuple[Prefix, ...]:
    return (prefix,) if prefix.length else (Prefix(prefix.network, 1),)


def one_leaf(root: str, base: int, chains: Any) -> Any:
    """Of classes that share the last digit one is found."""
    last = {number & 0xF: number for number in chains}
    return _tree(root, base, {number: chains[number] for number in last.values()})


IPTABLES_BUGS: dict[str, Bug] = {
    "! is lost": ("hostd.dataplane.iptables.lines.negated", lambda negate: ()),
    "of too many ports only the first 15": (_PORTS, first_piece),
    "of too many negated ports each 15 are enough": (_PORTS, any_piece),
    "0.0.0.0/0 is no member": ("hostd.dataplane.iptables.ipset.halves", no_zero),
    "of 0.0.0.0/0 half": ("hostd.dataplane.iptables.ipset.halves", half_of_zero),
    "classes whose numbers end alike are one": ("hostd.dataplane.iptables.steps.classes.tree", one_leaf),
}

SKELETON_BUGS: dict[str, Bug] = {  # of what stands before any world is loaded
    "no port is always open to the host": ("hostd.dataplane.nft.host._failsafe", lambda *_: []),
    "forwarded packets are not asked on the way in": ("hostd.dataplane.nft.skeleton._forward_in", lambda _: []),
}

# -- no bugs -----------------------------------------------------------------------------------------------------------


def reordered(*args: Any) -> Compiled:
    for rule in _compile(*args):
        family = [m for m in rule.matches if isinstance(m, Family)]
        yield rule._replace(matches=(*family, *[m for m in rule.matches if not isinstance(m, Family)][::-1]))


def twice(*args: Any) -> Compiled:
    for rule in _compile(*args):
        yield from (rule, rule._replace(comment=f"{rule.comment} again"))


NO_BUGS: dict[str, Bug] = {
    "matches in another order": (COMPILE, reordered),
    "every rule twice": (COMPILE, twice),
    "other digests": ("hostd.compiler.compile.capacity", lambda count: 4096),
}
