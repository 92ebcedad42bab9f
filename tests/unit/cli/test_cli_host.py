# `slash32 host`, `dispatcher`, `store`: what they ask, print, refuse, and how they ask back on a terminal.
from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slash32.cli import dispatchers
from tests.unit.cli.canned import Dispatcher, Run, on_a_socket, runs

REPO = Path(__file__).resolve().parents[3]
KEY = "-q*D>AAC1]b=NQO4Qvze7%!W(i+TnF.&3sD2Ml=}"  # begins like an option
HOSTS = {"items": [{"name": "h1", "endpoints": 4}, {"name": "h2", "endpoints": 1}]}


@pytest.fixture
def dispatcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    monkeypatch.setenv("SLASH32_SOCKET", str(tmp_path / "api.sock"))
    with on_a_socket(tmp_path / "api.sock", Dispatcher()) as fake:
        fake.answers["GET", "/v1/hosts"] = (200, HOSTS)
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runs(capsys)


def test_add(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["POST", "/v1/hosts"] = (200, {"revision": 5})
    code, out, err = run("host", "add", "h3", "--key", KEY)
    assert (code, err) == (0, "") and out.startswith("Host h3 added (revision 5)\nnext, there: ")
    assert "systemctl restart slash32-hostd\nconnected? slash32 get hosts h3\n" in out
    bounds = ["--net", "10.65.1.0/24", "--net", "fd00::/64", "--label", "env=prod", "--label", "env=a=b"]
    assert run("host", "add", "h3", "--key", KEY, *bounds, "--address", "192.0.2.3", "--label", "role=")[0] == 0
    assert [body for _, _, body in dispatcher.asked] == [
        {"name": "h3", "publicKey": KEY},
        {
            "name": "h3", "publicKey": KEY, "nets": ["10.65.1.0/24", "fd00::/64"], "addresses": ["192.0.2.3"],
            "labels": {"env": ["prod", "a=b"], "role": [""]},
        },
    ]  # fmt: skip


def test_add_refuses_what_is_there(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["POST", "/v1/hosts"] = (409, {"errors": ["Host h1: exists already; slash32 host rotate h1"]})
    code, out, err = run("host", "add", "h1", "--key", KEY)
    assert (code, out, err) == (1, "", "Host h1: exists already; slash32 host rotate h1\n")


@pytest.mark.parametrize(
    ("words", "code", "piece"),
    [
        (["add", "h3", "--key", "short"], 1, 'Host h3: spec.publicKey: "short" is not a CURVE public key'),
        (["add", "h3", "--key", "\x1b[31m" * 8], 1, r"\x1b[31m"),
        (["add", "H 3", "--key", KEY], 1, "metadata.name"),
        (["add", "../x", "--key", KEY], 1, "metadata.name"),
        (["add", "h3", "--key", KEY, "--net", "10.65.1.0/33"], 1, "spec.nets[0]"),
        (["add", "h3", "--key", KEY, "--net", "10.65.1.1/24"], 1, "spec.nets[0]"),
        (["add", "h3", "--key", KEY, "--address", "nowhere"], 1, "spec.addresses[0]"),
        (["add", "h3", "--key", KEY, "--label", "env"], 2, "--label"),
        (["add", "h3", "--key", KEY, "--label", "=prod"], 2, "--label"),
        (["add", "h3", "--key", KEY, "--label", "a b=prod"], 1, "spec.labels"),
        (["rotate", "h1", "--key", "x" * 41], 1, "spec.publicKey"),
        (["rotate", "h1"], 2, "--key"),
        (["remove", "nobody", "--yes"], 1, 'Host "nobody": there is none'),
        (["fence", "no\nbody", "--yes"], 1, r'Host "no\nbody": there is none'),
        (["remove", "h1"], 2, "there is no terminal to ask on: give --yes"),
        (["fence", "h1"], 2, "there is no terminal to ask on: give --yes"),
    ],
)
def test_what_is_wrong_is_one_line_and_changes_nothing(
    dispatcher: Dispatcher, run: Run, words: list[str], code: int, piece: str
) -> None:
    found = run("host", *words)
    assert (found[0], found[1]) == (code, "") and piece in found[2]
    assert len(found[2].splitlines()) == 1 and found[2][:-1].isprintable()
    assert [method for method, _, _ in dispatcher.asked if method != "GET"] == []


def test_remove(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["DELETE", "/v1/resources/Host/h1"] = (200, {"revision": 9})
    dispatcher.answers["DELETE", "/v1/resources/Host/h2"] = (200, {"revision": 10})
    assert run("host", "remove", "h1", "--yes") == (0, "Host h1 removed, and its 4 endpoints (revision 9)\n", "")
    assert run("host", "remove", "h2", "--yes")[1] == "Host h2 removed, and its 1 endpoint (revision 10)\n"


def test_rotate(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["POST", "/v1/hosts/h1/rotate"] = (200, {"revision": 6})
    code, out, _ = run("host", "rotate", "h1", "--key", KEY)
    assert code == 0 and out.startswith("Host h1 may come with its new key (revision 6)\n")
    assert dispatcher.asked == [("POST", "/v1/hosts/h1/rotate", {"publicKey": KEY})]


def test_fence_and_unfence(dispatcher: Dispatcher, run: Run) -> None:
    for verb in ("fence", "unfence"):
        dispatcher.answers["POST", f"/v1/hosts/h1/{verb}"] = (200, {"revision": 7})
    code, out, _ = run("host", "fence", "h1", "--yes", "--reason", "disk\x1b dies")
    about = "(revision 7); back with: slash32 host unfence h1"
    assert (code, out) == (0, f"Host h1 fenced, and its 4 endpoints released {about}\n")
    assert run("host", "fence", "h1", "--yes")[0] == 0
    assert run("host", "unfence", "h1")[:2] == (0, "Host h1: fenced no longer (revision 7)\n")
    bodies = [body for method, _, body in dispatcher.asked if method == "POST"]
    assert bodies == [{"reason": "disk\x1b dies"}, {}, {}]


@pytest.mark.parametrize(("said", "code", "removed"), [(b"y\n", 0, True), (b"n\n", 1, False), (b"\n", 1, False)])
def test_on_a_terminal_it_asks(dispatcher: Dispatcher, said: bytes, code: int, removed: bool) -> None:
    dispatcher.answers["DELETE", "/v1/resources/Host/h1"] = (200, {"revision": 9})
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "slash32.cli", "host", "remove", "h1"]
    asking = subprocess.Popen(words, cwd=REPO, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ})
    os.close(theirs)
    os.write(ours, said)  # it waits in the terminal
    out, _ = asking.communicate(timeout=20)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "Remove host h1, and its 4 endpoints? [y/N]" in shown
    assert asking.returncode == code and ("DELETE" in [method for method, _, _ in dispatcher.asked]) is removed
    assert (b"removed" in out) is removed and ("Host h1: stays" in shown) is not removed


def test_remove_a_dispatcher(dispatcher: Dispatcher, run: Run) -> None:
    dispatcher.answers["DELETE", "/v1/dispatchers/d3"] = (200, {"revision": 8})
    assert run("dispatcher", "remove", "d3") == (0, "dispatcher d3 removed (revision 8)\n", "")
    code, _, err = run("dispatcher", "remove", "d4")
    assert (code, err) == (1, "/v1/dispatchers/d4: there is none\n")


def test_store_migrate_becomes_the_daemons_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / dispatchers.DAEMON
    program.write_text('#!/bin/sh\necho "$0 $@"; exit 3\n')
    program.chmod(0o755)
    words = [sys.executable, "-m", "slash32.cli", "store", "migrate", "--to", "etcd", "--config", "/x y"]
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=REPO, env=path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, f"{program} store migrate --to etcd --config /x y\n")
    program.chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dispatchers, "DAEMON", "slash32-nowhere")
    code, out, err = run("store", "migrate", "--to", "sqlite")
    assert (code, out) == (1, "")
    assert err == "slash32-nowhere: is not installed here: run this on the dispatcher's machine\n"
