# Messages: what goes in comes out; anything else is refused in one line, whatever the bytes.
from __future__ import annotations

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slash32 import pack, wire
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, digest_of, digest_of_members
from slash32.policy import (
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
    Tier,
)
from slash32.wire import (
    Ack,
    Answer,
    Ask,
    Claim,
    Claimed,
    Delete,
    Delta,
    Expect,
    Failure,
    Hello,
    Members,
    Ping,
    Pong,
    Put,
    Refusal,
    Refused,
    Release,
    Report,
    Snapshot,
    WireError,
)  # fmt: skip

KEY = EndpointKey("6a0cbe25-34f5-4d4e-8f4e-1f4d3d7a0001", "52:54:00:00:00:02")
FULL = Endpoint(
    KEY, "web1", {"role": "web", "env": "prod"}, ("default",), (parse_address("10.65.0.2"), parse_address("fd00::2")),
    (SharedAddress(parse_address("10.65.9.1"), "vip"),), (parse_prefix("10.66.0.0/26"), parse_prefix("fd01::/64")),
)  # fmt: skip
RULE = Rule(
    Action.ALLOW, 1, None, 4, Icmp(8, 0), Icmp(3),
    Peer((parse_prefix("10.0.0.0/8"),), (parse_prefix("10.1.0.0/16"),), 'role == "web"', None, (PortRange(80, 90),)),
    Peer(not_selector="all()", not_ports=(PortRange(1, 1),)),
)  # fmt: skip
POLICY = Policy("p", 'role == "db"', (Direction.INGRESS, Direction.EGRESS), 10.0, (RULE,), (Rule(Action.DENY),))
STEPS = (Rule(Action.LOG), Rule(Action.PASS, not_protocol=6))
TIERED = Policy("r", "all()", (Direction.EGRESS,), None, (), STEPS, "app.1", True, True)
STAGED = Policy("p", "has(a)", (Direction.INGRESS,), -2.5, STEPS, tier="app.1", staged=True)
HOST_ENDPOINT = HostEndpoint(
    "e", "h1", "bond0.100", {"role": "hypervisor"}, (parse_address("192.0.2.1"), parse_address("fd00::1")), ("default",)
)
PROFILE = Profile("q", (RULE,), (), {"zone": "a"})
SET = AddressSet({parse_address("10.65.0.2"), parse_address("fd00::2")}, {parse_prefix("10.66.0.0/26")})
CHANGES = (
    Put(Kind.POLICY, "p", POLICY),
    Put(Kind.POLICY, "r", TIERED),
    Put(Kind.STAGED, "p", STAGED),
    Put(Kind.TIER, "app.1", Tier("app.1", 5.0, Action.PASS)),
    Put(Kind.TIER, "b", Tier("b")),
    Put(Kind.HOSTENDPOINT, "e", HOST_ENDPOINT),
    Put(Kind.HOSTENDPOINT, "any", HostEndpoint("any", "h1", "*")),
    Put(Kind.PROFILE, "q", PROFILE),
    Put(Kind.SET, "all()", SET),
    Put(Kind.HOST, "h1", (parse_address("192.0.2.1"),)),
    Put(Kind.ROUTE, parse_prefix("10.65.0.2/32"), ("h1", "h2")),
    Delete(Kind.POLICY, "old"),
    Delete(Kind.STAGED, "old"),
    Delete(Kind.TIER, "old"),
    Delete(Kind.HOSTENDPOINT, "old"),
    Delete(Kind.ROUTE, parse_prefix("fd00::/64")),
    Members("all()", SET, AddressSet({parse_address("10.65.0.3")})),
)

FROM_HOST = (
    Hello("abc", 7, 2**64 - 1, (parse_address("192.0.2.1"), parse_address("fd00::1")), name="h1",
          about={"version": "0.2.0", "filter": "nftables"}),
    Hello("abc", 7, 1),
    Report(1, (FULL, Endpoint(KEY, "x", {}))),
    Claim(2, FULL),
    Expect(2, FULL),
    Release(3, KEY),
    Ack(4),
    Ack(5, (Failure("policy p", "no memory"),)),
    Ping(),
    Answer(7, '{"verdict": "allow"}'),
)
TO_HOST = (
    Snapshot("abc", 7, 99, True, CHANGES),
    Delta("abc", 6, 7, 99, CHANGES),
    Delta("abc", 6, 7, 99, ()),
    Delta("abc", 6, 7, 99, CHANGES[:1]),
    Claimed(4, (Refusal(KEY, "address 10.65.0.2 is in use by web1 on h1"),)),
    Pong(7),
    Refused("no"),
    Ask(7, '{"kind": "explain"}'),
)


@pytest.mark.parametrize("message", FROM_HOST, ids=lambda m: type(m).__name__)
def test_from_host(message: wire.FromHost) -> None:
    assert wire.decode_from_host(wire.encode_to_dispatcher(message)) == message


@pytest.mark.parametrize("message", TO_HOST, ids=lambda m: type(m).__name__)
def test_to_host(message: wire.FromDispatcher) -> None:
    assert wire.decode_from_dispatcher(wire.encode_to_host(message)) == message


def test_frames_are_shared_and_bounded() -> None:
    big = AddressSet({n.to_bytes(4, "big") for n in range(120_000)})
    pieces = wire.encode_change(Put(Kind.SET, "all()", big))
    assert len(pieces) == 3
    frames = wire.encode_delta("e", (1, 2), 3, pieces)
    assert all(any(piece is frame for frame in frames) for piece in pieces)
    assert max(map(len, frames)) < wire.MAX_FRAME
    found = wire.decode_from_dispatcher(frames)
    assert isinstance(found, Delta) and len(found.changes) == 3


def test_many_small_changes_share_few_frames() -> None:
    routes = [Put(Kind.ROUTE, Prefix((10 << 24 | n).to_bytes(4, "big"), 32), ("h1",)) for n in range(50_000)]
    message = Snapshot("e", 1, 2, False, tuple(routes))
    frames = wire.encode_to_host(message)
    assert len(frames) < 10 and max(map(len, frames)) < wire.MAX_FRAME
    assert wire.decode_from_dispatcher(frames) == message


def _altered(message: wire.FromHost, *path: int | str, to: object) -> bytes:
    raw = msgpack.unpackb(wire.encode_to_dispatcher(message))
    at = raw
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return msgpack.packb(raw)


CLAIM = Claim(2, FULL)
packb = msgpack.packb


def test_words_about_a_host() -> None:
    """What is not known is passed over, whatever it is; what is too long is cut before it is sent."""
    frame = _altered(Hello("e", 1, 2), 7, to={"version": "1", "colour": [1, {}], "filter": "iptables"})
    found = wire.decode_from_host(frame)
    assert isinstance(found, Hello) and found.about == {"version": "1", "filter": "iptables"}
    found = wire.decode_from_host(wire.encode_to_dispatcher(Hello("e", 1, 2, about={"version": "v" * 1000})))
    assert isinstance(found, Hello) and found.about == {"version": "v" * 64}


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (_altered(CLAIM, 1, to=-1), "seq"),
        (_altered(CLAIM, 1, to=True), "seq"),
        (_altered(CLAIM, 1, to=2**64 - 1)[:-1], "cut short"),
        (_altered(CLAIM, 2, 0, to="6A0CBE25-34f5-4d4e-8f4e-1f4d3d7a0001"), "uuid"),
        (_altered(CLAIM, 2, 1, to="53:54:00:00:00:02"), "mac"),
        (_altered(CLAIM, 2, 2, to=b"web"), "domain"),
        (_altered(CLAIM, 2, 2, to="x" * 5000), "domain"),
        (_altered(CLAIM, 2, 3, to=["a b", "x"]), "labels"),
        (_altered(CLAIM, 2, 3, to=["a", "x", "a", "y"]), "labels"),
        (_altered(CLAIM, 2, 3, to=["a"]), "labels"),
        (_altered(CLAIM, 2, 5, to=[b"\x0a\x00\x00"]), "addresses"),
        (_altered(CLAIM, 2, 5, to=["10.0.0.1"]), "addresses"),
        (_altered(CLAIM, 2, 6, to=[[b"\x0a\x00\x00\x01"]]), "shared"),
        (_altered(CLAIM, 2, 7, to=[b"\x0a\x00\x00\x01\x08"]), "prefixes"),
        (_altered(CLAIM, 2, 7, to=[b"\x0a\x00\x00\x00\x21"]), "prefixes"),
        (_altered(CLAIM, 2, to=[]), "endpoint"),
        (_altered(Hello("e", 1, 2), 1, to=1), "protocol 1 is not spoken here, only 3: upgrade"),
        (_altered(Hello("e", 1, 2, name="h1"), 6, to=7), "hello.name"),
        (_altered(Hello("e", 1, 2), 7, to="x"), "hello.about"),
        (_altered(Hello("e", 1, 2), 7, to=dict.fromkeys(map(str, range(33)), "x")), "hello.about"),
        (_altered(Hello("e", 1, 2), 7, to={"version": 1}), "hello.about.version"),
        (_altered(Hello("e", 1, 2), 7, to={"version": "x" * 65}), "hello.about.version: 65 characters"),
        (_altered(Hello("e", 1, 2), 7, to={"filter": "a\nb"}), "hello.about.filter"),
        (packb([1, 3, "e", 1, 2, [], "h1"]), "not eight fields"),
        (_altered(Ack(1), 0, to=99), "unknown form"),
        (wire.encode_to_dispatcher(Ping()) * 2, "more than one part"),
        (b"", "cut short"),
        (b"\xc1", "msgpack"),
        (b"\x91" * 100_000, "msgpack"),
        (msgpack.packb({1: 2}), "msgpack"),
        (msgpack.packb({"a": 2}), "list"),
        (msgpack.packb([5, 1, [["a\nb" * 1000, "c"]]]), "object"),
    ],
)
def test_hostile_frames_are_refused_in_one_line(frame: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        wire.decode_from_host(frame)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


ODD_NAMES = ("a b", "é", "a\nb", "", "٣", "x" * 254, "../x", "-a", 'a"')
ODD_LINKS = ("", "a/b", "eth 0", "eth*", "eth+", "**", ".", "..", "eth0\n", 'a"b', "x" * 16, "é", None, 3, b"eth0")
NOBODYS = ("0.0.0.0/0", "::/0", "127.0.0.1/32", "128.0.0.0/1", "169.254.1.1/32", "fe80::1/128", "ff02::/16")


def _policy(selector: object = "all()", rule: object = None, tier: object = "default") -> list[object]:
    return [selector, None, [True, True], [] if rule is None else [rule], [], tier, False, False]


def _host_endpoint(node: object = "h1", interface: object = "eth0", **other: object) -> list[object]:
    return [node, interface, other.get("labels", []), other.get("addresses", []), other.get("profiles", [])]


def _rule(ip_version: object = 4, ports: object = ()) -> list[object]:
    return ["Allow", 6, None, ip_version, None, None, [[], [], None, None, list(ports), []], None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(([0, 0, name, _policy()], "policy: .* malformed") for name in ODD_NAMES),
        ([0, 1, "Default", [[], [], []]], "profile: .* malformed"),
        ([0, 3, "h 1", []], "host: .* malformed"),
        ([0, 0, "p", _policy("role ==")], "selector"),
        ([0, 0, "p", _policy("é")], "selector"),
        ([0, 0, "p", _policy(rule=_rule(5))], "ipVersion"),
        ([0, 0, "p", _policy(rule=_rule(4.0))], "ipVersion"),
        ([0, 0, "p", _policy(rule=_rule(ports=[[90, 80]]))], "backwards"),
        *(([0, 4, pack.pack_prefix(parse_prefix(net)), ["h1"]], "route") for net in NOBODYS),
        *(([0, kind, name, []], "malformed") for kind in (5, 6, 7) for name in ODD_NAMES),
        ([0, 0, "p", _policy(tier="App")], "policy.tier: .* malformed"),
        ([0, 6, "p", _policy(tier=None)], "policy.tier"),
        ([0, 0, "p", _policy()[:7]], "policy: 7 fields, not 8"),
        ([0, 0, "p", _policy()[:4]], "policy: 4 fields, not 8"),
        ([0, 0, "p", [*_policy(), 1]], "policy: 9 fields, not 8"),
        ([0, 0, "p", _policy(rule=["Reject", *_rule()[1:]])], "rule.action"),
        ([0, 5, "t", ["1", True]], "tier.order"),
        ([0, 5, "t", [float("nan"), True]], "tier.order"),
        ([0, 5, "t", [True, True]], "tier.order"),
        ([0, 5, "t", [1.0]], "tier: 1 fields"),
        ([0, 7, "e", _host_endpoint(node="H 1")], "node: .* malformed"),
        *(([0, 7, "e", _host_endpoint(interface=odd)], "host endpoint.interface") for odd in ODD_LINKS),
        ([0, 7, "e", _host_endpoint(labels=["a"])], "labels: a key without"),
        ([0, 7, "e", _host_endpoint(addresses=["192.0.2.1"])], "addresses"),
        ([0, 7, "e", _host_endpoint(addresses=[bytes(4)] * 65)], "addresses: 65 entries"),
        ([0, 7, "e", _host_endpoint(profiles=["a"] * 17)], "profiles: 17 entries"),
        ([0, 8, "e", []], "8"),
    ],
)
def test_a_hostile_dispatcher_is_refused_in_one_line(change: list[object], says: str) -> None:
    """None of it may reach a host's kernel, or end a hostd that would find it again in its journal."""
    with pytest.raises(WireError, match=says) as caught:
        wire.decode_from_dispatcher([msgpack.packb([18, "e", 1, 2, 3]) + msgpack.packb(change)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def _read(*changes: list[object]) -> tuple[wire.Change, ...]:
    frame = b"".join(map(msgpack.packb, ([18, "e", 1, 2, 3], *changes)))
    return wire.decode_from_dispatcher([frame]).changes


def test_what_is_just_within_is_read() -> None:
    rule = _rule(6, [[80, 80], [1, 65535]])
    widest = _host_endpoint(interface="x" * 15, addresses=[bytes(4)] * 64, profiles=["a"] * 16)
    changes = (
        [0, 0, "x" * 253, _policy(rule=rule, tier="t" * 253)],
        [0, 4, pack.pack_prefix(parse_prefix("11.0.0.0/8")), ["h1"]],
        [0, 5, "t", [-1e308, True]],
        [0, 6, "s", _policy()],
        [0, 7, "e", widest],
        [0, 7, "any", _host_endpoint(interface="*")],
    )
    assert len(_read(*changes)) == len(changes)


def test_policies_as_0_1_0_wrote_them_to_disk_still_load() -> None:
    (put,) = _read([0, 0, "p", _policy(rule=_rule())[:5]])
    assert put == _read([0, 0, "p", _policy(rule=_rule())])[0]
    assert isinstance(put, Put) and isinstance(put.value, Policy)
    assert (put.value.tier, put.value.apply_on_forward, put.value.keep_established, put.value.staged) == (
        "default", False, False, False,
    )  # fmt: skip


def test_staged_and_enforced_policies_of_one_name_are_two() -> None:
    enforced, staged = _read([0, 0, "p", _policy()], [0, 6, "p", _policy()])
    assert isinstance(enforced, Put) and isinstance(staged, Put)
    assert (enforced.value.staged, staged.value.staged) == (False, True)
    assert digest_of(Kind.POLICY, "p", enforced.value) != digest_of(Kind.STAGED, "p", staged.value)


def test_every_kind_is_on_the_wire() -> None:
    assert {change.kind for change in CHANGES if isinstance(change, Put)} == set(Kind)


@pytest.mark.parametrize("flag", range(5, 8))
def test_the_digest_sees_every_field_of_a_policy(flag: int) -> None:
    """What it does not see, a host would never be told again."""
    changed: list[object] = _policy()
    changed[flag] = "other" if flag == 5 else True
    digests = [digest_of(Kind.POLICY, "p", put.value) for put in _read([0, 0, "p", _policy()], [0, 0, "p", changed])]
    assert digests[0] != digests[1]


def test_the_digest_of_what_0_1_0_wrote_is_that_of_what_it_meant() -> None:
    old, new = _read([0, 0, "p", _policy()[:5]], [0, 0, "p", _policy()])
    assert digest_of(Kind.POLICY, "p", old.value) == digest_of(Kind.POLICY, "p", new.value)


@given(st.binary(max_size=200))
@example(b"\xdd\xff\xff\xff\xff")
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_or_read(noise: bytes) -> None:
    for decode in (wire.decode_from_host, lambda f: wire.decode_from_dispatcher([f])):
        try:
            decode(noise)
        except WireError as e:
            assert "\n" not in str(e)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_refused_or_read(data: st.DataObject) -> None:
    frames = wire.encode_to_host(data.draw(st.sampled_from(TO_HOST)))
    damaged = bytearray(frames[0])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.decode_from_dispatcher([bytes(damaged), *frames[1:]])
    except WireError as e:
        assert "\n" not in str(e)


ACKS = st.integers(0, 2**64 - 1).map(lambda n: wire.encode_to_dispatcher(Ack(n)))


@given(ACKS | st.binary(max_size=8).map(lambda b: b"\x93\x05" + b + b"\x90"))
@example(b"\x93\x05\x05\xcc\x90")
@example(b"\x93\x05\x05\x90")
@example(b"\x93\x05\xc3\x90")
@example(b"\x93\x05\x90\x90")
@example(b"\x93\x05\xff\x90")
@example(msgpack.packb([5, 1, [["a", "b"]]]))
@example(msgpack.packb([5, 1, [[], []]]))
@settings(max_examples=200, deadline=None)
def test_the_short_way_reads_what_the_long_way_reads(frame: bytes) -> None:
    try:
        short = wire.plain_ack(frame)
    except WireError:
        short = -1
    if short >= 0:
        assert wire.decode_from_host(frame) == Ack(short)
    try:
        long = wire.decode_from_host(frame)
    except WireError:
        long = None
    assert not (isinstance(long, Ack) and not long.failures) or short == long.revision


def test_digest_is_a_sum_over_members() -> None:
    more = AddressSet({parse_address("10.65.0.9")})
    both = AddressSet(SET.addresses | more.addresses, set(SET.prefixes))
    assert digest_of(Kind.SET, "s", both) == (digest_of(Kind.SET, "s", SET) + digest_of_members("s", more)) & pack.MASK
    assert digest_of(Kind.SET, "s", SET) != digest_of(Kind.SET, "t", SET)
    assert digest_of(Kind.SET, "s", AddressSet()) != 0
