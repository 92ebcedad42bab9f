# The command line against a small real HTTP server on a Unix socket: what it asks, prints and exits with.
from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from slash32.cli.client import Client
from slash32.cli.commands import cli
from slash32.cli.waiting import follow
from slash32.documents import load_yaml
from slash32.resources import decode, encode
from tests.unit.cli.canned import Answer, Dispatcher, Run, Server, on_a_socket, runs

REPO = Path(__file__).resolve().parents[3]
POLICY = """\
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: allow-web}
spec:
  order: 10
  selector: role == 'web'
  ingress:
  - {action: Allow, protocol: TCP, destination: {ports: [80]}}
"""
PROFILE = "apiVersion: slash32/v1\nkind: Profile\nmetadata: {name: default}\nspec: {labelsToApply: {zone: 1e3x}}\n"
HOST = "apiVersion: slash32/v1\nkind: Host\nmetadata: {name: h1}\nspec: {labels: {env: ['1e3', 'on', '80:59']}}\n"
WEB1 = {
    "domain": "web1", "uuid": "6f1b0c9e-0000-4000-8000-000000000001", "mac": "52:54:00:00:00:02", "host": "h1",
    "addresses": ["10.65.0.2"], "labels": {"role": "web"}, "profiles": ["default"], "shared": [], "prefixes": [],
}  # fmt: skip
EVIL = {**WEB1, "domain": "e\x1b[31m\nvil", "labels": {}, "profiles": [], "addresses": []}


@pytest.fixture
def dispatcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    monkeypatch.setenv("SLASH32_SOCKET", str(tmp_path / "api.sock"))
    with on_a_socket(tmp_path / "api.sock", Dispatcher()) as fake:
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runs(capsys)


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


ALARM = {"host": "h9", "endpoint": "k", "message": "taken\n"}
FAILED = {"host": "h2", "object": "ruleset", "message": "no\nspace"}
CHANGED = {"revision": 3, "changes": [{"kind": "GlobalNetworkPolicy", "name": "allow-web", "change": "created"}]}


def revision(**state: Any) -> Answer:
    whole = {"revision": 3, "live": 2, "hosts": 2, "pending": [], "failed": [], "milliseconds": 11.2, "done": True}
    return 200, {**whole, **state}


def stored(text: str) -> Any:
    return encode(decode(load_yaml(text, "f")[0]))


def test_apply(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    assert run("apply", "-f", policy_file) == (0, "GlobalNetworkPolicy allow-web created\nrevision 3\n", "")
    method, path, body = dispatcher.asked[0]
    assert (method, path) == ("POST", "/v1/apply?dry_run=0")
    assert [decode(d).name for d in body["documents"]] == ["allow-web"]


def test_dry_run(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    code, out, _ = run("apply", "-f", policy_file, "--dry-run")
    assert (code, out) == (0, "GlobalNetworkPolicy allow-web created (dry run)\n")
    assert dispatcher.asked[0][1] == "/v1/apply?dry_run=1"


def test_apply_wait_follows_until_done(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    dispatcher.answers["GET", "/v1/revisions/3"] = [
        revision(live=0, pending=["h1", "h2"], done=False),
        revision(live=1, pending=["h2"], done=False),
        revision(),
    ]
    code, out, err = run("apply", "-f", policy_file, "--wait")
    assert (code, err) == (0, "")
    assert out == "GlobalNetworkPolicy allow-web created\nrevision 3 live on 2 of 2 hosts in 11 ms\n"


def test_apply_wait_names_the_hosts_that_failed(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    dispatcher.answers["GET", "/v1/revisions/3"] = revision(live=1, failed=[FAILED])
    code, out, err = run("apply", "-f", policy_file, "--wait")
    assert code == 1 and "in 11 ms" not in out
    assert err == "revision 3 live on 1 of 2 hosts\nhost h2 failed: ruleset: no\\nspace\n"


def test_apply_wait_times_out(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    dispatcher.answers["GET", "/v1/revisions/3"] = revision(live=1, pending=["h2"], done=False)
    code, _, err = run("apply", "-f", policy_file, "--wait", "--timeout", "0")
    assert (code, err) == (1, "revision 3 live on 1 of 2 hosts after 0 s; missing: h2\n")


def test_apply_wait_gives_up_on_hosts_that_keep_failing(dispatcher: Dispatcher, tmp_path: Path) -> None:
    failing = revision(live=1, hosts=3, pending=["h2", "h3"], disconnected=["h3"], failed=[FAILED], done=False)
    dispatcher.answers["GET", "/v1/revisions/3"] = [failing, failing, revision(live=2, pending=["h2"], failed=[FAILED])]
    shown: list[str] = []
    outcome = follow(Client(str(tmp_path / "api.sock")), 3, 60, shown.append)
    assert shown[0] == "revision 3 live on 1 of 3 hosts, waiting for h2, h3 (failing: h2)"
    assert not outcome.ok and "missing: h2" in outcome.lines[0] and "host h2 failed" in outcome.lines[1]


def test_apply_wait_says_how_soon_most_hosts_had_it(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    for state, end in (
        ({"hosts": 212, "live": 212, "milliseconds": 41.4, "p50": 12.1, "p99": 38.4}, " (p50 12 ms, p99 38 ms)"),
        ({"hosts": 1, "live": 1, "milliseconds": 41.4, "p50": 12.1, "p99": 38.4}, ""),
        ({"hosts": 2, "live": 2, "milliseconds": 41.4, "p50": None, "p99": None}, ""),
    ):
        dispatcher.answers["GET", "/v1/revisions/3"] = revision(**state)
        code, out, _ = run("apply", "-f", policy_file, "--wait")
        assert code == 0 and out.endswith(f" in 41 ms{end}\n")


def test_apply_wait_says_how_far_behind_hosts_are(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, CHANGED)
    lagging = [
        {"host": "h2", "connected": True, "seconds": 61.3},
        {"host": "h3", "connected": False, "seconds": 7300},
        {"host": "h4", "connected": False, "seconds": None},
    ]
    late = revision(live=1, hosts=5, pending=["h2", "h3", "h4", "h5"], lagging=lagging, done=False)
    dispatcher.answers["GET", "/v1/revisions/3"] = late
    code, _, err = run("apply", "-f", policy_file, "--wait", "--timeout", "0")
    who = "h2 (61 s behind), h3 (not connected, 2 h behind), h4 (not connected), h5"
    assert (code, err) == (1, f"revision 3 live on 1 of 5 hosts after 0 s; missing: {who}\n")


def test_delete_wait(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["DELETE", "/v1/resources/Tier/t"] = (200, {"revision": 3})
    dispatcher.answers["GET", "/v1/revisions/3"] = revision()
    code, out, err = run("delete", "tier", "t", "--wait")
    assert (code, err) == (0, "")
    assert out == "Tier t deleted (revision 3)\nrevision 3 live on 2 of 2 hosts in 11 ms\n"
    dispatcher.answers["GET", "/v1/revisions/3"] = revision(live=1, pending=["h2"], done=False)
    code, _, err = run("delete", "tier", "t", "--wait", "--timeout", "0")
    assert code == 1 and "missing: h2" in err
    assert run("delete", "tier", "t", "--timeout", "3")[0] == 2


def test_progress_is_shown_when_it_changes(dispatcher: Dispatcher, tmp_path: Path) -> None:
    waiting = revision(live=1, hosts=3, pending=["h2", "h3"], done=False)
    dispatcher.answers["GET", "/v1/revisions/3"] = [waiting, waiting, revision(live=3, hosts=3, milliseconds=12345)]
    shown: list[str] = []
    outcome = follow(Client(str(tmp_path / "api.sock")), 3, 60, shown.append)
    assert shown == [
        "revision 3 live on 1 of 3 hosts, waiting for h2, h3",
        "revision 3 live on 3 of 3 hosts",
    ]
    assert outcome.ok and outcome.lines == ["revision 3 live on 3 of 3 hosts in 12.3 s"]


def test_one_bad_document_sends_nothing_and_every_bad_one_is_listed(
    dispatcher: Dispatcher, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("---\n".join([POLICY, POLICY.replace("80", "70000").replace("-web", "-x"), "kind: Pod\n", PROFILE]))
    code, out, err = run("apply", "-f", path)
    assert (code, out, dispatcher.asked) == (1, "", [])
    first, second, last = err.splitlines()
    where = "many.yaml:10: GlobalNetworkPolicy allow-x: spec.ingress[0].destination.ports[0]"
    assert first.endswith(f"{where}: 70000 is not a port: give 1..65535")
    assert "many.yaml:19: document: apiVersion is missing; give" in second and last == "2 errors: nothing was applied"


def test_refusals_of_the_dispatcher_are_printed_one_a_line(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (400, {"errors": ["Profile x: in use", "Host y: a\x1b]0;bad"]})
    code, out, err = run("apply", "-f", policy_file)
    assert (code, out, err) == (1, "", "Profile x: in use\nHost y: a\\x1b]0;bad\n2 errors: nothing was applied\n")


def test_files_directories_and_stdin(
    dispatcher: Dispatcher, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher.answers["POST", "/v1/apply"] = (200, {"revision": 4, "changes": []})
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "b.yml").write_text(HOST)
    (folder / "a.json").write_text(json.dumps(stored(PROFILE)))
    (folder / "notes.txt").write_text("not: [yaml")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(POLICY.encode())))
    assert run("apply", "-f", folder, "-f", "-")[0] == 0
    assert [d["kind"] for d in dispatcher.asked[0][2]["documents"]] == ["Profile", "Host", "GlobalNetworkPolicy"]
    assert run("apply", "-f", folder / "b.yml", folder / "a.json")[0] == 0
    assert len(dispatcher.asked[1][2]["documents"]) == 2


def test_unusable_files(dispatcher: Dispatcher, run: Run, tmp_path: Path, policy_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.yaml").write_text("# nothing\n")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "again.yaml").write_text(POLICY)
    for names, line in [
        (["no.yaml"], "no.yaml: No such file or directory"),
        (["empty"], "empty: this directory holds no .yaml"),
        (["blank.yaml"], "blank.yaml: holds no document"),
        (["latin.yaml"], "latin.yaml:2: not UTF-8 text"),
        (["policy.yaml", "again.yaml"], "again.yaml:1: GlobalNetworkPolicy allow-web: given before, at "),
    ]:
        for command in ("apply", "validate", "delete"):
            code, _, err = run(command, "-f", *[tmp_path / n for n in names])
            assert code == 1 and line in err, command
    assert dispatcher.asked == []


def test_get_endpoints(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["GET", "/v1/endpoints"] = (200, {"items": [WEB1, EVIL]})
    code, out, _ = run("get", "endpoints")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["DOMAIN", "HOST", "ADDRESSES", "LABELS", "PROFILES"],
        ["e\\x1b[31m\\nvil", "h1", "-", "-", "-"],
        ["web1", "h1", "10.65.0.2", "role=web", "default"],
    ]
    assert "52:54:00:00:00:02" in run("get", "ep", "web1", "-o", "wide")[1]
    assert json.loads(run("get", "ep", "10.65.0.2", "-o", "json")[1]) == WEB1
    assert run("get", "ep", "nope")[::2] == (1, 'Endpoint "nope": there is none\n')


def test_get_resources_as_table_and_as_documents_that_apply_again(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["GET", "/v1/hosts"] = (200, {"items": []})
    for kind, text in (("GlobalNetworkPolicy", POLICY), ("Profile", PROFILE), ("Host", HOST)):
        dispatcher.answers["GET", f"/v1/resources/{kind}"] = (200, {"items": [stored(text)]})
        dispatcher.answers["GET", f"/v1/resources/{kind}/x"] = (200, stored(text))
        for output in ("yaml", "json"):
            code, out, _ = run("get", kind, "-o", output)
            assert code == 0
            assert [decode(d) for d in load_yaml(out, "out")] == [decode(stored(text))]
            assert decode(load_yaml(run("get", kind, "x", "-o", output)[1], "out")[0]) == decode(stored(text))
    out = run("get", "gnp")[1]
    assert out.splitlines()[1].split() == ["allow-web", "default", "10", "role", "==", '"web"', "Ingress"]
    assert "INGRESS-RULES" in run("get", "gnp", "-o", "wide")[1]
    assert "zone=1e3x" in run("get", "profiles")[1]


H1 = {
    "name": "h1", "connected": True, "dispatcher": "d2", "revision": 3, "in_sync": True, "lag_seconds": 0,
    "held": False, "fenced": "", "version": "0.4.0", "filter": "nftables", "last_seen": "2026-11-23T18:47:30Z",
    "addresses": ["192.0.2.1"], "endpoints": 4, "failures": [], "publicKey": "x" * 40, "nextPublicKey": "",
}  # fmt: skip
H2 = {
    **H1, "name": "h2", "connected": False, "dispatcher": None, "in_sync": False, "revision": 0, "lag_seconds": None,
    "failures": [{"object": "tap", "message": "no"}], "fenced": "disk\x1b[31m dies", "version": "", "last_seen": None,
}  # fmt: skip
H3 = {**H1, "name": "h3", "dispatcher": None, "in_sync": False, "held": True, "lag_seconds": 75.2, "filter": "iptables"}


def test_get_hosts(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["GET", "/v1/hosts"] = (200, {"items": [H2, H3, H1]})
    assert [line.split() for line in run("get", "hosts")[1].splitlines()] == [
        ["NAME", "CONNECTED", "REVISION", "SYNC", "LAG", "VERSION", "FILTER", "LAST-SEEN", "ENDPOINTS"],
        ["h1", "d2", "3", "yes", "0", "s", "0.4.0", "nftables", "2026-11-23T18:47:30Z", "4"],
        ["h2", "no", "-", "no,fenced", "-", "-", "nftables", "-", "4"],
        ["h3", "yes", "3", "held", "75", "s", "0.4.0", "iptables", "2026-11-23T18:47:30Z", "4"],
    ]
    head, _, second, third = (line.split() for line in run("get", "hosts", "-o", "wide")[1].splitlines())
    assert head[9:] == ["ADDRESSES", "HELD", "FENCED", "NEXT-KEY", "FAILURES"]
    assert second[9:] == ["192.0.2.1", "no", "disk\\x1b[31m", "dies", "-", "tap:", "no"] and third[11] == "yes"
    state = {"epoch": "e", "revision": 3, "held": {"h3": "x"}, "alarms": [ALARM]}
    dispatcher.answers["GET", "/v1/status"] = (200, state)
    out = run("status")[1]
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in out.splitlines())}
    assert fields["connected"] == "2 of 3 hosts" and fields["held until adopted"] == "h3"
    assert fields["not connected"] == fields["fenced"] == "h2" and "h9: k: taken\\n" in out
    assert json.loads(run("status", "-o", "json")[1])["hosts"] == [H2, H3, H1]


def test_a_dispatcher_of_yesterday_still_has_hosts(dispatcher: Dispatcher, run: Run) -> None:
    old = {key: H1[key] for key in ("name", "connected", "revision", "in_sync", "held", "addresses", "endpoints")}
    dispatcher.answers["GET", "/v1/hosts"] = (200, {"items": [old]})
    assert run("get", "hosts")[1].splitlines()[1].split() == ["h1", "yes", "3", "yes", "-", "-", "-", "-", "4"]


def test_get_dispatchers(dispatcher: Dispatcher, run: Run) -> None:
    d1 = {"connected": True, "name": "d1", "publicKey": "k", "address": "tcp://10.0.0.1:5532", "hosts": ["h1"]}
    dispatcher.answers["GET", "/v1/dispatchers"] = (200, {"items": [{**d1, "name": "d2", "extra_word": None}, d1]})
    assert [line.split() for line in run("get", "dispatchers")[1].splitlines()] == [
        ["NAME", "CONNECTED", "ADDRESS", "EXTRA-WORD"],
        ["d1", "yes", "tcp://10.0.0.1:5532", "-"],
        ["d2", "yes", "tcp://10.0.0.1:5532", "-"],
    ]
    assert "PUBLICKEY" in run("get", "dispatcher", "-o", "wide")[1]
    assert json.loads(run("get", "dispatchers", "d1", "-o", "json")[1]) == d1
    dispatcher.answers["GET", "/v1/dispatchers"] = (200, {"items": []})
    assert run("get", "dispatchers")[:2] == (0, "no dispatchers: the store is not shared\n")
    assert run("describe", "dispatcher", "d1")[0] == run("delete", "dispatcher", "d1")[0] == 2


def test_describe(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["GET", "/v1/endpoints"] = (200, {"items": [WEB1, EVIL]})
    dispatcher.answers["GET", "/v1/resources/GlobalNetworkPolicy"] = (200, {"items": [stored(POLICY)]})
    dispatcher.answers["GET", "/v1/resources/GlobalNetworkPolicy/allow-web"] = (200, stored(POLICY))
    for kind in ("StagedGlobalNetworkPolicy", "Tier", "HostEndpoint"):
        dispatcher.answers["GET", f"/v1/resources/{kind}"] = (200, {"items": []})
    dispatcher.answers["GET", "/v1/resources/Profile"] = (200, {"items": [stored(PROFILE)]})
    dispatcher.answers["GET", "/v1/resources/Profile/default"] = (200, stored(PROFILE))
    lines = dict(line.split(":", 1) for line in run("describe", "endpoint", "web1")[1].splitlines())
    assert lines["ingress"].strip() == "allow-web"
    assert lines["egress"].strip() == "profiles default"
    assert lines["labels"].strip() == "role=web,zone=1e3x"
    out = run("describe", "gnp", "allow-web")[1]
    assert "1 endpoint\n" in out and "web1" in out and "evil" not in out
    assert "web1" in run("describe", "profile", "default")[1]
    code, _, err = run("describe", "gnp", "nope")
    assert (code, err) == (1, "/v1/resources/GlobalNetworkPolicy/nope: there is none\n")


STAGED = """\
apiVersion: slash32/v1
kind: StagedGlobalNetworkPolicy
metadata: {name: later}
spec: {selector: all(), ingress: [{action: Deny}]}
"""


def test_describe_of_a_staged_policy_adds_up_what_hosts_counted(dispatcher: Dispatcher, run: Run) -> None:
    def line(policy: str, rule: int | None, packets: object) -> dict[str, object]:
        return {"policy": policy, "tier": "default", "direction": "Ingress", "rule": rule, "packets": packets}

    hosts = [{"name": name, "connected": name != "h9"} for name in ("h1", "h2", "h3", "h9")]
    answers: dict[str, Any] = {
        "h1": {"staged": [line("later", 0, 3), line("later", 2, 0), line("other", 0, 50), line("", None, 7)]},
        "h2": {"staged": [line("later", 0, 4), line("later", 0, "many"), "odd"]},
        "h3": {"problem": "hostd of yesterday"},
    }
    dispatcher.answers["GET", "/v1/resources/StagedGlobalNetworkPolicy/later"] = (200, stored(STAGED))
    for path in ("endpoints", "resources/HostEndpoint", "resources/Profile"):
        dispatcher.answers["GET", f"/v1/{path}"] = (200, {"items": []})
    dispatcher.answers["GET", "/v1/hosts"] = (200, {"items": hosts})
    dispatcher.answers["POST", "/v1/ask"] = (200, {"answers": answers, "silent": []})
    code, out, _ = run("describe", "sgnp", "later")
    about = {key: value.strip() for key, _, value in (line.partition(":") for line in out.splitlines())}
    assert code == 0 and about["would have dropped"] == "7 packets"
    assert (about["  ingress rule 0"], about["  ingress rule 2"]) == ("7 packets", "0 packets")
    assert about["not counted"] == "by h3"
    asked = [body for method, _, body in dispatcher.asked if method == "POST"]
    assert asked == [{"hosts": ["h1", "h2", "h3"], "question": {"what": "staged"}}]
    dispatcher.answers["POST", "/v1/ask"] = (503, {"errors": ["too busy"]})
    assert "would have dropped:  not known: too busy\n" in run("describe", "sgnp", "later")[1]


def test_delete(dispatcher: Dispatcher, run: Run, policy_file: Path) -> None:
    dispatcher.answers["DELETE", "/v1/resources/GlobalNetworkPolicy/allow-web"] = (200, {"revision": 5})
    assert run("delete", "gnp", "allow-web")[:2] == (0, "GlobalNetworkPolicy allow-web deleted (revision 5)\n")
    assert run("delete", "-f", policy_file)[0] == 0
    policy_file.write_text(f"{POLICY}---\n{PROFILE}")
    code, out, err = run("delete", "-f", policy_file)
    assert code == 1 and "allow-web deleted" in out and "Profile/default: there is none" in err
    assert run("delete", "gnp", "a/b c")[2] == "/v1/resources/GlobalNetworkPolicy/a/b c: there is none\n"
    assert dispatcher.asked[-1][1] == "/v1/resources/GlobalNetworkPolicy/a%2Fb%20c"
    assert run("delete", "endpoint", "web1")[0] == 2


def test_adopt(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["POST", "/v1/adopt"] = (200, {"adopted": ["h1"]})
    assert run("adopt", "h1")[:2] == (0, "adopted: h1\n")
    assert run("adopt", "--all")[0] == 0
    assert [body for _, _, body in dispatcher.asked] == [{"hosts": ["h1"]}, {"all": True}]
    assert run("adopt")[0] == run("adopt", "h1", "--all")[0] == 2


def test_validate_needs_no_dispatcher(run: Run, tmp_path: Path, policy_file: Path) -> None:
    domain = (
        "<domain type='kvm'><name>web1</name><metadata>"
        "<s:endpoint xmlns:s='urn:slash32:domain:1'><s:label key='role' value='web'/>"
        "<s:interface mac='52:54:00:00:00:02'><s:address>{}</s:address></s:interface></s:endpoint></metadata>"
        "<devices><interface type='ethernet'><mac address='52:54:00:00:00:02'/></interface></devices></domain>"
    )
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    good.write_text(domain.format("10.65.0.2"))
    bad.write_text(domain.format("10.65.0.256"))
    code, out, err = run("--socket", "/nonexistent", "validate", "-f", policy_file, good)
    assert (code, err) == (0, "")
    assert "policy.yaml: 1 document, valid" in out and "good.xml: domain web1: 1 endpoint, valid" in out
    code, _, err = run("validate", "-f", bad)
    assert code == 1 and "10.65.0.256" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["get"],
        ["get", "pods"],
        ["get", "gnp", "-o", "xml"],
        ["apply"],
        ["apply", "-f", "x", "--wait", "--dry-run"],
        ["apply", "-f", "x", "--timeout", "soon"],
        ["delete"],
        ["delete", "gnp"],
        ["completion", "tcsh"],
        ["host", "bogus"],
        ["host", "add", "h1"],
        ["host", "remove"],
        ["watch", "pods"],
        ["watch", "dispatchers"],
        ["watch", "--since", "-1"],
        ["watch", "-o", "wide"],
        ["audit", "--limit", "0"],
        ["backup"],
        ["store", "migrate", "--to", "postgres"],
        ["store", "migrate"],
        ["dispatcher", "remove"],
    ],
)
def test_usage_errors_exit_2(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2 or (code == 0 and not arguments)  # nothing at all: the help
    assert "Traceback" not in err


def test_help_teaches_and_documents_exit_codes(run: Run) -> None:
    out = run("--help")[1]
    assert "slash32 apply -f policy.yaml --wait" in out and "Exit codes: 0 done, 1 refused or failed, 2 usage." in out
    for command in ("apply", "get", "describe", "delete", "validate", "adopt"):
        assert "Examples:" in run(command, "--help")[1]
    assert "slash32-hostd key --next" in run("host", "rotate", "--help")[1]


def test_help_imports_little() -> None:
    code = "import sys; from slash32.cli.__main__ import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    had = set(done.stdout.splitlines()[-1].split())
    assert had & {"yaml", "zmq", "lxml", "msgpack", "slash32.compare", "slash32.verdict"} == set()
    assert "click" in had, "the control"
    for name in ("diff", "explain"):
        assert cli.commands[name].short_help == cli.commands[name].whole.short_help


def test_completion(run: Run) -> None:
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = run("completion", shell)
        assert code == 0 and "_SLASH32_COMPLETE" in out


def test_no_dispatcher_is_one_line(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "missing.sock"
    dead = tmp_path / "dead.sock"
    with Server(str(dead), BaseHTTPRequestHandler):
        pass  # bound once, nobody listens now
    for path, why in ((missing, "there is no such socket"), (dead, "nobody listens there")):
        code, out, err = run("--socket", path, "status")
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert why in err and str(path) in err and "slash32-dispatcher" in err


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"", b"[" * 100_000, {"items": 3}, {"items": ["x"]}, {}])
def test_an_odd_answer_is_one_line(dispatcher: Dispatcher, run: Run, answer: Any) -> None:
    dispatcher.answers["GET", "/v1/endpoints"] = (200, answer)
    code, _, err = run("get", "endpoints")
    assert code == 1 and len(err.splitlines()) == 1
