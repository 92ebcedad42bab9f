# The operator's commands about machines (python3 -m slash32.cli) against a real dispatcher process, with hosts made of
# the real feed: hosts come, go, change keys and are fenced; watch, audit, backup, restore; TLS.
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_rig import LIVE, Fleet, completed, text_of
from dispatcher_rig import REPO, WEB, FakeHost, free_port, guest, policy

from slash32.keys import load_or_create_key, next_file


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    try:
        for n, host in enumerate(fleet.begin(2), 1):
            host.claim(guest(n))
        fleet.until(lambda: len(fleet.dispatcher.get("/v1/endpoints")["items"]) == 2)
        fleet.settle()
        yield fleet
    finally:
        fleet.end()


def fields(text: str) -> dict[str, str]:
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def table(text: str) -> dict[str, dict[str, str]]:
    """First column: all columns."""
    head, *rows = (re.split(r" {3,}", line) for line in text.splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_a_host_is_added_and_removed(fleet: Fleet) -> None:
    h3 = FakeHost(fleet.dispatcher, "h3")
    bounds = ["--net", "10.65.0.0/24", "--label", "role=web", "--address", "192.0.2.9"]
    out = fleet.ok("host", "add", "h3", "--key", h3.keys.public, *bounds)
    assert out.startswith(f"Host h3 added (revision {fleet.revision()})\n")
    spec = json.loads(fleet.ok("get", "hosts", "h3", "-o", "json"))["spec"]
    assert spec == {
        "publicKey": h3.keys.public, "nets": ["10.65.0.0/24"], "labels": {"role": ["web"]}, "addresses": ["192.0.2.9"],
    }  # fmt: skip
    code, out, err = fleet.run("host", "add", "h3", "--key", h3.keys.public)
    assert (code, out) == (1, "") and "Host h3: exists already" in err and len(err.splitlines()) == 1
    fleet.hosts.append(h3)
    h3.start()
    fleet.until(lambda: h3.in_sync)
    h3.claim(guest(3))
    fleet.until(lambda: len(fleet.dispatcher.get("/v1/endpoints")["items"]) == 3)
    row = table(fleet.ok("get", "hosts"))["h3"]
    assert (row["SYNC"], row["ENDPOINTS"]) == ("yes", "1") and row["CONNECTED"] != "no"
    refused = fleet.run("host", "remove", "h3")
    assert refused[0] == 2 and "--yes" in refused[2] and "h3" in table(fleet.ok("get", "hosts"))
    assert fleet.ok("host", "remove", "h3", "--yes").startswith("Host h3 removed, and its 1 endpoint (revision ")
    assert set(table(fleet.ok("get", "hosts"))) == {"h1", "h2"}
    assert len(json.loads(fleet.ok("get", "ep", "-o", "json"))["items"]) == 2
    assert "none" in fleet.run("host", "remove", "h3", "--yes")[2]


def test_get_hosts_says_how_each_is(fleet: Fleet) -> None:
    fleet.hosts[1].acknowledges = False
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    fleet.until(lambda: table(fleet.ok("get", "hosts"))["h1"]["SYNC"] == "yes")
    h1, h2 = table(fleet.ok("get", "hosts")).values()
    assert h1["REVISION"] == str(fleet.revision()) and h1["LAG"] == "0 s"
    assert h2["SYNC"] == "no" and h2["LAG"] not in ("0 s", "-") and int(h2["REVISION"]) < fleet.revision()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+Z", h1["LAST-SEEN"])
    assert h1["CONNECTED"] == h2["CONNECTED"] != "no"
    fleet.ok("host", "add", "h3", "--key", FakeHost(fleet.dispatcher, "h3").keys.public)
    h3 = table(fleet.ok("get", "hosts"))["h3"]
    assert (h3["CONNECTED"], h3["SYNC"], h3["LAG"], h3["LAST-SEEN"]) == ("no", "no", "-", "-")


def test_apply_wait_says_how_soon(fleet: Fleet) -> None:
    out = fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("a", WEB, WEB)))
    assert re.search(r"live on 2 of 2 hosts in \d+ ms \(p50 \d+ ms, p99 \d+ ms\)\n$", out)
    fleet.hosts[1].acknowledges = False
    waited = ("delete", "gnp", "a", "--wait", "--timeout", "0.5")
    code, _, err = fleet.run(*waited)
    assert code == 1 and re.search(r"live on 1 of 2 hosts after \d+ s; missing: h2 \(\d+ m?s behind\)\n$", err)
    fleet.hosts[1].acknowledges = True
    fleet.hosts[1].restart()
    fleet.until(lambda: fleet.hosts[1].in_sync)
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    assert LIVE.search(fleet.ok("delete", "gnp", "a", "--wait"))


def test_a_key_is_rotated(fleet: Fleet) -> None:
    h1 = fleet.hosts[0]
    fresh = load_or_create_key(next_file(h1.key_file)).public
    assert fleet.ok("host", "rotate", "h1", "--key", fresh).startswith("Host h1 may come with its new key (revision ")
    fleet.until(lambda: fleet.dispatcher.get("/v1/hosts")["items"][0]["publicKey"] == fresh)
    fleet.until(lambda: h1.in_sync)
    assert table(fleet.ok("get", "hosts", "-o", "wide"))["h1"]["NEXT-KEY"] == "-"
    other = fleet.hosts[1].keys.public
    code, _, err = fleet.run("host", "rotate", "h1", "--key", other)
    assert code == 1 and "h2" in err and len(err.splitlines()) == 1
    assert "none" in fleet.run("host", "rotate", "nobody", "--key", fresh)[2]


def test_a_host_is_fenced(fleet: Fleet) -> None:
    h1, h2 = fleet.hosts
    mine = guest(1)
    out = fleet.ok("host", "fence", "h1", "--yes", "--reason", "it burns")
    assert out.startswith("Host h1 fenced, and its 1 endpoint released (revision ")
    row = table(fleet.ok("get", "hosts", "-o", "wide"))["h1"]
    assert row["SYNC"].endswith("fenced") and row["FENCED"] == "it burns" and row["ENDPOINTS"] == "0"
    assert fields(fleet.ok("status"))["fenced"] == "h1"
    h2.claim(guest(9, "web", "10.65.0.1"))
    fleet.until(lambda: table(fleet.ok("get", "hosts"))["h2"]["ENDPOINTS"] == "2")
    fleet.until(lambda: mine.key in h1.refused)
    assert "fenced" in h1.refused[mine.key] and "it burns" in h1.refused[mine.key]
    h2.release(guest(9).key)
    assert fleet.ok("host", "unfence", "h1").startswith("Host h1: fenced no longer")
    fleet.until(lambda: "fenced" not in table(fleet.ok("get", "hosts"))["h1"]["SYNC"])
    fleet.until(lambda: h1.in_sync)
    h1.claim(mine)
    fleet.until(lambda: table(fleet.ok("get", "hosts"))["h1"]["ENDPOINTS"] == "1")
    assert fleet.ok("host", "fence", "h2", "--yes") and "fenced" in fields(fleet.ok("status")), "without a reason"


def test_audit_says_who(fleet: Fleet) -> None:
    before = fleet.revision()
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB), policy("b", WEB, WEB)))
    fleet.ok("host", "fence", "h1", "--yes")
    items = json.loads(fleet.ok("audit", "--since", before, "-o", "json"))["items"]
    assert [item["what"] for item in items] == ["GlobalNetworkPolicy a", "GlobalNetworkPolicy b", "Host h1"]
    assert all("unix socket" in item["who"] and item["at"] for item in items) and items[0]["change"] == "created"
    assert [item["what"] for item in json.loads(fleet.ok("audit", "--limit", "1", "-o", "json"))["items"]] == [
        "Host h1"
    ]
    assert fleet.ok("audit").splitlines()[-1].split()[-3:] == ["Host", "h1", "fenced"]
    assert fleet.ok("audit", "--since", fleet.revision()).startswith("no change since revision ")


class Watching:
    def __init__(self, fleet: Fleet, *words: str, server: Sequence[Any] = ()) -> None:
        self.process = fleet.popen(*server, "watch", *words)
        self.fleet = fleet

    def lines(self, count: int) -> list[str]:
        assert self.process.stdout
        return [self.process.stdout.readline() for _ in range(count)]

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        code, _, err = self.fleet.ended(self.process)
        return code, err


def test_watch_goes_on_over_a_restart(fleet: Fleet) -> None:
    start = fleet.revision()
    watching = Watching(fleet, "--since", str(start))
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    assert watching.lines(1) == [f"{start + 1:<9} GlobalNetworkPolicy a put\n"]
    fleet.dispatcher.kill()
    fleet.dispatcher.start()
    fleet.ok("delete", "gnp", "a")
    assert watching.lines(1)[0].split()[1:] == ["GlobalNetworkPolicy", "a", "deleted"]
    code, err = watching.end()
    first, last = err.splitlines()
    assert (code, last) == (1, "interrupted") and first.endswith("; it is asked again")


def test_watch_of_endpoints_as_json(fleet: Fleet) -> None:
    watching = Watching(fleet, "endpoints", "-o", "json", "--since", str(fleet.revision()))
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    fleet.hosts[0].claim(guest(7))
    fleet.until(lambda: len(fleet.dispatcher.get("/v1/endpoints")["items"]) == 3)
    (change,) = json.loads(watching.lines(1)[0])["changes"]
    assert (change["kind"], change["change"]) == ("Endpoint", "put") and change["object"]["domain"] == "web7"
    assert watching.end() == (1, "interrupted\n")


def test_backup_and_restore(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ok("apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    file = tmp_path / "b.json"
    assert re.fullmatch(rf"{file}: revision {fleet.revision()}, \d+ records\n", fleet.ok("backup", file))
    assert fleet.run("backup", file)[0] == 1
    assert json.loads(fleet.ok("backup", "-"))["slash32Backup"] == 1
    fleet.ok("delete", "gnp", "a")
    code, out, err = fleet.run("restore", file, "--yes")
    assert (code, out) == (1, "") and err.endswith("; to give up what it has: slash32 restore --replace\n")
    assert len(err.splitlines()) == 1
    assert fleet.ok("restore", file, "--yes", "--replace").startswith("restored: revision ")
    assert "standing" not in fleet.ok("get", "gnp") and "a " in fleet.ok("get", "gnp")
    assert set(table(fleet.ok("get", "hosts"))) == {"h1", "h2"}


def test_restore_of_an_empty_dispatcher(fleet: Fleet, tmp_path: Path) -> None:
    """It lost its disk; the hosts had seen nothing later than the backup."""
    fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("a", WEB, WEB)))
    file = tmp_path / "b.json"
    fleet.ok("backup", file)
    fleet.dispatcher.stop()
    for path in tmp_path.glob("d.db*"):
        path.unlink()
    fleet.dispatcher.start()
    assert fleet.ok("get", "gnp").startswith("no GlobalNetworkPolicy")
    bad = json.loads(file.read_text())
    bad["records"][0][2] = "AAAA"
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    code, out, err = fleet.run("restore", tmp_path / "bad.json", "--yes")
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    fleet.ok("restore", file, "--yes")
    assert table(fleet.ok("get", "gnp")).keys() == {"a"}
    fleet.until(lambda: all(host.in_sync for host in fleet.hosts))


def test_dispatchers(fleet: Fleet) -> None:
    known = [item["name"] for item in fleet.dispatcher.get("/v1/dispatchers")["items"]]
    out = fleet.ok("get", "dispatchers")
    assert list(table(out)) == known if known else out == "no dispatchers: the store is not shared\n"
    for name in [*known, "d99"]:
        code, _, err = fleet.run("dispatcher", "remove", name)
        assert code == 1 and name in err and len(err.splitlines()) == 1


def test_store_migrate_is_the_daemons(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "slash32-dispatcher"
    program.write_text(f'#!/bin/sh\ncd {REPO} && exec {sys.executable} -m dispatcher "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    migrate = ("store", "migrate", "--to", "etcd", "--config", fleet.dispatcher.config)
    code, out, err = fleet.run(*migrate)  # it runs
    assert (code, out) == (1, "") and str(fleet.dispatcher.database) in err and len(err.splitlines()) == 1
    fleet.dispatcher.stop()
    code, out, err = fleet.run(*migrate)
    assert (code, out) == (1, "") and "etcd" in err and len(err.splitlines()) == 1
    fleet.dispatcher.start()


def test_completion_of_hosts_and_dispatchers(fleet: Fleet) -> None:
    assert completed(fleet, "slash32 ho") == ["host"]
    assert completed(fleet, "slash32 host ") == ["add", "fence", "remove", "rotate", "unfence"]
    assert completed(fleet, "slash32 host fence h") == completed(fleet, "slash32 host rotate ") == ["h1", "h2"]
    known = [item["name"] for item in fleet.dispatcher.get("/v1/dispatchers")["items"]]
    assert completed(fleet, "slash32 dispatcher remove ") == known
    assert completed(fleet, "slash32 get disp") == ["dispatchers"] and completed(fleet, "slash32 watch ep") == []
    assert completed(fleet, "slash32 watch endp") == ["endpoints"]


# --- from elsewhere --------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Fleet, list[Any]]]:
    """A dispatcher whose API is on TCP, and what reaches it."""
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-keyout", "api.key", "-out", "api.pem", "-subj", "/CN=d", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)
    fleet, port = Fleet(tmp_path), free_port()
    with fleet.dispatcher.config.open("a") as config:
        config.write(f'api_listen = "https://127.0.0.1:{port}"\n')
        config.writelines(f'api_{key} = "{tmp_path / name}"\n' for key, name in API)
    try:
        yield fleet, ["--server", f"https://127.0.0.1:{port}", "--ca", tmp_path / "api.pem"]
    finally:
        fleet.end()


API = (("cert", "api.pem"), ("key", "api.key"), ("tokens", "tokens"))


def test_over_tls_with_a_token(elsewhere: tuple[Fleet, list[Any]], tmp_path: Path) -> None:
    fleet, server = elsewhere
    for role in ("ro", "admin"):
        words = [*fleet.dispatcher.command("token"), f"test-{role}", "--role", role]
        done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True)
        (tmp_path / role).touch(0o600)
        (tmp_path / role).write_text(done.stdout)
    fleet.begin(1)
    ro, admin = ([*server, "--token-file", tmp_path / role] for role in ("ro", "admin"))
    assert "h1" in table(fleet.ok(*ro, "get", "hosts"))
    code, _, err = fleet.run(*ro, "host", "fence", "h1", "--yes")
    assert code == 1 and len(err.splitlines()) == 1
    fleet.ok(*admin, "host", "fence", "h1", "--yes")
    (entry,) = json.loads(fleet.ok(*ro, "audit", "--limit", "1", "-o", "json"))["items"]
    assert "test-admin" in entry["who"]
    watching = Watching(fleet, "--since", str(fleet.revision()), server=ro)
    fleet.ok(*admin, "apply", "-f", "-", text=text_of(policy("a", WEB, WEB)))
    assert watching.lines(1)[0].split()[1:] == ["GlobalNetworkPolicy", "a", "put"]
    assert watching.end() == (1, "interrupted\n")
    assert fleet.ok(*admin, "backup", tmp_path / "b.json") and fleet.run(*ro, "backup", "-")[0] == 1
    (tmp_path / "ro").write_text("nonsense")
    code, _, err = fleet.run(*ro, "status")
    assert code == 1 and len(err.splitlines()) == 1 and "token" in err.lower()
    code, _, err = fleet.run(*server[:2], "--token-file", tmp_path / "admin", "status")
    assert code == 1 and "its certificate is not trusted" in err
