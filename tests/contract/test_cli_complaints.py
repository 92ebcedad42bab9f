# What goes wrong at the command line: files, names and words that make no sense, a dispatcher that dies or is somebody
# else, streams that are full or closed. Each is one line.
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cli_rig import Fleet, command, one_line, text_of
from dispatcher_rig import PATIENCE, REPO, WEB, FakeHost, policy

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
