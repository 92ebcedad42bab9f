# The real command line (python3 -m slash32.cli) against a real dispatcher process with hosts made of the real feed.
from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from dispatcher_rig import PATIENCE, REPO, FakeHost, Rack, guest, policy

from slash32.wire import Failure

LIVE = re.compile(r"revision (\d+) live on (\d+) of (\d+) hosts? in (\d+ ms|\d+\.\d s)( \(p50 .* m?s, p99 .* m?s\))?\n")
WEB = 'role == "web"'
PROFILE = {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "base"}}
PROFILE["spec"] = {"ingress": [{"action": "Allow"}], "labelsToApply": {"zone": "1e3"}}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "slash32.cli", *map(str, words)]


class Fleet(Rack):
    """A dispatcher, three hosts with a guest each, and an operator."""

    def popen(self, *words: object, **more: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "SLASH32_SOCKET": str(self.dispatcher.socket)}
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(command(*words), cwd=REPO, env=environment, text=True, **more)

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; the hosts live on meanwhile."""
        said: list[tuple[str, str]] = []
        reader = threading.Thread(target=lambda: said.append(process.communicate(timeout=PATIENCE)))
        reader.start()
        self.until(lambda: not reader.is_alive())
        assert said and process.returncode is not None
        return process.returncode, *said[0]

    def run(self, *words: object, text: str | None = None) -> tuple[int, str, str]:
        if text is None:
            return self.ended(self.popen(*words))
        read, write = os.pipe()
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)  # less than a pipe holds
        process = self.popen(*words, stdin=read)
        os.close(read)
        return self.ended(process)

    def ok(self, *words: object, text: str | None = None) -> str:
        code, out, err = self.run(*words, text=text)
        assert (code, err) == (0, ""), (out, err)
        return out

    def revision(self) -> int:
        return int(self.dispatcher.get("/v1/status")["revision"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("cli"))
    try:
        for n, host in enumerate(fleet.begin(3), 1):
            host.claim(guest(n, "web" if n < 3 else "db", profiles=("base",)))
        fleet.settle()
        fleet.dispatcher.apply(PROFILE, policy("standing", WEB, WEB))
        fleet.settle()
        yield fleet
    finally:
        fleet.end()


@pytest.fixture
def h3(fleet: Fleet) -> Iterator[FakeHost]:
    """A host that a test may spoil."""
    host = fleet.hosts[2]
    yield host
    host.failures, host.acknowledges = [], True
    host.restart()
    fleet.until(lambda: host.in_sync)
    fleet.settle()


def text_of(*documents: dict[str, Any]) -> str:
    return yaml.safe_dump_all(documents)


# --- apply -----------------------------------------------------------------------------------------------------------


def test_apply_creates_configures_and_leaves_unchanged(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text_of(policy("a", WEB, WEB)))
    before = fleet.revision()
    assert fleet.ok("apply", "-f", file, "--dry-run") == "GlobalNetworkPolicy a created (dry run)\n"
    assert fleet.revision() == before and fleet.run("get", "gnp", "a")[0] == 1
    assert fleet.ok("apply", "-f", file) == f"GlobalNetworkPolicy a created\nrevision {before + 1}\n"
    assert fleet.ok("apply", "-f", file) == f"GlobalNetworkPolicy a unchanged\nrevision {before + 1}\n"
    file.write_text(text_of(policy("a", WEB, 'role == "db"')))
    assert fleet.ok("apply", "-f", file, "--dry-run") == "GlobalNetworkPolicy a configured (dry run)\n"
    assert fleet.ok("apply", "-f", file).startswith("GlobalNetworkPolicy a configured\n")
    assert fleet.ok("delete", "-f", file) == f"GlobalNetworkPolicy a deleted (revision {before + 3})\n"


def test_apply_wait_says_where_it_is_live(fleet: Fleet) -> None:
    out = fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("live", WEB, WEB)))
    said = LIVE.fullmatch(out.removeprefix("GlobalNetworkPolicy live created\n"))
    assert said and said.group(2, 3) == ("3", "3") and int(said[1]) == fleet.revision()
    assert "live" in fleet.hosts[0].objects(fleet_kind())
    assert LIVE.search(fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("live", WEB, WEB)))), "unchanged"
    fleet.ok("delete", "gnp", "live")


def fleet_kind() -> Any:
    from slash32.pack import Kind

    return Kind.POLICY


def test_apply_wait_names_the_host_that_failed(fleet: Fleet, h3: FakeHost) -> None:
    h3.failures = [Failure("policy broken", "the kernel\nsays no")]
    text = text_of(policy("broken", 'role == "db"', WEB))
    code, out, err = fleet.run("apply", "-f", "-", "--wait", text=text)
    assert code == 1 and out == "GlobalNetworkPolicy broken created\n"
    assert err.splitlines()[-1] == "host h3 failed: policy broken: the kernel\\nsays no"
    assert "h3" in fleet.ok("status") and "the kernel\\nsays no" in fleet.ok("get", "hosts", "-o", "wide")
    fleet.ok("delete", "gnp", "broken")


def test_apply_wait_names_the_dead_host(fleet: Fleet, h3: FakeHost) -> None:
    dead = FakeHost(fleet.dispatcher, "h4")  # known, and never seen
    fleet.dispatcher.apply(dead.resource())
    h3.acknowledges = False
    text = text_of(policy("late", "all()", WEB))
    code, out, err = fleet.run("apply", "-f", "-", "--wait", "--timeout", "0.5", text=text)
    assert (code, out) == (1, "GlobalNetworkPolicy late created\n")
    live = f"revision {fleet.revision()} live on 2 of 4 hosts"
    assert re.fullmatch(rf"{live} after \d+ s; missing: h3( \(\d+ m?s behind\))?, h4 \(not connected\)\n", err)
    out = fleet.ok("status")
    assert re.search(r"^connected: +3 of 4 hosts$", out, re.M) and re.search(r"^not connected: +h4$", out, re.M)
    assert re.search(r"^not in sync: +h3$", out, re.M)
    fleet.ok("delete", "gnp", "late")
    fleet.ok("delete", "host", "h4")


def test_apply_wait_outlives_a_restart_of_the_dispatcher(fleet: Fleet, h3: FakeHost) -> None:
    h3.acknowledges = False
    applying = fleet.popen("apply", "-f", "-", "--wait", "--timeout", "15", stdin=subprocess.PIPE)
    assert applying.stdin
    before = fleet.revision()
    applying.stdin.write(text_of(policy("again", "all()", WEB)))
    applying.stdin.close()
    applying.stdin = None
    fleet.until(lambda: fleet.revision() > before)
    fleet.dispatcher.kill()
    h3.acknowledges = True
    fleet.dispatcher.start()
    code, out, err = fleet.ended(applying)
    assert (code, err) == (0, ""), (out, err)
    assert f"revision {before + 1} live on 3 of 3 hosts" in out
    fleet.ok("delete", "gnp", "again")


def test_one_bad_document_of_fifty_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    many = [policy(f"m{n}", WEB, WEB) for n in range(50)]
    many[30]["spec"]["ingress"][0]["protocol"] = "TPC"
    file = tmp_path / "many.yaml"
    file.write_text(text_of(*many))
    before = fleet.revision()
    code, out, err = fleet.run("apply", "-f", file)
    assert out == "" and "GlobalNetworkPolicy m30: spec.ingress[0].protocol" in one_line(code, out, err)
    assert fleet.revision() == before and '"m1' not in fleet.ok("get", "gnp", "-o", "json")
    other = fleet.hosts[0].resource(publicKey=fleet.hosts[1].keys.public)  # what only the dispatcher can see
    file.write_text(text_of(*many[:30], other))
    code, out, err = fleet.run("apply", "-f", file)
    assert out == "" and "that of host h2 already" in one_line(code, out, err)
    assert err.endswith("; nothing was applied\n") and fleet.revision() == before
    file.write_text(text_of(*many[:30]))  # the positive control
    assert fleet.ok("apply", "-f", file).count("created") == 30 and fleet.revision() == before + 1
    assert fleet.ok("delete", "-f", file).count("deleted") == 30


# --- get, describe, status, validate, adopt --------------------------------------------------------------------------


def test_get_in_every_output(fleet: Fleet) -> None:
    named = {"endpoints": "web1", "hosts": "h1", "gnp": "standing", "profiles": "base"}
    calls = [(kind, name, output) for kind, name in named.items() for output in ("table", "wide", "yaml", "json")]

    def both(call: tuple[str, str, str]) -> tuple[str, str]:
        kind, name, output = call
        whole, one = (fleet.popen("get", *words, "-o", output).communicate() for words in ([kind], [kind, name]))
        assert (whole[1], one[1]) == ("", "")
        return whole[0], one[0]

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(calls, pool.map(both, calls), strict=True))
    for (kind, name, output), (whole, one) in found.items():
        if output in ("table", "wide"):
            assert len(one.splitlines()) == 2 and name in one and one.splitlines()[0] == one.splitlines()[0].upper()
            assert len(whole.splitlines()) == {"endpoints": 4, "hosts": 4, "gnp": 2, "profiles": 2}[kind], whole
        else:
            read = yaml.safe_load if output == "yaml" else json.loads
            assert read(one) in read(whole)["items"]
    assert "52:54:00" in found["endpoints", "web1", "wide"][0]
    assert "52:54:00" not in found["endpoints", "web1", "table"][0]


def test_what_get_prints_can_be_applied_again(fleet: Fleet) -> None:
    before = fleet.revision()
    for output in ("yaml", "json"):
        for kind in ("hosts", "gnp", "profiles"):
            out = fleet.ok("apply", "-f", "-", text=fleet.ok("get", kind, "-o", output))
            *changes, last = out.splitlines()
            assert changes and all(line.endswith(" unchanged") for line in changes) and last == f"revision {before}"


def test_describe(fleet: Fleet) -> None:
    fields = dict(line.split(":", 1) for line in fleet.ok("describe", "endpoint", "web1").splitlines())
    assert {k: v.strip() for k, v in fields.items() if k in ("domain", "host", "labels", "ingress", "egress")} == {
        "domain": "web1", "host": "h1", "labels": "role=web,zone=1e3", "ingress": "standing", "egress": "profiles base",
    }  # fmt: skip
    assert "web1, web2\n" in fleet.ok("describe", "gnp", "standing")
    assert "web1, web2, web3\n" in fleet.ok("describe", "profile", "base")
    assert re.search(r"^connected: +yes$", fleet.ok("describe", "host", "h2"), re.M)


MODEL = """
{apiVersion: slash32/v1, kind: Tier, metadata: {name: platform}, spec: {order: 10, defaultAction: Pass}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: office}
spec:
  {tier: platform, order: 5, selector: role == "web", ingress: [{action: Allow, source: {selector: net == "office"}}]}
---
apiVersion: slash32/v1
kind: StagedGlobalNetworkPolicy
metadata: {name: later}
spec: {tier: platform, selector: role == "web", ingress: [{action: Deny}]}
---
apiVersion: slash32/v1
kind: GlobalNetworkSet
metadata: {name: office, labels: {net: office}}
spec: {nets: [198.51.100.0/24]}
---
apiVersion: slash32/v1
kind: HostEndpoint
metadata: {name: h1-eth0, labels: {role: web}}
spec: {node: h1, interfaceName: eth0, expectedIPs: [192.0.2.77]}
"""
TABLES = {
    "tiers": "NAME ORDER DEFAULT-ACTION platform 10 Pass",
    "sgnp": 'NAME TIER ORDER SELECTOR TYPES later platform - role == "web" Ingress',
    "globalnetworksets": "NAME LABELS NETS office net=office 198.51.100.0/24",
    "hostendpoints": "NAME NODE INTERFACE ADDRESSES LABELS PROFILES h1-eth0 h1 eth0 192.0.2.77 role=web -",
}


def test_the_whole_model(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(MODEL)
    assert fleet.ok("apply", "-f", file, "--wait").count(" created\n") == 5
    for kind, table in TABLES.items():
        assert fleet.ok("get", kind).split() == table.split()
    again = "---\n".join(fleet.ok("get", kind, "-o", "yaml") for kind in ("stagedglobalnetworkpolicies", "hep"))
    assert fleet.ok("apply", "-f", "-", text=again).count(" unchanged\n") == 2

    def described(kind: str, name: str) -> dict[str, str]:
        lines = fleet.ok("describe", kind, name).partition("\n\n")[0].splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    web1 = described("endpoint", "web1")
    assert (web1["ingress"], web1["staged ingress"]) == ("platform/office, standing", "platform/later")
    assert web1["egress"] == "profiles base" and "staged egress" not in web1
    assert described("tier", "platform")["policies"] == "office, later (staged)"
    assert described("gns", "office")["named by rules of"] == "office"
    assert described("sgnp", "later").items() >= {"endpoints": "web1, web2", "host endpoints": "h1-eth0"}.items()
    card = described("hep", "h1-eth0")
    assert card["ingress"] == "platform/office, standing" and card["forwarded ingress"] == "nothing is asked"
    fields = dict(line.split(":", 1) for line in fleet.ok("status").splitlines())
    assert [fields[word].strip() for word in ("tiers", "stagedPolicies", "networkSets", "hostEndpoints")] == ["1"] * 4
    code, _, err = fleet.run("delete", "tier", "platform")
    assert code == 1 and "GlobalNetworkPolicy office, StagedGlobalNetworkPolicy later name it" in err
    assert fleet.ok("delete", "-f", file).count(" deleted ") == 5, "the tier stands first in the file"
    assert fleet.ok("get", "tiers") == "no Tier yet\n"


def test_status(fleet: Fleet) -> None:
    fleet.settle()
    fields = dict(line.split(":", 1) for line in fleet.ok("status").splitlines())
    assert fields["connected"].strip() == "3 of 3 hosts" and int(fields["revision"]) == fleet.revision()
    assert "not in sync" not in fields and "failing" not in fields
    assert len(json.loads(fleet.ok("status", "-o", "json"))["hosts"]) == 3


def test_validate_needs_no_dispatcher(fleet: Fleet) -> None:
    out = fleet.ok("--socket", "/nowhere", "validate", "-f", REPO / "examples")
    assert "three-tier.yaml: 3 documents, valid" in out and "web1.xml: domain web1: 1 endpoint, valid" in out
    assert "stray.xml: domain stray: no slash32 tag: it is left alone, valid" in out


def completed(fleet: Fleet, line: str) -> list[str]:
    environment = {"_SLASH32_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    environment |= {**os.environ, "SLASH32_SOCKET": str(fleet.dispatcher.socket)}
    done = subprocess.run(command(), env=environment, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [word.split(",", 1)[1] for word in done.stdout.split()]


def test_completion_knows_kinds_and_names(fleet: Fleet) -> None:
    def complete(line: str) -> list[str]:
        return completed(fleet, line)

    assert complete("slash32 desc") == ["describe"]
    assert complete("slash32 get e") == ["endpoints"] and "endpoints" not in complete("slash32 delete ")
    assert complete("slash32 describe endpoint w") == ["web1", "web2", "web3"]
    assert complete("slash32 delete gnp ") == ["standing"] and complete("slash32 adopt h") == ["h1", "h2", "h3"]
    assert complete("slash32 --socket /nowhere get gnp ") == []


def test_adopt(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        h1, h2 = fleet.begin(2)
        assert fleet.ok("adopt", "--all") == "adopted: no host waits\n"
        fleet.dispatcher.stop()
        for path in tmp_path.glob("d.db*"):
            path.unlink()
        fleet.dispatcher.start()
        fleet.ok("apply", "-f", "-", text=text_of(h1.resource(), h2.resource()))
        fleet.until(lambda: len(fleet.dispatcher.get("/v1/status")["held"]) == 2)
        assert re.search(r"^held until adopted: +h1, h2$", fleet.ok("status"), re.M)
        waited = ("apply", "-f", "-", "--wait", "--timeout")
        code, _, err = fleet.run(*waited, "0.2", text=text_of(policy("p", WEB, WEB)))
        assert code == 1 and re.search(r"missing: h1\b.*, h2\b.*\n", err)
        assert fleet.run("adopt", "h1", "nobody")[::2] == (
            1, 'Host "nobody": there is none; `slash32 get hosts` lists them\n'
        )  # fmt: skip
        assert fleet.ok("adopt", "h1") == "adopted: h1\n"
        fleet.until(lambda: h1.in_sync and not h2.in_sync)
        assert fleet.ok("adopt", "--all") == "adopted: h2\n"
        fleet.until(lambda: h2.in_sync)
        assert LIVE.search(fleet.ok(*waited, "20", text=text_of(policy("p", WEB, WEB))))
    finally:
        fleet.end()


# --- what goes wrong -------------------------------------------------------------------------------------------------

GOOD = text_of(policy("good", WEB, WEB))


def spoiled(old: str, new: str) -> bytes:
    text = json.dumps(policy("bad", WEB, WEB))
    assert old in text
    return text.replace(old, new, 1).encode()


BOMB = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 123))
HOST = b"apiVersion: slash32/v1\nkind: Host\nmetadata: {name: h9}\n"
FILES: dict[str, tuple[bytes, str]] = {  # content, and a piece of the complaint
    "open-bracket": (b"a: [1\n", "open-bracket.yaml:2: not YAML"),
    "tab": (b"\tkind: x\n", "tab.yaml:1: not YAML"),
    "binary": (bytes(range(256)) * 8, "not UTF-8 text"),
    "utf-16": ("kind: x".encode("utf-16"), "not UTF-8"),
    "nul": (b"kind: \0\n", "not YAML"),
    "empty": (b"", "holds no document"),
    "separators": (b"---\n---\n", "holds no document"),
    "scalar": (b"hello\n", "is not a mapping"),
    "list": (b"- a\n- b\n", "is not a mapping"),
    "number-key": (b"1: x\n", "a key is not a string"),
    "double-key": (b"kind: a\nkind: b\n", "double-key.yaml:2: the key \"kind\" is given twice"),
    "alias": (b"a: *b\n", "names no finished anchor"),
    "bomb": (BOMB, "more than"),
    "deep": (b"[" * 100 + b"]" * 100, "nested deeper"),
    "tag": (b"!!python/object:os.system x\n", "not supported"),
    "not-a-list": (b"kind: List\nitems: 3\n", "items"),
    "no-version": (b"kind: Profile\n", "apiVersion is missing"),
    "wrong-version": (spoiled("slash32/v1", "v1"), "apiVersion"),
    "kind": (spoiled("GlobalNetworkPolicy", "Pod"), '"Pod" is not known here'),
    "kind-later": (spoiled("GlobalNetworkPolicy", "Tier"), "Tier"),
    "no-name": (spoiled('{"name": "bad"}', "{}"), "name is missing"),
    "name": (spoiled('"bad"', '"Bad Name"'), "metadata.name"),
    "no-spec": (spoiled('"spec"', '"spek"'), "spec"),
    "field": (spoiled('"selector"', '"selektor"'), "spec.selektor: unknown field (did you mean selector?)"),
    "selector": (spoiled('role == \\"web\\"', "role = web"), "spec.selector"),
    "action": (spoiled("Allow", "Permit"), "spec.ingress[0].action"),
    "null": (spoiled('"Allow"', "null"), "spec.ingress[0].action"),
    "type": (spoiled('"ingress": [', '"order": "first", "ingress": ['), "spec.order"),
    "control": (spoiled('"bad"', r'"b\u001b[31m"'), "metadata.name"),
    "host": (HOST + b"spec: {publicKey: short}\n", "spec.publicKey"),
    "host-address": (HOST + b"spec: {addresses: [10.0.0.300]}\n", "10.0.0.300"),
    "xml": (b"<domain/>", "is XML"),
}  # fmt: skip

REFUSED: dict[str, tuple[list[object], str]] = {
    "no such file": (["apply", "-f", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    "empty name": (["apply", "-f", ""], "the file name is empty"),
    "endless name": (["apply", "-f", "x" * 5000], "File name too long"),
    "name that is no text": (["apply", "-f", b"\xff\xfe"], r"\udcff\udcfe: No such file"),
    "empty directory": (["apply", "-f", "void"], "this directory holds no .yaml"),
    "loop": (["apply", "-f", "loop"], "Too many levels of symbolic links"),
    "nothing on stdin": (["apply", "-f", "-"], "stdin: holds no document"),
    "no such policy": (["get", "gnp", "nope"], "GlobalNetworkPolicy nope: does not exist"),
    "no such endpoint": (["describe", "ep", "nope"], 'Endpoint "nope": there is none'),
    "no such host": (["delete", "host", "nope"], "Host nope: does not exist"),
    "no such host to adopt": (["adopt", "nope"], 'Host "nope": there is none'),
    "odd name": (["get", "gnp", "../../status"], "does not exist"),
    "empty resource name": (["get", "gnp", ""], "nothing has such a name"),
    "no such host to remove": (["host", "remove", "nope", "--yes"], 'Host "nope": there is none'),
    "a key that is none": (["host", "add", "h8", "--key", "x"], "is not a CURVE public key"),
    "no such backup": (["restore", "nope.json", "--yes"], "nope.json: No such file"),
    "no backup": (["restore", "tab.yaml", "--yes"], "it is not JSON"),
    "a backup over something": (["backup", "good.yaml"], "is there already"),
    "no such token": (["--server", "https://127.0.0.1:1", "--token-file", "nope", "status"], "No such file"),
    "name with an escape": (["describe", "gnp", "\x1b[31m"], r"\x1b[31m"),
    "resource name that is no text": (["delete", "gnp", b"\xff"], r"\udcff"),
    "no socket": (["--socket", "/nowhere", "status"], "there is no such socket"),
    "empty socket": (["--socket", "", "status"], "give the path of a socket"),
    "file as socket": (["--socket", "/etc/passwd", "status"], "nobody listens there"),
    "endless socket": (["--socket", "/" + "x" * 300, "status"], "too long"),
}
USAGE: dict[str, tuple[list[object], str]] = {
    "no such command": (["bogus"], "'bogus'"),
    "no such option": (["--nope"], "--nope"),
    "no kind": (["get"], "KIND"),
    "unknown kind": (["get", "pods"], 'there is no kind "pods"; known: endpoints'),
    "unknown kind with a newline": (["describe", "a\nb", "x"], r"a\nb"),
    "unknown output": (["get", "gnp", "-o", "xml"], "'xml' is not one of"),
    "too much": (["get", "gnp", "x", "y"], "unexpected extra argument"),
    "no file": (["apply"], "-f FILE"),
    "no name of a file": (["apply", "-f"], "-f"),
    "timeout that is none": (["apply", "-f", "x", "--wait", "--timeout", "soon"], "'soon'"),
    "timeout nan": (["apply", "-f", "x", "--wait", "--timeout", "nan"], "--timeout"),
    "timeout for nothing": (["apply", "-f", "x", "--timeout", "3"], "--wait"),
    "wait and dry run": (["apply", "-f", "x", "--wait", "--dry-run"], "--dry-run"),
    "delete half": (["delete", "gnp"], "KIND and NAME"),
    "delete an endpoint": (["delete", "endpoint", "web1"], "virsh metadata"),
    "adopt nobody": (["adopt"], "--all"),
    "unknown host command": (["host", "bogus"], "'bogus'"),
    "no key": (["host", "add", "h8"], "--key"),
    "a label that is none": (["host", "add", "h8", "--key", "x", "--label", "y"], "KEY=VALUE"),
    "nobody to ask": (["host", "remove", "h1"], "--yes"),
    "plain http": (["--server", "http://h", "status"], "https://"),
    "two places": (["--server", "https://h", "--socket", "/x", "status"], "two places"),
    "unknown store": (["store", "migrate", "--to", "paper"], "'paper'"),
    "unknown shell": (["completion", "tcsh"], "'tcsh'"),
}


def test_every_complaint_is_one_line(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good.yaml").write_text(GOOD)
    cases: dict[str, tuple[list[object], str, int]] = {}
    for name, (content, piece) in FILES.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
        cases[name] = (["apply", "-f", f"{name}.yaml", "good.yaml"], piece, 1)
    cases |= {name: (words, piece, 1) for name, (words, piece) in REFUSED.items()}
    cases |= {name: (words, piece, 2) for name, (words, piece) in USAGE.items()}
    environment = {**os.environ, "SLASH32_SOCKET": str(fleet.dispatcher.socket), "PYTHONPATH": str(REPO)}

    def call(case: tuple[list[object], str, int]) -> str | None:
        words, piece, code = case
        argv = [os.fsencode(str(w)) if not isinstance(w, bytes) else w for w in (*command(), *words)]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        lines = done.stderr.splitlines()
        fine = done.returncode == code and done.stdout == "" and len(lines) == 1 and piece in lines[0]
        fine = fine and len(lines[0]) < 700 and lines[0].isprintable() and "Traceback" not in lines[0]
        fine = fine and ("nothing was applied" in lines[0]) == (code == 1 and words[0] == "apply")
        return None if fine else f"{done.returncode} {done.stdout!r} {done.stderr!r}"

    before = fleet.revision()
    with ThreadPoolExecutor(4) as pool:
        problems = dict(zip(cases, pool.map(call, cases.values()), strict=True))
    assert {name: problem for name, problem in problems.items() if problem} == {}
    assert fleet.revision() == before
    assert "GlobalNetworkPolicy good created" in fleet.ok("apply", "-f", tmp_path / "good.yaml"), "the control"
    fleet.ok("delete", "gnp", "good")


def one_line(code: int, out: str, err: str) -> str:
    assert code == 1 and len(err.splitlines()) == 1 and "Traceback" not in err, (out, err)
    return err


def interrupted(fleet: Fleet, applying: subprocess.Popen[str]) -> str:
    applying.send_signal(signal.SIGINT)
    code, out, err = fleet.ended(applying)
    return one_line(code, out, err)


def test_ctrl_c(fleet: Fleet, h3: FakeHost, tmp_path: Path) -> None:
    h3.acknowledges = False
    before = fleet.revision()
    (tmp_path / "p.yaml").write_text(text_of(policy("stuck", "all()", WEB)))
    applying = fleet.popen("apply", "-f", tmp_path / "p.yaml", "--wait")
    fleet.until(lambda: fleet.revision() > before)
    until_it_waits(fleet, applying)
    assert f"interrupted; revision {before + 1} stands" in interrupted(fleet, applying)
    fleet.ok("delete", "gnp", "stuck")


def until_it_waits(fleet: Fleet, process: subprocess.Popen[str]) -> None:
    """For an answer on its socket: in poll(2)."""
    fleet.until(lambda: Path(f"/proc/{process.pid}/syscall").read_text().startswith("7 "))


def test_the_dispatcher_dies_midway(fleet: Fleet, tmp_path: Path) -> None:
    """A stopped process takes the connection and never reads it; then it is gone."""
    (tmp_path / "p.yaml").write_text(GOOD)
    assert fleet.dispatcher.process
    unknown = "; it may have done it or not: run this again"
    for words, more in ((["status"], ""), (["apply", "-f", tmp_path / "p.yaml"], unknown)):
        os.kill(fleet.dispatcher.process.pid, signal.SIGSTOP)
        asking = fleet.popen(*words)
        until_it_waits(fleet, asking)
        fleet.dispatcher.kill()
        code, out, err = fleet.ended(asking)
        assert one_line(code, out, err).endswith(f": it ended before it had answered{more}\n")
        fleet.dispatcher.start()
        fleet.until(lambda: all(host.in_sync for host in fleet.hosts))
    code, out, err = fleet.run("get", "gnp", "good")
    assert "does not exist" in one_line(code, out, err)


ODD: list[tuple[bytes, str]] = [
    (b"SSH-2.0-OpenSSH\r\n", "whoever listens there is no dispatcher"),
    (b"", "it ended before it had answered"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "it ended before it had answered"),
    (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\n<htm>", "is not JSON"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "no dispatcher at that socket"),
    (b"HTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\n{}", "answered 403 and no reason"),
]


def test_somebody_else_listens_there(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(GOOD)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "odd.sock"))
        server.listen()
        server.settimeout(PATIENCE)
        for answer, piece in ODD:
            asking = fleet.popen("--socket", tmp_path / "odd.sock", "apply", "-f", tmp_path / "p.yaml")
            connection, _ = server.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"]}"):
                    asked += connection.recv(1 << 16)
                connection.sendall(answer)
            code, out, err = fleet.ended(asking)
            assert piece in one_line(code, out, err)


def test_streams_that_are_full_or_closed(fleet: Fleet) -> None:
    def shell(words: str, **more: str) -> tuple[int, str]:
        environment = {**os.environ, "SLASH32_SOCKET": str(fleet.dispatcher.socket), **more}
        argv = ["sh", "-c", f"exec {sys.executable} -m slash32.cli {words}"]
        done = subprocess.run(argv, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert shell("get ep >/dev/full") == (1, "slash32: output: No space left on device\n")
    assert shell("get ep >&-") == (1, "slash32: output: it is closed\n")
    assert shell("apply -f - <&-") == (1, "stdin: it is closed; nothing was applied\n")
    assert shell("get ep 2>&-") == (0, "") and shell("get pods 2>&-") == (2, "")
    assert shell("get ep", PYTHONIOENCODING="ascii") == (0, "")


def test_a_reader_that_leaves_early(fleet: Fleet) -> None:
    read, write = os.pipe()
    asking = fleet.popen("get", "ep", stdout=write)
    os.close(read)
    os.close(write)
    code, _, err = fleet.ended(asking)
    assert (code, err) == (1, "")
