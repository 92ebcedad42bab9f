# Classes as chains, in tables written by hand: what each asks in which order, where it goes on, and what is shared.
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from hostd.compiler.calc import Calculation
from hostd.compiler.chains import targets
from hostd.compiler.desired import Desired, StagedPoint
from hostd.compiler.names import height, log_tag, parts_of, policy_of
from hostd.compiler.ruleset import HOST_CHAINS, HOST_FORWARD_IN, HOST_IN, Goto, Interface, Jump, Log, Rule, Verdict
from hostd.compiler.world import World
from hostd.state import Carrier, Local, Locals, Phase
from slash32.model import Endpoint
from slash32.net import parse_address
from slash32.policy import Action, Direction, HostEndpoint, Policy, Profile, Tier
from slash32.policy import Rule as PolicyRule
from tests.scenes import HERE, key

IN = Direction.INGRESS
ALLOW, DENY, LOG, PASS = map(PolicyRule, (Action.ALLOW, Action.DENY, Action.LOG, Action.PASS))
TCP_PASS = PolicyRule(Action.PASS, 6)
EARLY, LATE = Tier("early", 1.0), Tier("late", 2.0)


def policy(name: str, *rules: PolicyRule, **more: object) -> Policy:
    return Policy(name, "all()", (IN,), ingress=rules, **more)  # type: ignore[arg-type]


def staged(name: str, *rules: PolicyRule, **more: object) -> Policy:
    return policy(name, *rules, staged=True, **more)


def guest(number: int, profiles: tuple[str, ...] = ()) -> Local:
    endpoint = Endpoint(key(number), f"guest{number}", {}, profiles, (parse_address(f"10.65.0.{number + 1}"),))
    return Local(endpoint, "qemu", Phase.LIVE, Carrier(f"vnet{number}", 100 + number), endpoint)


def desired(
    policies: Iterable[Policy], *guests: Local, tiers: Iterable[Tier] = (EARLY, LATE),
    hosts: Iterable[HostEndpoint] = (),
) -> Desired:  # fmt: skip
    given = list(policies)
    world = World(
        {p.name: p for p in given if not p.staged}, {"p": Profile("p", (ALLOW,))}, tiers={t.name: t for t in tiers},
        staged={p.name: p for p in given if p.staged}, host_endpoints={e.name: e for e in hosts},
    )  # fmt: skip
    here = guests or (guest(0, ("p",)),)
    return Calculation.build(HERE, world, Locals({g.endpoint.key: g for g in here})).desired


def shown(found: Desired, chain: str) -> list[object]:
    """A chain as a list; one that it goes to, and one made for it that it jumps to, within it; so parts."""

    def one(rule: Rule) -> object:
        counted = "+" if rule.counted else ""
        match rule.verdict:
            case Goto(there):
                return f"{counted}goto", shown(found, there)
            case Jump(there):
                return shown(found, there) if height(there) or policy_of(there) != there else there
            case Verdict():
                return counted + rule.verdict.value
            case Log(tag):
                return "log", tag

    return [one(rule) for rule in found.chains[chain]]


def asked(*policies: Policy, **more: object) -> list[object]:
    found = desired(policies, **more)  # type: ignore[arg-type]
    return shown(found, found.taps[100].chains.ingress)


DROP, ACCEPT, RETURN = "drop", "accept", "return"
END = ["fi-p", DROP]
LATER = staged("s", DENY)
TABLE: dict[str, tuple[tuple[Policy, ...], list[object]]] = {
    "no policy: profiles": ((), END),
    "one tier": ((policy("a", ALLOW), policy("b", ALLOW)), ["pi-a", "pi-b", DROP]),
    "a tier that denies is the end": ((policy("a", tier="early"), policy("b")), ["pi-a", DROP]),
    "on to the next tier": (
        (policy("a", LOG, TCP_PASS, tier="early"), policy("b")),
        [[[("log", log_tag("policy", "a", IN, 0))], RETURN, DROP], "pi-b", DROP],
    ),
    "from the last tier to the profiles": ((policy("a", TCP_PASS),), [[RETURN, DROP], *END]),
    "two policies leave one tier": (
        (policy("a", TCP_PASS, tier="early"), policy("b", DENY, TCP_PASS, ALLOW, tier="early"),
         policy("x", tier="early"), policy("c", tier="late")),
        [[RETURN, [DROP], RETURN, [ACCEPT], "pi-x", DROP], "pi-c", DROP],
    ),
    "who lets all else pass needs no chain to get out of": (
        (policy("a", DENY, TCP_PASS, PASS, tier="early"), policy("b", tier="early"), policy("c"), policy("d", PASS)),
        ["pi-a", "pi-c", "pi-d", *END],
    ),
    "but where something stands between": (
        (policy("a", TCP_PASS, LOG, PASS, ALLOW, tier="early"), policy("b", tier="early")),
        [[RETURN, [("log", log_tag("policy", "a", IN, 1))], RETURN], *END],
    ),
    "and where others choose": (
        (policy("a", TCP_PASS, tier="early"), policy("b", DENY, PASS, tier="early"), policy("c", tier="early")),
        [[RETURN, "pi-b"], *END],
    ),
    "who is not asked does not choose": (
        (policy("a", PASS, tier="early"), policy("b", TCP_PASS, tier="early")), ["pi-a", *END],
    ),
    "a staged policy never decides": (
        (staged("a", DENY, ALLOW, LOG, PASS, order=1.0), policy("b", order=2.0)),
        [[("+goto", ["pi-b", DROP]), ("goto", ["pi-b", DROP]), ("goto", ["pi-b", DROP])], "pi-b", DROP],
    ),
    "what comes after it is not asked for it": (
        (policy("b", order=1.0), staged("a", DENY, order=2.0)), ["pi-b", [("+goto", [DROP])], DROP],
    ),
    "one in a tier that is left": (
        (staged("s", DENY, order=1.0, tier="early"), policy("a", TCP_PASS, order=2.0, tier="early"), policy("b")),
        [[[("+goto", [[RETURN, DROP], "pi-b", DROP])], RETURN, DROP], "pi-b", DROP],
    ),
    "the end of a tier of which only staged policies apply counts": (
        (staged("a", tier="early"), staged("x"), policy("b")), [[], ("+goto", ["pi-b", DROP])],
    ),
    "a staged one in a later tier": (
        (policy("a", TCP_PASS, tier="early"), staged("s", DENY, tier="late")),
        [[RETURN, DROP], [("+goto", END)], ("+goto", END)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_walks(case: str) -> None:
    policies, expected = TABLE[case]
    assert asked(*policies) == expected


def test_a_tier_that_passes_by_default_is_no_end() -> None:
    tiers = Tier("early", 1.0, Action.PASS), Tier("late", 2.0, Action.PASS)
    assert asked(policy("a", tier="early"), policy("b", tier="late"), tiers=tiers) == ["pi-a", "pi-b", *END]
    assert asked(staged("a", DENY, tier="early"), tiers=tiers) == [[("+goto", END)], *END]


def test_what_cannot_be_reached_makes_no_class_of_its_own() -> None:
    found = desired([policy("a", ALLOW)], guest(0), guest(1, ("p",)))
    assert found.taps[100].chains.ingress == found.taps[101].chains.ingress, "no profile is asked where policies are"
    assert found.taps[100].chains.egress != found.taps[101].chains.egress, "the control"
    passing = desired([policy("a", PASS)], guest(0), guest(1, ("p",)))
    assert passing.taps[100].chains.ingress != passing.taps[101].chains.ingress


def test_a_policy_that_changes_does_not_change_the_class() -> None:
    one, other = (desired([policy("a", *rules)], guest(0)).taps[100].chains for rules in ((ALLOW,), (PASS, DENY)))
    assert one == other


def test_tiers_are_shared_between_classes() -> None:
    marked = guest(1)
    marked = replace(marked, accepted=replace(marked.endpoint, labels={"x": ""}))
    some = Policy("b", "has(x)", (IN,), ingress=(ALLOW,), tier="late")
    found = desired([policy("a", TCP_PASS, tier="early"), some, policy("c")], guest(0), marked)
    assert found.taps[100].chains.ingress != found.taps[101].chains.ingress
    assert len([name for name in found.chains if name.startswith("tier-")]) == 1


def test_tails_are_shared_between_classes() -> None:
    marked = guest(1)
    marked = replace(marked, accepted=replace(marked.endpoint, labels={"x": ""}))
    some = Policy("b", "has(x)", (IN,), 1.0, ingress=(ALLOW,), tier="early")
    late = staged("s", DENY, order=2.0, tier="early")
    found = desired([policy("a", order=0.0, tier="early"), some, late, policy("c")], guest(0), marked)
    assert found.taps[100].chains.ingress != found.taps[101].chains.ingress
    assert len([name for name in found.chains if name.startswith("tail-")]) == 1


def test_parts_are_shared_and_the_names_of_others_when_the_policy_is_another() -> None:
    def parts(*rules: PolicyRule) -> set[str]:
        found = desired([policy("a", *rules, tier="early"), policy("b", order=1.0, tier="early"), policy("c")])
        return {name for name in found.chains if policy_of(name) == parts_of("a", IN)}

    one, other = parts(DENY, TCP_PASS, ALLOW), parts(DENY, TCP_PASS, DENY)
    assert len(one) == len(other) == 2 and not one & other
    assert one == parts(DENY, TCP_PASS, ALLOW)


def test_counters_and_logs_have_words() -> None:
    found = desired([staged("a", ALLOW, DENY, tier="early"), policy("b", LOG)])
    points = {(p.policy, p.tier, p.rule): at for at, p in found.staged.items()}
    assert points.keys() == {("a", "early", 1), ("", "early", None)}
    for chain, position in points.values():
        assert found.chains[chain][position].counted
    assert StagedPoint("a", "early", IN, 1) in found.staged.values()
    (tag,) = found.logs
    assert found.logs[tag][:3] == ("policy", "b", "default") and found.logs[tag].rule == 0


def deep(number: int) -> Desired:
    """So many tiers, each with a staged policy and three that choose what they pass."""
    each = [
        replace(p, name=f"{p.name}{n}", tier=f"t{n}")
        for n in range(number)
        for p in (policy("a", TCP_PASS), staged("s", DENY, order=1.0), policy("b", DENY, TCP_PASS, ALLOW, order=2.0))
    ]
    anywhere = HostEndpoint("any", HERE, "*", profiles=("p",))
    return desired(each, tiers=[Tier(f"t{n}", float(n)) for n in range(number)], hosts=[anywhere])


def test_every_chain_stands_above_those_that_it_uses() -> None:
    used = 0
    for name, rules in (found := deep(6)).chains.items():
        for target in targets(rules):
            used += 1
            assert height(target) < height(name)
    assert used > 50 and {height(name) for name in found.chains} > {0, 1, 2, 3, 4}


def test_tiers_do_not_nest() -> None:
    def depth(found: Desired, chain: str) -> int:
        return 1 + max((depth(found, target) for target in targets(found.chains.get(chain, ()))), default=0)

    few, many = ({name: depth(found, name) for name in HOST_CHAINS} for found in (deep(2), deep(24)))
    assert few == many and max(many.values()) == 7


# -- host endpoints -------------------------------------------------------------------------------------------------

ETH0, ANY = HostEndpoint("z", HERE, "eth0", {"up": ""}), HostEndpoint("a", HERE, "*")


def test_host_chains_are_always_there_and_mostly_empty() -> None:
    found = desired([policy("a")])
    assert {name: found.chains[name] for name in HOST_CHAINS} == dict.fromkeys(HOST_CHAINS, ())


def test_named_interfaces_go_before_all() -> None:
    found = desired([policy("f", ALLOW)], hosts=[ANY, ETH0])
    rules = found.chains[HOST_IN]
    assert [r.matches for r in rules] == [(Interface(True, "eth0"),), ()]
    assert all(isinstance(r.verdict, Jump) for r in rules)
    assert found.chains[HOST_FORWARD_IN] == (), "no policy is for what is forwarded"


def test_who_is_not_asked_is_not_asked_as_all_either() -> None:
    only_all = Policy("f", "!has(up)", (IN,), ingress=(PASS,), apply_on_forward=True)
    named, anywhere = desired([only_all], hosts=[ANY, ETH0]).chains[HOST_FORWARD_IN]
    assert named[:2] == ((Interface(True, "eth0"),), Verdict.ACCEPT) and anywhere.matches == ()
    turned = replace(only_all, selector="has(up)")
    found = desired([turned], hosts=[ANY, ETH0])
    (rule,) = found.chains[HOST_FORWARD_IN]
    assert rule.matches == (Interface(True, "eth0"),)
    assert isinstance(rule.verdict, Jump)
    assert shown(found, rule.verdict.chain) == ["pi-f", ACCEPT]
