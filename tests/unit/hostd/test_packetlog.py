# Logged packets: from bytes, hostile ones too, to entries of the journal.
from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.compiler.desired import LogPoint
from hostd.reporting.journald import Journald, encoded
from hostd.reporting.packetlog import A_SECOND, Fields, Header, Logged, PacketLog, entry, header
from slash32.net import parse_address
from slash32.policy import Direction

ANY = settings(max_examples=2000 if os.environ.get("SLASH32_COUNTS") == "full" else 200, deadline=None)
POINT = LogPoint("policy", "block-telnet", "security", Direction.INGRESS, 0)
PORTS = struct.pack(">HH", 40000, 23)


def _v4(protocol: int, rest: bytes, options: int = 0, fragment: int = 0) -> bytes:
    ends = parse_address("10.65.0.3") + parse_address("10.65.0.2")
    head = struct.pack(">BBHHHBBH", 0x45 + options, 0, 40, 7, fragment, 64, protocol, 0)
    return head + ends + bytes(4 * options) + rest


def _v6(kind: int, rest: bytes) -> bytes:
    ends = parse_address("fd00::3") + parse_address("fd00::2")
    return struct.pack(">IHBB", 6 << 28, len(rest), kind, 64) + ends + rest


def _logged(payload: bytes) -> Logged:
    return Logged("i:block-telnet.0", 3, 4, bytes.fromhex("525400000003"), payload)


def _entry(payload: bytes) -> Fields:
    return entry(_logged(payload), POINT, "web1")


def test_an_entry_in_words_and_fields() -> None:
    assert _entry(_v4(6, PORTS)) == {
        "MESSAGE": "web1: policy block-telnet ingress[0] (tier security): 10.65.0.3:40000 -> 10.65.0.2:23 tcp",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "slash32-hostd",
        "SLASH32_ENDPOINT": "web1",
        "SLASH32_POLICY": "block-telnet",
        "SLASH32_RULE": "0",
        "SLASH32_DIRECTION": "ingress",
        "SLASH32_TIER": "security",
        "SLASH32_MAC": "52:54:00:00:00:03",
        "SLASH32_SOURCE": "10.65.0.3",
        "SLASH32_DESTINATION": "10.65.0.2",
        "SLASH32_PROTOCOL": "tcp",
        "SLASH32_SOURCE_PORT": "40000",
        "SLASH32_PORT": "23",
    }


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (_v6(17, PORTS), "[fd00::3]:40000 -> [fd00::2]:23 udp"),
        (_v4(1, b"\x08\0"), "10.65.0.3 -> 10.65.0.2 icmp 8/0"),
        (_v6(58, b"\x80\0"), "fd00::3 -> fd00::2 icmpv6 128/0"),
        (_v4(47, PORTS), "10.65.0.3 -> 10.65.0.2 47"),
        (_v4(6, PORTS, options=2), "10.65.0.3:40000 -> 10.65.0.2:23 tcp"),
        (_v4(6, PORTS, fragment=8), "10.65.0.3 -> 10.65.0.2 tcp"),
        (_v4(6, PORTS[:3]), "10.65.0.3 -> 10.65.0.2 tcp"),
        (_v6(0, bytes([60, 0]) + bytes(6) + bytes([6, 1]) + bytes(14) + PORTS), "[fd00::3]:40000 -> [fd00::2]:23 tcp"),
        (_v6(44, bytes([6, 0, 0, 1]) + bytes(4) + PORTS), "[fd00::3]:40000 -> [fd00::2]:23 tcp"),
        (_v6(44, bytes([6, 0, 0, 8]) + bytes(4) + PORTS), "fd00::3 -> fd00::2 tcp"),
        (_v4(6, b"")[:19], "a packet without whole addresses"),
        (b"", "a packet without whole addresses"),
    ],
)
def test_words_of_a_packet(payload: bytes, words: str) -> None:
    assert _entry(payload)["MESSAGE"].partition("): ")[2] == words


def test_a_tag_that_no_rule_has() -> None:
    found = entry(_logged(_v4(6, PORTS)), None, "web1")
    assert found["MESSAGE"].startswith("web1: rule i:block-telnet.0, which is gone: 10.65.0.3:40000 ->")
    assert "SLASH32_POLICY" not in found


def test_a_profile_has_no_tier() -> None:
    found = entry(_logged(_v4(6, PORTS)), POINT._replace(kind="profile", tier=""), "web1")
    assert found["SLASH32_PROFILE"] == "block-telnet"
    assert "SLASH32_TIER" not in found
    assert "profile block-telnet ingress[0]: " in found["MESSAGE"]


@ANY
@given(st.binary(max_size=128))
def test_any_bytes_are_read(payload: bytes) -> None:
    for start in (b"", b"\x45", b"\x4f", b"\x60"):
        found = header(start + payload)
        assert found is None or isinstance(found, Header)
    assert "\n" not in _entry(payload)["MESSAGE"]


@ANY
@given(st.text())
def test_a_guests_name_is_one_bounded_line(name: str) -> None:
    found = entry(_logged(b""), None, name)
    assert all(c.isprintable() for c in found["MESSAGE"])
    assert len(found["MESSAGE"]) < 400


# ---- bounds -----------------------------------------------------------------------------------------------------


def _log(written: list[Fields], works: bool = True) -> PacketLog:
    def write(fields: Fields) -> bool:
        if works:
            written.append(fields)
        return works

    return PacketLog(write, lambda _logged, _point: "web1")


def test_no_more_than_so_many_a_second_and_the_rest_is_counted() -> None:
    written: list[Fields] = []
    log = _log(written)
    many = [_logged(_v4(6, PORTS))] * (A_SECOND + 7)
    log.heard(many, {"i:block-telnet.0": POINT}, 10.0)
    assert len(written) == A_SECOND
    log.heard(many[:2], {}, 10.9)
    log.lost(3)
    assert len(written) == A_SECOND
    log.tick(11.1)
    assert written[A_SECOND]["MESSAGE"] == "12 more logged packets not written"
    log.heard(many[:2], {}, 11.2)
    assert len(written) == A_SECOND + 3
    log.tick(13.0)
    assert len(written) == A_SECOND + 3, "nothing was missed since"


def test_what_the_journal_does_not_take_is_counted() -> None:
    written: list[Fields] = []
    log = _log(written, works=False)
    log.heard([_logged(b"")] * 3, {}, 1.0)
    log.tick(3.0)
    assert not written
    log._write = lambda fields: not written.append(fields)
    log.tick(5.0)
    assert [w["MESSAGE"] for w in written] == ["3 more logged packets not written"]


# ---- the journal ------------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(str(tmp_path / "socket"))
        yield made


def test_journal_gets_fields(journal: socket.socket) -> None:
    to = Journald(journal.getsockname())
    assert to.write({"MESSAGE": "one line", "A": "two\nlines"})
    assert journal.recv(4096) == b"MESSAGE=one line\nA\n\x09\0\0\0\0\0\0\0two\nlines\n"
    to.close()


def test_no_field_makes_another() -> None:
    assert encoded({"A": "x\nB=y"}) == b"A\n\x05\0\0\0\0\0\0\0x\nB=y\n"
    assert encoded({"A": "\udc80"}) == b"A=?\n"


def test_a_full_journal_is_not_waited_for(journal: socket.socket) -> None:
    to = Journald(journal.getsockname())
    said = 0
    while to.write({"MESSAGE": "x" * 1000}):
        said += 1
        assert said < 100_000
    assert said
    journal.recv(4096)
    assert to.write({"MESSAGE": "again"})
    to.close()


def test_without_a_journal_it_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    to = Journald(str(tmp_path / "none"))
    with caplog.at_level(logging.INFO):
        assert to.write({"MESSAGE": "web1: %s policy"})
    assert caplog.messages == ["web1: %s policy"]
    to.close()
