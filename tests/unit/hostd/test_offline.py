# What `slash32-hostd compile` prints from the last state on disk: readable as nft and ip commands, the same each time.
# tests/kernel/test_offline_loads.py has nft and a kernel read it.
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from hostd.config import Config
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.offline import compiled
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import parse_address, parse_prefix
from slash32.pack import MASK, AddressSet, Kind, ObjectKey, Value, digest_of
from slash32.policy import Action, Direction, Icmp, Peer, Policy, PortRange, Profile, Rule
from slash32.wire import Put, Snapshot

GOLDEN = Path(__file__).parents[2] / "golden" / "compile-three-guests.nft"
WEB, APP = 'role == "web"', 'role == "app"'


def policies() -> list[Policy]:
    http = Peer(ports=(PortRange(80, 80), PortRange(8000, 8099)))
    web = Rule(Action.ALLOW, 6, destination=http)
    ping = Rule(Action.ALLOW, 1, icmp=Icmp(8))
    db = Rule(Action.ALLOW, 6, source=Peer(selector=WEB), destination=Peer(ports=(PortRange(5432, 5432),)))
    bad = Rule(Action.DENY, source=Peer(not_nets=(parse_prefix("10.65.0.0/16"),), not_selector=WEB))
    return [
        Policy("web.front", WEB, (Direction.INGRESS,), 10, (web, ping)),
        Policy("db", 'role == "db"', (Direction.INGRESS,), 20, (bad, db)),
        Policy("out", "all()", (Direction.EGRESS,), None, egress=(Rule(Action.ALLOW),)),
    ]


def guest(number: int, role: str, **more: object) -> Endpoint:
    mac = f"52:54:00:00:00:{number:02x}"
    addresses = parse_address(f"10.65.0.{number}"), parse_address(f"fd00:65::{number:x}")
    key = EndpointKey(f"00000000-0000-0000-0000-{number:012}", mac)
    plain = Endpoint(key, f"{role}1", {"role": role}, (), addresses)
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


GUESTS = [
    guest(2, "web", shared=(SharedAddress(parse_address("10.65.9.1"), "vip"),)),
    guest(3, "db", prefixes=(parse_prefix("10.66.0.0/26"), parse_prefix("fd00:66::/64"))),
    guest(4, "app", profiles=("default",)),
]


def content() -> dict[ObjectKey, Value]:
    members = AddressSet({*GUESTS[0].all_addresses(), parse_address("10.65.7.7")}, {parse_prefix("10.67.0.0/24")})
    far = parse_prefix("10.65.7.7"), parse_prefix("fd00:65::77")
    return {
        **{ObjectKey(Kind.POLICY, p.name): p for p in policies()},
        ObjectKey(Kind.PROFILE, "default"): Profile("default", (Rule(Action.ALLOW, 58),), ()),
        ObjectKey(Kind.SET, WEB): members,
        ObjectKey(Kind.HOST, "h2"): (parse_address("192.0.2.2"), parse_address("2001:db8::2")),
        **{ObjectKey(Kind.ROUTE, prefix): ("h2",) for prefix in far},
    }


def remembered(folder: Path) -> Config:
    """The state of a host that runs three guests, the last of which is isolated."""
    memory = Memory(Journal(folder / "hostd.state"), "boot")
    values = content()
    digest = sum(digest_of(*at, value) for at, value in values.items()) & MASK
    memory.replica.receive(Snapshot("e", 7, digest, False, tuple(Put(*at, value) for at, value in values.items())))
    for index, endpoint in enumerate(GUESTS, 11):
        granted = endpoint if endpoint.labels["role"] != "app" else None
        memory.locals.put(Local(endpoint, "qemu", Phase.LIVE, Carrier(f"vnet{index - 11}", index), granted))
    memory.changed({e.key for e in GUESTS})
    memory.close()
    (folder / "forwarding-before").write_text('{"v4": true, "v6": true}')
    return Config(host="h1", state_dir=folder, run_dir=folder)


def test_the_golden(tmp_path: Path) -> None:
    """SLASH32_GOLDEN=write makes it anew: then read what changed."""
    text = compiled(remembered(tmp_path))
    if os.environ.get("SLASH32_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_asking_writes_nothing(tmp_path: Path) -> None:
    config = remembered(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert compiled(config) == compiled(config)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_host_that_remembers_nothing_has_the_guard_alone(tmp_path: Path) -> None:
    text = compiled(Config(host="h1", state_dir=tmp_path, run_dir=tmp_path))
    assert 'iifname "vnet*" drop' in text and "pi-" not in text
    assert [line for line in text.splitlines() if line.startswith("# ip")] == [
        "# ip route replace 169.254.1.1/32 dev lo proto 132"
    ]
    assert list(tmp_path.iterdir()) == [], "asking leaves no trace"


def test_what_is_isolated_is_not_in_it(tmp_path: Path) -> None:
    text = compiled(remembered(tmp_path))
    assert "10.65.0.2" in text and "10.65.0.3" in text, "the control"
    assert "10.65.0.4" not in text and "vnet2" not in text
