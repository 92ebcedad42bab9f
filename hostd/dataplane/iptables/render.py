# Owns: the same as text, for people and `compile`: what `ipset restore`, `iptables-legacy-restore --noflush` and
# `ip6tables-legacy-restore --noflush` take, one after the other, where there is nothing of ours. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from slash32.net import Prefix, format_address, host_prefix

from ...compiler.ruleset import HOST_GUESTS, Guard, SetSpec
from ..nft.render import Content
from . import about, classes
from .ipset import TYPES, Member, halves
from .lines import Line, jump
from .names import BEHIND, SOURCE, is_outward, kernel_set
from .restore import Edit, text_of
from .rules import constants, lines
from .skeleton import FILLED, FROM, POLICY_TABLES, SECURITY, TABLES, TO, part
from .steps import ACCEPT_LEADS

_FAMILY = {4: "inet", 6: "inet6"}


def render(guard: Guard, content: Content, taps: Mapping[int, str]) -> str:
    """`taps`: names by interface index."""
    parts = ["# ipset restore", *_sets(content, taps)]
    for version, command in ((4, "iptables-legacy-restore"), (6, "ip6tables-legacy-restore")):
        parts += [f"# {command} --noflush", text_of(_edits(guard, content, version, taps)).rstrip()]
    return "\n".join(parts) + "\n"


def _sets(content: Content, taps: Mapping[int, str]) -> Iterator[str]:
    for names in (SOURCE, BEHIND):
        for version, name in names.items():
            yield f"create {name} hash:net,iface family {_FAMILY[version]} maxelem 65536 comment"
    for admission in content.admissions:
        tap = taps[admission.ifindex]
        note = f'comment "{admission.ifindex} {admission.mac.hex(":")}"'
        for address in admission.addresses:
            yield f"add {SOURCE[4 if len(address) == 4 else 6]} {host_prefix(address)},{tap} {note}"
        for prefix in admission.prefixes:
            yield f"add {BEHIND[prefix.version]} {prefix},{tap} {note}"
    for name, spec in content.sets.items():
        yield from _set(kernel_set(name), spec, content.members.get(name, ()))
    own = {n: (v, nets) for rs in content.chains.values() for r in rs for v in (4, 6) for n, nets in constants(r, v)}
    for name, (version, nets) in sorted(own.items()):
        yield f"create {name} hash:net family {_FAMILY[version]} maxelem {len(nets) + 1}"
        yield from (f"add {name} {net}" for net in nets)


def _set(name: str, spec: SetSpec, members: Iterable[Member]) -> Iterator[str]:
    kind, version = TYPES[spec.kind]
    yield f"create {name} {kind} family {_FAMILY[version]} maxelem {spec.size + (kind == 'hash:net')}"
    for member in sorted(members):
        parts = map(str, halves(member)) if isinstance(member, Prefix) else [format_address(member)]
        yield from (f"add {name} {part}" for part in parts)


def _edits(guard: Guard, content: Content, version: int, taps: Mapping[int, str]) -> dict[str, Edit]:
    edits = {table: Edit() for table in TABLES}
    for table, edit in edits.items():
        wanted = part(guard, table, version)
        for chain in FILLED[table]:
            if chain not in content.chains:
                edit.chain(chain, ())
        for chain, body in wanted.chains.items():
            edit.chain(chain, body)
        for hook, chain in wanted.hooks.items():
            edit.raw(Line((), jump(chain)).text(f"{hook} 1", verb="-I"))
    for table in POLICY_TABLES:
        for name, rules in content.chains.items():
            accept = "" if name == HOST_GUESTS else ACCEPT_LEADS.get((table, is_outward(name)), "")
            edits[table].policy(name, (lines(rule, version) for rule in rules), None, accept)
        for root, side in ((FROM, 0), (TO, 1)):
            if root == FROM or table == SECURITY:
                for chain, body in classes.tree(root, guard.group_base, _side(content, side)).items():
                    edits[table].chain(chain, body)
    behind = [(taps[a.ifindex], prefix) for a in content.admissions for prefix in a.prefixes]
    for name, act in about.BEHIND_CHAINS.items():
        edits[SECURITY].chain(name, about.of_behind(behind, version, act))
    return edits


def _side(content: Content, side: int) -> dict[int, str]:
    return {group: chains[side] for group, chains in content.classes.items()}
