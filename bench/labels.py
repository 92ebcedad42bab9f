# Measures: one guest's label changes, at the dispatcher (claim checked and taken, hosts' frames made), with 1,000,
# 10,000 and 100,000 endpoints and 1,000 selectors in policies; and one new selector. Beside it the scan: every selector
# is asked about the labels, before and after; every distinct set of labels is asked by the new selector. Bars: less
# than 2 ms with all endpoints (`limit`), and no more with all than 1.5 times what it is with the fewest.
#   python -m bench.labels [--json] [-n N] [--present 1000,10000,100000] [--selectors 1000]
from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace

from bench.measure import Case, Report, measure
from dispatcher.hosts.fanout import Fanout
from dispatcher.registry.registry import Registry
from slash32 import selector as selectors
from slash32.model import Endpoint, EndpointKey, Host
from slash32.policy import Action, Direction, Peer, Policy, Rule
from slash32.sync import Replica

HOSTS = 100
LIMIT = 0.002  # seconds
APPS, ZONES = 500, 40
SLOW = 20  # rounds per run of what takes long


def guest(number: int, labels: dict[str, str]) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{number:012x}", f"52:54:00:{number >> 16:02x}:00:01")
    return Endpoint(key, f"vm{number}", labels, addresses=((0x0A000000 + number).to_bytes(4, "big"),))


def labels_of(number: int) -> dict[str, str]:
    """Some are everybody's, some a group's, one its own: all the sets of labels differ."""
    app, zone = f"a{number % APPS}", f"z{number * 7 % ZONES}"
    return {"env": "prod", "app": app, "zone": zone, "name": f"vm{number}"}


def selector(number: int) -> str:
    """Of the forms that operators write; one of ten has nothing that labels must have."""
    app, zone = f"a{number % APPS}", f"z{number % ZONES}"
    forms = (
        f'app in {{"{app}"}} && name != "v{number}"',
        f'env == "prod" && app in {{"{app}", "w{number}"}}',
        f'app in {{"{app}", "x{number}"}}',
        f'has(app) && zone != "y{number}" && app == "{app}"',
        f'(app == "{app}" || name == "vm{number}") && env != "test"',
        f'app == "{app}" && !(zone == "{zone}" || has(x{number}))',
        f'name starts with "vm{number}" && app == "{app}"',
        f'env == "prod" && (app == "{app}" && zone in {{"{zone}"}})',
        f'app == "{app}" && env == "prod" && name != "vm{number}"',
        f'env != "prod" && zone != "{zone}" && name != "x{number}"',
    )
    return str(selectors.parse(forms[number % len(forms)]))


class Fleet:
    """A registry and the fan-out that follows it, with hosts that acknowledge at once."""

    def __init__(self, present: int, count: int) -> None:
        self.registry, self.fanout, self.revision = Registry(), Fanout(), 1
        self.names = [f"h{n}" for n in range(HOSTS)]
        for name in self.names:
            self.registry.put_host(Host(name))
            self.fanout.add_host(name)
        self.texts = sorted({selector(n) for n in range(count)})
        assert len(self.texts) == count
        for n in range(0, len(self.texts) - 1, 2):  # each policy applies by one and names the other
            rule = Rule(Action.ALLOW, source=Peer(selector=self.texts[n + 1]))
            self.registry.put_policy(Policy(f"p{n}", self.texts[n], (Direction.INGRESS,), None, (rule,)))
        for number in range(present):
            self.registry.claim(self.names[number % HOSTS], guest(number, labels_of(number)))
        self.fanout.publish(1, self.registry.take())
        for name in self.names:
            self.fanout.open(name, Replica().hello(), "bench", 1, False)
        self.acknowledge()
        self.chance = random.Random(1)
        self.parsed = [selectors.parse(text) for text in self.texts]
        self.sets = [labels_of(number) for number in range(present)]
        self.pick()

    def pick(self) -> None:
        number = self.chance.randrange(len(self.sets))
        self.was = self.sets[number]
        self.sets[number] = {**self.was, "app": f"a{self.chance.randrange(APPS)}"}
        self.changed = replace(guest(number, self.sets[number]))
        self.host = self.names[number % HOSTS]

    def acknowledge(self) -> None:
        for publisher in self.fanout.publishers.values():
            publisher.ack(self.revision)

    def relabel(self) -> None:
        """What the core does with a claim, but for the disk."""
        assert self.registry.refusal(self.host, self.changed) is None
        self.registry.claim(self.host, self.changed)
        self.publish()

    def publish(self) -> None:
        self.revision += 1
        self.fanout.publish(self.revision, self.registry.take())

    def after(self) -> None:
        self.acknowledge()
        self.pick()

    def scan(self) -> None:
        new = self.changed.labels
        _ = [one for one in self.parsed if one.matches(self.was) is not one.matches(new)]

    def add_selector(self) -> None:
        """A policy for one application of one zone."""
        chosen = 'env == "prod" && app == "a7" && zone == "z9"'
        self.registry.put_policy(Policy("new", str(selectors.parse(chosen)), (Direction.INGRESS,)))
        self.publish()

    def remove_selector(self) -> None:
        self.registry.delete_policy("new")
        self.publish()
        self.acknowledge()

    def scan_labels(self) -> None:
        chosen = selectors.parse('env == "prod" && app == "a7" && zone == "z9"')
        _ = [labels for labels in self.sets if chosen.matches(labels)]


def cases(present: int, count: int) -> dict[str, Case]:
    fleet = Fleet(present, count)
    return {
        f"label, {present} present": Case(fleet.relabel, None, fleet.after),
        f"label, {present} present, scan": Case(fleet.scan, None, None, SLOW),
        f"selector, {present} present": Case(fleet.add_selector, None, fleet.remove_selector),
        f"selector, {present} present, scan": Case(fleet.scan_labels, None, None, SLOW),
    }


def run(n: int, present: list[int], count: int, json: bool) -> bool:
    found = {name: case for number in present for name, case in cases(number, count).items()}
    measured = measure(found, n)
    medians = {name: stats.median for name, stats in measured.items()}
    few, many = (f"label, {number} present" for number in (min(present), max(present)))
    bars = {f"{many} / limit": 1.0, f"{many} / {few}": 1.5}
    ratios = {f"{many} / limit": medians[many] / LIMIT, f"{many} / {few}": medians[many] / medians[few]}
    for number in present:
        for what in ("label", "selector"):
            name = f"{what}, {number} present"
            ratios[f"{name}, scan / {name}"] = medians[f"{name}, scan"] / medians[name]
    return Report(f"labels ({count} selectors, {HOSTS} hosts)", measured, ratios, bars).tell(json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.labels")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--present", default="1000,10000,100000", help="numbers of endpoints")
    parser.add_argument("--selectors", type=int, default=1_000)
    given = parser.parse_args()
    return 0 if run(given.n, [int(word) for word in given.present.split(",")], given.selectors, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
