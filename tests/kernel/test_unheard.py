from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from netns import Namespace

from hostd.compiler.ruleset import Guard, SetKind, SetSpec
from hostd.dataplane.monitor import Monitor, RulesetChanged
from hostd.dataplane.nft.table import NftTable
from hostd.dataplane.nft.transaction import TransactionRefused

NAME, SPEC = "addr4-x", SetSpec(SetKind.ADDR4, 65536)
MANY = [(0x0A000000 + n).to_bytes(4, "big") for n in range(5_000)]


@pytest.fixture
def table(netns: Namespace) -> Iterator[NftTable]:
    table = NftTable(Guard())
    table.load()
    change = table.transaction()
    change.add_set(NAME, SPEC, None)
    change.commit()
    yield table
    table.close()


@pytest.fixture
def monitor(table: NftTable) -> Iterator[Monitor]:
    monitor = Monitor(0, table.port)
    table.heard_by(monitor.hear_ruleset)
    yield monitor
    monitor.close()


def fill(table: NftTable, name: str = NAME) -> None:
    change = table.transaction()
    change.add_members(name, SPEC.kind, MANY, None)
    change.commit()


def foreign(text: str = "add set inet slash32 theirs { type ipv4_addr; }") -> None:
    subprocess.run(["nft", text], check=True)


def heard(monitor: Monitor) -> int:
    return sum(isinstance(event, RulesetChanged) for event in monitor.read())


def meanwhile(table: NftTable, monitor: Monitor, moment: bool, act: Callable[[], None]) -> None:
    """Somebody acts just before the listener turns away, or just before it is back."""

    def listen(on: bool) -> None:
        if on is moment:
            act()
        monitor.hear_ruleset(on)

    table.heard_by(listen)


def test_what_we_write_is_not_told_and_what_others_do_before_and_after_is(table: NftTable, monitor: Monitor) -> None:
    foreign()
    fill(table)
    foreign("delete set inet slash32 theirs")
    assert heard(monitor) == 2 and not table.changed()


@pytest.mark.parametrize("moment", [False, True], ids=["before it turns away", "before it is back"])
@pytest.mark.parametrize("refused", [False, True])
def test_what_others_do_meanwhile_shows(table: NftTable, monitor: Monitor, moment: bool, refused: bool) -> None:
    meanwhile(table, monitor, moment, foreign)
    if refused:
        with pytest.raises(TransactionRefused):
            fill(table, "addr4-none")
    else:
        fill(table)
    assert table.changed()
    meanwhile(table, monitor, moment, lambda: None)
    fill(table)
    assert table.changed(), "until it was looked at"
    table.settled()
    fill(table)
    assert not table.changed()


def test_a_refusal_is_no_change(table: NftTable, monitor: Monitor) -> None:
    with pytest.raises(TransactionRefused):
        fill(table, "addr4-none")
    assert not table.changed()


def test_the_listener_comes_back(table: NftTable, monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(batch: bytes, last: int) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no memory"):
        patched.setattr(table._socket, "exchange", fails)
        fill(table)
    assert table.changed()
    foreign()
    assert heard(monitor) == 1


def test_a_small_change_turns_nobody_away(table: NftTable, monitor: Monitor) -> None:
    turns: list[bool] = []
    table.heard_by(turns.append)
    change = table.transaction()
    change.add_members(NAME, SPEC.kind, MANY[:3], None)
    change.commit()
    assert turns == []
    fill(table)
    assert turns == [False, True]
