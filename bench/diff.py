# Measures: what a change of one policy of 100 does to 10,000 endpoints in 50 classes of labels, found by classes
# (`slash32.compare`), beside the specification asked pair by pair. The bar: all pairs and all traffic cost no more than
# the specification takes for one packet of each ten thousandth pair.
#   python -m bench.diff [--json] [-n N] [--endpoints 10000] [--policies 100]
from __future__ import annotations

import argparse
import random
import sys

from bench.measure import Case, Report, measure
from slash32.compare import Comparison, compare
from slash32.matching import Packet, World
from slash32.model import Endpoint, EndpointKey
from slash32.net import Prefix
from slash32.policy import Action, Direction, NetworkSet, Peer, Policy, PortRange, Profile, Rule, Tier
from slash32.verdict import Judge

CLASSES, SEED = 50, 32
SHARE = 10_000  # the specification is asked for one in so many pairs


def world(endpoints: int, policies: int) -> World:
    chance = random.Random(SEED)
    return World(
        [_endpoint(number) for number in range(endpoints)],
        [_policy(chance, number) for number in range(policies)],
        [Profile("default", egress=(Rule(Action.ALLOW),))],
        [Tier("guard", 10.0, Action.PASS)],
        [NetworkSet("offices", {"zone": "office"}, tuple(Prefix(bytes([198, 18, n, 0]), 24) for n in range(50)))],
    )


def _endpoint(number: int) -> Endpoint:
    labels = {"app": f"a{number % CLASSES}", "env": "prod" if number % 2 else "test", "name": f"vm{number}"}
    low = (number + 1).to_bytes(3, "big")
    addresses = (b"\x0a" + low, b"\xfd" + bytes(12) + low)
    key = EndpointKey(f"00000000-0000-4000-8000-{number:012x}", f"52:54:00:{low.hex(':')}")
    return Endpoint(key, f"vm{number}", labels, ("default",), addresses)


def _policy(chance: random.Random, number: int) -> Policy:
    """Who may speak to one application; every tenth one guards all."""
    port = 1024 + 7 * number
    source = Peer(selector=f'app == "a{chance.randrange(CLASSES)}" && env == "prod"')
    allow = Rule(Action.ALLOW, 6, source=source, destination=Peer(ports=(PortRange(port, port + 2),)))
    nets = Peer(nets=(Prefix(bytes([203, number % 256, 0, 0]), 16),))
    if number % 10 == 0:
        rules = (Rule(Action.DENY, source=nets), Rule(Action.PASS, source=Peer(selector='zone == "office"')))
        return Policy(f"p{number}", "all()", (Direction.INGRESS,), float(number), rules, tier="guard")
    more = Rule(Action.ALLOW, 17, source=nets, destination=Peer(ports=(PortRange(port, port),)))
    return Policy(f"p{number}", f'app == "a{number % CLASSES}"', (Direction.INGRESS,), float(number), (allow, more))


def changed(before: World) -> World:
    """One policy that selects everybody opens a port to some, and closes what one in the middle had opened."""
    opened = Rule(Action.ALLOW, 6, source=Peer(selector='env == "test"'), destination=Peer(ports=(PortRange(22, 22),)))
    policies = [*before.policies[:-1], Policy("new", "all()", (Direction.INGRESS,), 1.0, (opened,))]
    return World(before.endpoints, policies, before.profiles, before.tiers, before.sets)


def asked(given: World, packets: list[Packet]) -> int:
    judge = Judge(given)
    return sum(judge.verdict(packet).allowed for packet in packets)


def run(n: int, endpoints: int, policies: int, json: bool) -> bool:
    before = world(endpoints, policies)
    after = changed(before)
    chance = random.Random(SEED)
    addresses = [endpoint.addresses[0] for endpoint in before.endpoints]
    pairs = max(1, endpoints * (endpoints - 1) // SHARE)
    chosen = [chance.sample(addresses, 2) for _ in range(pairs)]
    packets = [Packet(source, target, 6, 40000, 22) for source, target in chosen]
    found: list[Comparison] = [compare(before, after)]
    assert found[0].changes, "nothing is measured where nothing changes"
    measured = measure(
        {
            "diff, all pairs": lambda: compare(before, after),
            "verdicts, a sample": Case(lambda: asked(before, packets) + asked(after, packets), every=5),
        },
        n,
    )
    ratio = "diff, all pairs / verdicts, a sample"
    ratios = {
        ratio: measured["diff, all pairs"].median / measured["verdicts, a sample"].median,
        "rows": float(len(found[0].changes)),
        "pairs with another verdict": float(found[0].gaining + found[0].losing),
    }
    name = f"diff ({endpoints} endpoints, {policies} policies; sample of {pairs} pairs)"
    return Report(name, measured, ratios, {ratio: 1.0}).tell(json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.diff")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=10)
    parser.add_argument("--endpoints", type=int, default=10_000)
    parser.add_argument("--policies", type=int, default=100)
    given = parser.parse_args()
    return 0 if run(given.n, given.endpoints, given.policies, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
