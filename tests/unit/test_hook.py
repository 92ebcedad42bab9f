# The installed hook, executed by the kernel as libvirt would, against a daemon of the test. The paths it knows are
# constants: the fixture installs a copy in which exactly those are changed.
from __future__ import annotations

import re
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hooks import alone

REPO = Path(__file__).resolve().parents[2]
MAY_REFUSE = ("prepare", "start", "migrate")
NEVER = ("started", "stopped", "release", "reconnect")
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def domain(target: str = "", tag: bool = True, kind: str = "ethernet", head: str = "") -> bytes:
    dev = f"<target dev='{target}'/>" if target else ""
    meta = '<s:endpoint xmlns:s="urn:slash32:domain:1"/>' if tag else ""
    return (
        f"{head}<domain type='qemu'><name>web1</name><metadata>{meta}</metadata><devices>"
        f"<interface type='{kind}'><mac address='52:54:00:00:00:02'/>{dev}</interface></devices></domain>"
    ).encode()


class Daemon:
    """Accepts, keeps what it read, does what `reply` says with the connection."""

    def __init__(self, path: Path, reply: Callable[[socket.socket], None]) -> None:
        self.got: list[bytes] = []
        self._reply = reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            data = b""
            while part := connection.recv(1 << 16):
                data += part
            self.got.append(data)
            self._reply(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


class Installed:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = root / "hook.sock"
        self.code = root / "share"
        self.daemons: list[Daemon] = []
        self._install()

    def _install(self) -> None:
        text = (REPO / "hooks/hook.py").read_text()
        text = replaced(text, '"/run/slash32/hook.sock"', repr(str(self.socket)))
        text = replaced(text, '"/usr/share/slash32"', repr(str(self.code)))
        text = replaced(text, "SECONDS = 10 ", "SECONDS = 1 ")
        for driver in ("qemu", "lxc"):
            script = self.script(driver)
            script.parent.mkdir(parents=True)
            script.write_text(text)
            script.chmod(0o755)
        (self.code / "hooks").mkdir(parents=True)
        text = (REPO / "hooks/alone.py").read_text()
        text = replaced(text, '"/etc/slash32/hostd.toml"', repr(str(self.root / "hostd.toml")))
        (self.code / "hooks/alone.py").write_text(text)

    def script(self, driver: str) -> Path:
        return self.root / f"hooks/{driver}.d/50-slash32"

    def daemon(self, reply: Callable[[socket.socket], None] = lambda c: c.sendall(b"\0")) -> Daemon:
        self.daemons.append(Daemon(self.socket, reply))
        return self.daemons[-1]

    def run(
        self, operation: str, xml: bytes = b"", driver: str = "qemu", name: str = "web1"
    ) -> subprocess.CompletedProcess[bytes]:
        argv = [str(self.script(driver)), name, operation, "begin", "-"]
        done = subprocess.run(argv, input=xml, capture_output=True, env=ENV, timeout=60, check=False)
        assert done.stdout == b"", "stdout would replace the domain's XML"
        assert done.stderr.count(b"\n") <= 1 and b"Traceback" not in done.stderr
        return done


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def refusing(message: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"\1" + message)


def hangs(connection: socket.socket) -> None:
    """Says nothing until the hook has gone away (POLLHUP is reported without being asked for)."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll(20_000)


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Installed]:
    installed = Installed(tmp_path)
    yield installed
    for daemon in installed.daemons:
        daemon.close()


@pytest.mark.parametrize("driver", ["qemu", "lxc"])
@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
def test_tells_hostd_everything(hook: Installed, operation: str, driver: str) -> None:
    daemon = hook.daemon()
    done = hook.run(operation, domain(), driver, name="wéb 1")
    assert (done.returncode, done.stderr) == (0, b"")
    header = f"1\1{driver}\1wéb 1\1{operation}\1begin\1-\0".encode()
    assert daemon.got == [header + domain()]


@pytest.mark.parametrize("operation", MAY_REFUSE)
def test_hostd_may_refuse(hook: Installed, operation: str) -> None:
    hook.daemon(refusing("domain 'web1':\n  address in use é".encode()))
    done = hook.run(operation, domain())
    assert done.returncode == 1
    assert done.stderr.decode() == "slash32: domain 'web1': address in use é\n"


@pytest.mark.parametrize("operation", NEVER)
def test_hostd_may_not_refuse(hook: Installed, operation: str) -> None:
    hook.daemon(refusing(b"no"))
    done = hook.run(operation, domain())
    assert (done.returncode, done.stderr) == (0, b"slash32: no\n")


@pytest.mark.parametrize("operation", ["restore", "attach", "", "PREPARE"])
def test_other_operations_do_nothing(hook: Installed, operation: str) -> None:
    daemon = hook.daemon(refusing(b"no"))
    done = hook.run(operation, domain("tap0"))
    assert (done.returncode, done.stderr, daemon.got) == (0, b"", [])


def test_no_arguments(hook: Installed) -> None:
    assert subprocess.run([str(hook.script("qemu"))], env=ENV, timeout=60, check=False).returncode == 0


def test_large_xml_arrives_whole(hook: Installed) -> None:
    daemon = hook.daemon()
    xml = domain() + b" " * (4 << 20)
    assert hook.run("prepare", xml).returncode == 0
    assert daemon.got[0].partition(b"\0")[2] == xml


def test_down_the_guest_starts_isolated(hook: Installed) -> None:
    done = hook.run("prepare", domain())
    assert done.returncode == 0
    assert b"isolated" in done.stderr and b"'web1'" in done.stderr


def test_stale_socket(hook: Installed) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(hook.socket))
    assert hook.run("prepare", domain()).returncode == 0
    assert b"outside" in hook.run("prepare", domain("tap0")).stderr


@pytest.mark.parametrize("reply", [hangs, lambda connection: None], ids=["silent", "closes"])
@pytest.mark.parametrize(("operation", "code"), [("prepare", 1), ("reconnect", 0)])
def test_silent_is_down(hook: Installed, reply: Callable[[socket.socket], None], operation: str, code: int) -> None:
    hook.daemon(reply)
    done = hook.run(operation, domain("tap0"))
    assert done.returncode == code
    assert (b"outside" in done.stderr) == bool(code)


def test_daemon_that_never_reads(hook: Installed) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hook.socket))
        listener.listen()
        done = hook.run("start", domain() + b" " * (8 << 20))
    assert done.returncode == 0 and b"no answer within" in done.stderr


@pytest.mark.parametrize("operation", MAY_REFUSE)
def test_down_refuses_what_escapes_the_guard(hook: Installed, operation: str) -> None:
    done = hook.run(operation, domain("tap0"))
    assert done.returncode == 1
    assert b"'tap0' lies outside the guard's prefixes (vnet)" in done.stderr


@pytest.mark.parametrize("operation", NEVER)
def test_down_never_refuses_these(hook: Installed, operation: str) -> None:
    done = hook.run(operation, domain("tap0"))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "xml", [domain("vnet7"), domain("tap0", tag=False), domain("br7", kind="bridge"), domain(), b"", b"<not xml"]
)
def test_down_refuses_nothing_else(hook: Installed, xml: bytes) -> None:
    assert hook.run("prepare", xml).returncode == 0


def test_guard_prefixes_are_read(hook: Installed) -> None:
    (hook.root / "hostd.toml").write_text('guard_prefixes = ["vnet", "tap"]\n')
    assert hook.run("prepare", domain("tap0")).returncode == 0
    assert b"(vnet, tap)" in hook.run("prepare", domain("eth0")).stderr


def test_operator_says_refuse_when_down(hook: Installed) -> None:
    (hook.root / "hostd.toml").write_text('on_hostd_down = "refuse"\n')
    done = hook.run("prepare", domain())
    assert done.returncode == 1 and b"start slash32-hostd" in done.stderr
    assert hook.run("prepare", domain(tag=False)).returncode == 0
    assert hook.run("reconnect", domain()).returncode == 0


@pytest.mark.parametrize(
    "text",
    ["", "=", "\xff", "guard_prefixes = 7", "guard_prefixes = []", "guard_prefixes = ['', 3]", "on_hostd_down = 1"],
)
def test_a_configuration_that_hostd_would_not_take_counts_as_empty(hook: Installed, text: str) -> None:
    (hook.root / "hostd.toml").write_text(text, "latin-1")
    assert b"(vnet)" in hook.run("prepare", domain("tap0")).stderr
    assert hook.run("prepare", domain()).returncode == 0


def test_removed_package_lets_everything_pass(hook: Installed) -> None:
    assert hook.run("prepare", domain("tap0")).returncode == 1
    (hook.code / "hooks/alone.py").unlink()
    (hook.code / "hooks").rmdir()
    done = hook.run("prepare", domain("tap0"))
    assert (done.returncode, done.stderr) == (0, b"")


def test_broken_package_fails_closed_but_not_at_reconnect(hook: Installed) -> None:
    (hook.code / "hooks/alone.py").write_text("1/0\n")
    done = hook.run("prepare", domain())
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr
    assert hook.run("prepare", domain(tag=False)).returncode == 0
    assert hook.run("reconnect", domain()).returncode == 0


def test_stderr_closed(hook: Installed) -> None:
    command = f"exec {hook.script('qemu')} web1 reconnect begin - 2>&-"
    hook.daemon(refusing(b"no"))
    assert subprocess.run(["/bin/sh", "-c", command], input=domain(), timeout=60, check=False).returncode == 0


def test_a_stdin_that_never_ends(hook: Installed) -> None:
    """The deadline covers reading, too."""
    for operation in ("reconnect", "prepare"):
        argv = [str(hook.script("qemu")), "web1", operation, "begin", "-"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, env=ENV, stderr=subprocess.DEVNULL) as child:
            assert child.stdin is not None
            child.stdin.write(b"<domain>")
            child.stdin.flush()
            assert child.wait(60) == 0


def test_imports_next_to_nothing() -> None:
    text = (REPO / "hooks/hook.py").read_text()
    imports = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    assert imports == {"sys", "posix", "_signal", "_socket"}
    assert text.startswith("#!/usr/bin/python3 -ISE\n")
    loaded = "import sys; print({'posix', '_signal'} <= set(sys.modules), '_socket' in sys.builtin_module_names)"
    out = subprocess.run(["/usr/bin/python3", "-ISE", "-c", loaded], capture_output=True, text=True, check=True)
    assert out.stdout.split()[0] == "True"


BOMB = '<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "xml",
    [
        domain(head=BOMB),
        domain(head='<!DOCTYPE d SYSTEM "file:///etc/passwd">'),
        domain()[:-3],
        domain() + b"<x/>",
        domain().replace(b"<devices>", b"<a>" * 100_000),
        b"urn:slash32:domain:1\0\0",
        b"urn:slash32:domain:1" + b"x" * (17 << 20),
        domain().decode().encode("utf-16") + b"urn:slash32:domain:1",
    ],
    ids=["bomb", "doctype", "cut", "two-roots", "deep", "nul", "huge", "utf-16"],
)
def test_alone_refuses_xml_that_libvirt_never_writes(xml: bytes) -> None:
    assert alone.judge(domain(), "down", "prepare")[0] == 0
    code, message = alone.judge(xml, "down", "prepare")
    assert code == 1 and "cannot be read" in message and len(message) < 500


def test_alone_reads_the_tag_only_where_it_counts() -> None:
    nested = b'<domain><metadata><o><s:endpoint xmlns:s="urn:slash32:domain:1"/></o></metadata></domain>'
    assert alone.judge(nested, "down", "migrate") == (0, "slash32-hostd does not answer, but this guest has no tag")


def test_alone_quotes_hostile_names() -> None:
    evil = "a\n\u202e" + "x" * 5000
    _, message = alone.judge(domain("tap0").replace(b"web1", evil.encode()), "down", "prepare")
    assert "\n" not in message and "\u202e" not in message and len(message) < 1000


def test_a_guest_that_migrates_stays_where_its_network_is(hook: Installed) -> None:
    """Elsewhere hostd answers; a guest that starts has no such place."""
    done = hook.run("migrate", domain())
    assert done.returncode == 1 and b"cannot come to this host: slash32-hostd does not answer" in done.stderr
    assert hook.run("migrate", domain(tag=False)).returncode == 0
    assert hook.run("prepare", domain()).returncode == 0
