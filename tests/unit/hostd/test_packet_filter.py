# Which packet filter a host gets, and how rules become lines of iptables. No kernel here.
from __future__ import annotations

from pathlib import Path

import pytest

import hostd.__main__
from hostd.compiler.names import (
    class_chain,
    part_chain,
    policy_chain,
    profile_chain,
    staged_chain,
    tail_chain,
    tier_chain,
)
from hostd.compiler.ruleset import (
    HOST_CHAINS,
    Family,
    IcmpIs,
    InNets,
    InSet,
    Interface,
    Log,
    Ports,
    Protocol,
    Rule,
    SetKind,
    Side,
    Verdict,
)
from hostd.config import Unusable
from hostd.dataplane import choice
from hostd.dataplane.filter import IPTABLES, NFTABLES
from hostd.dataplane.iptables.names import abstract_set, is_outward, is_policy_chain, kernel_set
from hostd.dataplane.iptables.rules import fingerprints, lines, polarity
from slash32.net import parse_prefix
from slash32.policy import Direction, Icmp, PortRange

ACCEPT, DROP = Verdict.ACCEPT, Verdict.DROP


def said(rule: Rule, version: int = 4) -> list[str]:
    return [" ".join((*line.match, *line.act)) for line in lines(rule, version)]


def iptables(at: Path, target: str) -> None:
    (at / target).touch()
    (at / "iptables").symlink_to(at / target)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [("xtables-legacy-multi", IPTABLES), ("xtables-nft-multi", NFTABLES), ("", NFTABLES)],
)
def test_auto_follows_the_hosts_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, wanted: str
) -> None:
    monkeypatch.setattr(choice, "_PLACES", (str(tmp_path),))
    if target:
        iptables(tmp_path, target)
    assert choice.chosen("auto") == wanted
    assert choice.chosen("nftables") == NFTABLES
    if wanted == IPTABLES:
        assert choice.chosen("iptables") == IPTABLES
    else:
        with pytest.raises(Unusable, match=r'^packet_filter = "iptables": ') as refused:
            choice.chosen("iptables")
        assert "\n" not in str(refused.value)


def test_run_ends_with_2_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "_PLACES", (str(tmp_path),))
    iptables(tmp_path, "xtables-nft-multi")
    file = tmp_path / "hostd.toml"
    file.write_text(f'packet_filter = "iptables"\nstate_dir = "{tmp_path}"\nrun_dir = "{tmp_path}"\n')
    assert hostd.__main__.main(["run", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "update-alternatives --set iptables /usr/sbin/iptables-legacy" in line


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
def test_every_chain_says_which_way_it_is_asked(direction: Direction) -> None:
    out = direction is Direction.EGRESS
    long = "a.very-long_name/of a policy that nobody would write " * 3
    for name in ("web", long):
        tail = tail_chain(5, direction, name)
        for chain in (
            policy_chain(name, direction), profile_chain(name, direction), tail, class_chain(direction, name),
            part_chain(name, direction, "rules", 9), tier_chain(7, direction, name),
            staged_chain(name, direction, tail),
        ):  # fmt: skip
            assert is_policy_chain(chain) and is_outward(chain) == out and len(chain) <= 28
    assert sum(map(is_outward, HOST_CHAINS)) == 4


@pytest.mark.parametrize("name", [f"{kind.value}-{'0' * 12}-1048576" for kind in SetKind] + ["other"])
def test_names_of_sets_go_there_and_back(name: str) -> None:
    assert abstract_set(kernel_set(name)) == name and len(kernel_set(name)) <= 31
    assert kernel_set(name).startswith("s32")


@pytest.mark.parametrize("name", ["fail2ban-ssh", "s32-source4", "s32+abc"])
def test_others_sets_and_our_own_are_none_of_a_policys(name: str) -> None:
    assert abstract_set(name) is None


# -- rules ------------------------------------------------------------------------------------------------------------

NETS = tuple(map(parse_prefix, ("10.0.0.0/8", "10.1.0.0/16")))
LINES: dict[str, tuple[tuple[object, ...], list[str], list[str]]] = {
    "nothing": ((), ["-j DROP"], ["-j DROP"]),
    "of one family": ((Family(6),), [], ["-j DROP"]),
    "a set is of its family": ((InSet(Side.SRC, "addr4-x", SetKind.ADDR4, True),),
                               ["-m set ! --match-set s32a4-x src -j DROP"], []),
    "prefixes in one another are one": ((InNets(Side.DST, NETS),), ["-d 10.0.0.0/8 -j DROP"], []),
    "nets without notNets": ((InNets(Side.SRC, NETS[1:]), InNets(Side.SRC, (parse_prefix("10.1.0.0/17"),), True)),
                             ["-s 10.1.128.0/17 -j DROP"], []),
    "nothing is left": ((InNets(Side.SRC, NETS[1:]), InNets(Side.SRC, NETS, True)), [], []),
    "not anywhere": ((InNets(Side.SRC, (parse_prefix("0.0.0.0/0"),), True),), [], []),
    "a protocol, and not another": ((Protocol(6), Protocol(17, True)), ["-p 6 -j DROP"], ["-p 6 -j DROP"]),
    "a protocol, and not that": ((Protocol(6), Protocol(6, True)), [], []),
    "protocol 0 is not any": ((Protocol(0),), [], []),
    "ICMP is of its family": ((Protocol(1), IcmpIs(4, Icmp(8, None), True)),
                              ["-p 1 -m icmp ! --icmp-type 8 -j DROP"], []),
    "interfaces": ((Interface(True, "eth0"),), ["-i eth0 -j DROP"], ["-i eth0 -j DROP"]),
}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_lines(what: str) -> None:
    matches, v4, v6 = LINES[what]
    rule = Rule(matches, DROP)  # type: ignore[arg-type]
    assert (said(rule, 4), said(rule, 6)) == (v4, v6)


def test_many_ports_are_several_lines_or_several_matches() -> None:
    many = tuple(PortRange(n, n) for n in range(1, 62, 2))
    either = said(Rule((Protocol(6), Ports(Side.DST, many)), ACCEPT))
    neither = said(Rule((Protocol(6), Ports(Side.DST, many, True)), ACCEPT))
    assert len(either) == 3 and len(neither) == 1 and neither[0].count("! --dports") == 3
    ranges = tuple(PortRange(n, n + 1) for n in range(1, 62, 4))
    assert all(line.count(":") <= 7 for line in said(Rule((Protocol(6), Ports(Side.SRC, ranges)), ACCEPT)))


def test_a_log_is_limited_and_goes_on() -> None:
    (line,) = said(Rule((), Log("s32:0123")))
    assert "--limit " in line and "--nflog-prefix s32:0123" in line


@pytest.mark.parametrize(
    ("verdict", "negate", "sense"),
    [(ACCEPT, False, 1), (ACCEPT, True, -1), (DROP, False, -1), (DROP, True, 1), (Verdict.RETURN, False, 0)],
)
def test_what_more_members_do(verdict: Verdict, negate: bool, sense: int) -> None:
    rule = Rule((InSet(Side.SRC, "addr4-x", SetKind.ADDR4, negate),), verdict)
    assert list(polarity(rule)) == [("addr4-x", sense)]
    assert not list(polarity(rule._replace(verdict=Log("x")))), "what goes on lets nobody pass"


def test_a_comment_breaks_no_line_and_is_part_of_the_fingerprint() -> None:
    nasty = Rule((), DROP, 'a "b"\nCOMMIT\\ `c` $d' + "x" * 500)
    (line,) = lines(nasty, 4)
    text = line.text("po-a")
    assert "\n" not in text and text.count('"') == 2 and len(text) < 330
    assert fingerprints([nasty]) != fingerprints([nasty._replace(comment="other")])
