# `slash32 explain --offline`: what it prints for people and for programs, and what it exits with. No dispatcher.
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from slash32.cli.__main__ import main
from slash32.cli.explain import Traffic, parse_traffic
from slash32.documents import load_yaml
from slash32.policy import Icmp

WORLD = Path(__file__).parents[3] / "examples" / "explain" / "world.yaml"
MORE = """\
{apiVersion: slash32/v1, kind: Endpoint, metadata: {name: six, labels: {role: open}}, spec: {addresses: ["fd00:65::6"]}}
---
{apiVersion: slash32/v1, kind: Endpoint, metadata: {name: both, labels: {role: open}},
 spec: {addresses: [10.65.0.7, "fd00:65::7"], prefixes: [10.66.0.0/26]}}
---
{apiVersion: slash32/v1, kind: Endpoint, metadata: {name: bare}, spec: {}}
---
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: only-v4}
spec:
  selector: role == "open"
  types: [Ingress, Egress]
  ingress:
  - {action: Allow, ipVersion: 4}
  - {action: Allow, protocol: ICMPv6, icmp: {type: 128, code: 0}}
  - {action: Allow, protocol: UDP, source: {ports: [68]}}
  egress:
  - {action: Allow}
"""
OPEN = {"verdict": "allow", "tier": None, "policy": None, "rule": None}


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    more = tmp_path / "more.yaml"
    more.write_text(MORE)

    def run(*arguments: str) -> Ran:
        code = main(["explain", "--offline", "-f", str(WORLD), "-f", str(more), *arguments])
        return Ran(code, *capsys.readouterr())

    return run


def fixed(stage: dict[str, object]) -> dict[str, object]:
    return {key: stage[key] for key in ("verdict", "tier", "policy", "rule")}


def decided(verdict: str, tier: str | None, policy: str | None, rule: int | None) -> dict[str, object]:
    return {"verdict": verdict, "tier": tier, "policy": policy, "rule": rule}


BY_ADDRESS = decided("allow", "default", "web", 0), decided("allow", "default", "db", 0)
CASES: list[tuple[str, str, dict[str, object], dict[str, object]]] = [
    ("web1 db1 tcp/5432", "allow", decided("allow", "default", "web", 0), decided("allow", "default", "db", 0)),
    ("web1 db1 tcp/80", "deny", decided("deny", "default", None, None), decided("deny", "default", None, None)),
    ("web1 db1 udp/5432", "deny", decided("deny", "default", None, None), decided("deny", "default", None, None)),
    ("db1 web1 tcp/443", "allow", decided("allow", None, None, 0), decided("allow", "default", "web", 0)),
    ("203.0.113.9 web1 tcp/443", "deny", OPEN, decided("deny", "security", "blocklist", 1)),
    ("2001:db8:bad::1 web1 tcp/443", "deny", OPEN, decided("deny", "security", "blocklist", 1)),
    ("198.51.100.1 web1 tcp/443", "allow", OPEN, decided("allow", "default", "web", 0)),
    ("10.65.0.2 10.65.0.3 tcp/5432", "allow", *BY_ADDRESS),
    ("fd00:65::2 db1 6/5432", "allow", *BY_ADDRESS),
    ("198.51.100.1 198.51.100.2 47", "allow", OPEN, OPEN),
    ("web1 198.51.100.2 47", "deny", decided("deny", "default", None, None), OPEN),
    ("db1 office-pc tcp/1", "deny", decided("allow", None, None, 0), decided("deny", None, None, None)),
    ("db1 10.66.0.3 sctp/9", "allow", decided("allow", None, None, 0), decided("allow", "default", "only-v4", 0)),
    ("db1 six icmpv6", "allow", decided("allow", None, None, 0), decided("allow", "default", "only-v4", 1)),
    ("db1 six icmpv6/128", "allow", decided("allow", None, None, 0), decided("allow", "default", "only-v4", 1)),
    ("db1 six icmpv6/128/1", "deny", decided("allow", None, None, 0), decided("deny", "default", None, None)),
    ("db1 six 58/129", "deny", decided("allow", None, None, 0), decided("deny", "default", None, None)),
    ("db1 both icmp", "allow", decided("allow", None, None, 0), decided("allow", "default", "only-v4", 0)),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "verdict", "egress", "ingress"), CASES, ids=lambda each: str(each)[:40])
def test_what_programs_read(explain: Any, asked: str, verdict: str, egress: Any, ingress: Any) -> None:
    ran = explain(*asked.split(), "-o", "json")
    found = ran.data()
    assert (found["verdict"], fixed(found["egress"]), fixed(found["ingress"])) == (verdict, egress, ingress)
    assert (ran.code, ran.err) == (0 if verdict == "allow" else 3, "")
    for output in ("table", "yaml"):
        assert explain(*asked.split(), "-o", output).code == ran.code
    (document,) = load_yaml(explain(*asked.split(), "-o", "yaml").out, "out")
    assert document.value == found


def test_a_profile_and_what_is_always_open_are_named(explain: Any) -> None:
    found = explain("db1", "web1", "tcp/443", "-o", "json").data()
    assert (found["egress"]["profile"], found["egress"]["by"]) == ("default", "profile")
    found = explain("office-pc", "h1-eth0", "tcp/22", "-o", "json").data()
    assert found["verdict"] == "allow" and found["host_ingress"]["failsafe"] == "ssh"
    assert found["destination"] == {"name": "h1-eth0", "address": "192.0.2.11", "host": "h1"}
    found = explain("office-pc", "h1-eth0", "tcp/23", "-o", "json").data()
    assert found["verdict"] == found["host_ingress"]["verdict"] == "deny" and fixed(found["ingress"]) == OPEN


def test_both_families(explain: Any) -> None:
    """IPv4 gives the answer, IPv6 stands beside it; people see both where they differ."""
    ran = explain("db1", "both", "tcp/80", "-o", "json")
    found = ran.data()
    assert (ran.code, found["verdict"], found["family"]) == (0, "allow", 4)
    assert (found["other_family"]["verdict"], found["other_family"]["family"]) == ("deny", 6)
    table = explain("db1", "both", "tcp/80")
    assert table.code == 0 and "IPv4: allowed" in table.out and "IPv6: denied" in table.out
    for family, code, verdict in (("4", 0, "allow"), ("6", 3, "deny")):
        ran = explain("db1", "both", "tcp/80", "--family", family, "-o", "json")
        assert (ran.code, ran.data()["verdict"], "other_family" in ran.data()) == (code, verdict, False)
    assert "IPv4 and IPv6: allowed" in explain("web1", "db1", "tcp/5432").out
    assert explain("six", "both", "tcp/80", "-o", "json").data()["family"] == 6  # the one they have in common


def test_the_source_port(explain: Any) -> None:
    asked = ("db1", "six", "udp/67", "-o", "json")
    assert explain(*asked).code == 3 and explain(*asked).data()["source_port"] == 50000
    assert explain(*asked, "--source-port", "68").code == 0


def test_what_people_read(explain: Any) -> None:
    assert explain("web1", "db1", "tcp/5432", "--family", "4").out.splitlines() == [
        "web1 (10.65.0.2, on h1) to db1 (10.65.0.3, on h2), TCP port 5432, IPv4: allowed",
        "  egress of web1: allowed by GlobalNetworkPolicy web rule 0 (tier default)",
        "  ingress of db1: allowed by GlobalNetworkPolicy db rule 0 (tier default)",
    ]
    lines = explain("2001:db8:bad::1", "web1", "tcp/443", "-v").out.splitlines()
    assert lines[1:] == [
        "  egress of 2001:db8:bad::1: not asked, no Endpoint has this address",
        "  ingress of web1: denied by GlobalNetworkPolicy blocklist rule 1 (tier security)",
        "    before: logged by policy blocklist rule 0 (tier security)",
    ]
    said = explain("2001:db8::1", "web1", "tcp/443", "-v").out
    assert "before: staged, would drop by policy no-ipv6 rule 0 (tier default)" in said
    assert "before" not in explain("2001:db8::1", "web1", "tcp/443").out
    notes = explain("2001:db8::1", "web1", "tcp/443", "-v", "-o", "json").data()["notes"]
    assert [(note["what"], note["policy"]) for note in notes] == [("pass", ""), ("would drop", "no-ipv6")]
    said = explain("web1", "h1-eth0", "tcp/8443").out
    assert 'host h1 is closed to its own guests, it has no HostEndpoint of interface "*"' in said
    said = explain("db1", "office-pc", "tcp/1").out
    assert "ingress of office-pc: denied: no policy and no profile allows it" in said
    assert "egress of db1: allowed by Profile default rule 0" in said
    assert "denied at the end of tier default" in explain("web1", "db1", "47").out


WRONG = [  # arguments, exit code, what stderr says
    ("nobody db1 tcp/80", 1, '"nobody" is neither an Endpoint there nor an IP address; give a name'),
    ("wbe1 db1 tcp/80", 1, 'did you mean "web1"?'),
    ("10.65.0 db1 tcp/80", 1, '"10.65.0" is neither'),
    ("bare db1 tcp/80", 1, '"bare" has no address'),
    ("six office-pc tcp/80", 1, '"six" and "office-pc" do not both have an IP address'),
    ("db1 six tcp/80 --family 4", 1, "do not both have an IPv4 address"),
    ("six both icmp", 1, '"six" and "both" meet by IPv6, and ICMP is of IPv4: ask for icmpv6'),
    ("web1 office-pc icmpv6", 1, "meet by IPv4, and ICMPv6 is of IPv6: ask for icmp"),
    ("web1 db1 icmp --family 6", 1, "ask for icmpv6"),
    ("web1 db1 tcp", 2, "give a port from 1 to 65535, as in tcp/80"),
    ("web1 db1 tcp/0", 2, "give a port from 1 to 65535"),
    ("web1 db1 tcp/65536", 2, "give a port from 1 to 65535"),
    ("web1 db1 tcp/80/1", 2, "only ICMP has a type and a code"),
    ("web1 db1 47/80", 2, "protocol 47 has no ports"),
    ("web1 db1 icmp/256", 2, "0 to 255"),
    ("web1 db1 tpc/80", 2, '"tpc/80" is not PROTO/PORT, as in tcp/5432'),
    ("web1 db1 256", 2, "is not PROTO/PORT"),
    ("web1 db1 0", 2, "is not PROTO/PORT"),
    ("web1 db1 tcp/http", 2, "is not PROTO/PORT"),
    ("web1 db1 tcp/٨٠", 2, "is not PROTO/PORT"),
    ("web1 db1", 2, "PROTO/PORT"),
    ("web1 db1 tcp/80 --family 5", 2, "--family"),
    ("web1 db1 tcp/80 --source-port 0", 2, "--source-port"),
    ("web1 db1 tcp/80 -o xml", 2, "-o"),
    ("web1 db1 tcp/80 -f /nonexistent.yaml", 1, "/nonexistent.yaml: No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=lambda each: str(each)[:40])
def test_what_is_wrong_is_one_line(explain: Any, arguments: str, code: int, message: str) -> None:
    ran = explain(*arguments.split())
    assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1)
    assert message in ran.err


def test_hostile_names_stay_one_line(explain: Any) -> None:
    for hostile in ("a\nb\x1b[31m", "x" * 5000):
        for arguments in ((hostile, "db1", "tcp/1"), ("web1", "db1", hostile)):
            ran = explain(*arguments)
            assert ran.code in (1, 2) and ran.err.count("\n") == 1 and "\x1b" not in ran.err and len(ran.err) < 500


def test_offline_and_files_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--offline"], ["-f", str(WORLD)]):
        assert main(["explain", *arguments, "web1", "db1", "tcp/80"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and "--offline" in told.err and "-f FILE" in told.err


FILES = {
    "apiVersion: [": ": not YAML",
    "# nothing\n": "w.yaml: holds no document",
    "<domain/>": "is XML: write the guest as an Endpoint",
    "\udcff": "not UTF-8",
    "{apiVersion: slash32/v1, kind: Endpoint, metadata: {}}": "metadata.name is missing",
    "{apiVersion: slash32/v1, kind: GlobalNetworkPolicy, metadata: {name: p}, spec: {tier: lost}}": 'no Tier "lost"',
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_that_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "w.yaml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["explain", "--offline", "-f", str(file), "10.0.0.1", "10.0.0.2", "tcp/80"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and FILES[content] in told.err and "w.yaml" in told.err


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(WORLD.read_bytes())))
    assert main(["explain", "--offline", "-f", "-", "web1", "db1", "tcp/5432"]) == 0


def test_a_guest_with_two_interfaces(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    guests = [{"domain": "g", "mac": f"52:54:00:00:00:0{n}", "uuid": "u", "addresses": [f"10.0.0.{n}"]} for n in (1, 2)]
    file.write_text(json.dumps({"kind": "List", "items": guests}))

    def ask(name: str) -> tuple[int, str]:
        code = main(["explain", "--offline", "-f", str(file), name, "192.0.2.1", "tcp/80"])
        return code, "".join(capsys.readouterr())

    code, said = ask("g")
    assert code == 1 and 'has 2 interfaces: name one as "g/52:54:00:00:00:01"' in said
    code, said = ask("g/52:54:00:00:00:02")
    assert code == 3 and "10.0.0.2" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tcp/5432", Traffic(6, 5432)),
        ("TCP/1", Traffic(6, 1)),
        ("udplite/65535", Traffic(136, 65535)),
        ("132/80", Traffic(132, 80)),
        ("icmp", Traffic(1, None, Icmp(8, 0))),
        ("1", Traffic(1, None, Icmp(8, 0))),
        ("icmp/3", Traffic(1, None, Icmp(3, 0))),
        ("icmp/3/255", Traffic(1, None, Icmp(3, 255))),
        ("ICMPv6", Traffic(58, None, Icmp(128, 0))),
        ("icmpv6/0", Traffic(58, None, Icmp(0, 0))),
        ("47", Traffic(47)),
        ("255", Traffic(255)),
    ],
)
def test_traffic(text: str, found: Traffic) -> None:
    assert parse_traffic(text) == found


def test_a_host_is_asked_as_a_host_only(explain: Any) -> None:
    said = explain("office-pc", "h1-eth0", "tcp/8443").out
    assert "arriving by host endpoint h1-eth0: allowed" in said
    assert "not asked" not in said
    assert "egress of 203.0.113.9: not asked" in explain("203.0.113.9", "h1-eth0", "tcp/22").out, "the control"
