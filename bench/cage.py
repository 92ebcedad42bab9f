# Owns: where a benchmark with many processes runs: fresh network, mount and process namespaces, whose end, however it
# comes, is the end of every process and link in them. Also: what processes cost. Touches: a folder in /tmp.
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

_NEWNS, _NEWPID, _NEWNET = 0x20000, 0x20000000, 0x40000000
_MS_REC_PRIVATE = 0x44000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class CageError(Exception):
    """One line."""


def checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def caged(inside: Callable[[Path], Any]) -> Any:
    """What `inside` returns (anything that JSON can say), from the first process of a cage; it gets a folder on disk
    of its own. Raises CageError where it failed."""
    with tempfile.TemporaryDirectory(prefix="slash32-bench-", ignore_cleanup_errors=True) as folder:
        said = Path(folder, "said")
        home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        checked(_libc.unshare(_NEWPID))  # of children: this process stays where it is
        child = os.fork()
        if child == 0:
            os._exit(_first(inside, said, Path(folder)))
        checked(_libc.setns(home, _NEWPID))
        os.close(home)
        before = [(n, signal.signal(n, lambda *_: os.kill(child, signal.SIGKILL))) for n in (2, 15)]
        try:
            _, status = os.waitpid(child, 0)
        finally:
            for number, handler in before:
                signal.signal(number, handler)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            raise KeyboardInterrupt
        if code:
            raise CageError("it failed, see above")
        return json.loads(said.read_text())


def _first(inside: Callable[[Path], Any], said: Path, folder: Path) -> int:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to hear
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which children would inherit
    try:
        checked(_libc.unshare(_NEWNS | _NEWNET))
        mount(b"none", b"/", None, _MS_REC_PRIVATE)
        mount(b"proc", b"/proc", b"proc")
        mount(b"sysfs", b"/sys", b"sysfs")
        said.write_text(json.dumps(inside(folder)))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int = 0) -> None:
    checked(_libc.mount(source, target, kind, flags, None))


class Network:
    """A network namespace, entered with `with`; the cage's own is where one comes back to."""

    def __init__(self) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        checked(_libc.unshare(_NEWNET))
        self.fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        checked(_libc.setns(self._home, _NEWNET))

    def __enter__(self) -> Network:
        checked(_libc.setns(self.fd, _NEWNET))
        return self

    def __exit__(self, *_: object) -> None:
        checked(_libc.setns(self._home, _NEWNET))

    def start(self, argv: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """A process that lives there, with a /sys that shows it."""

        def enter() -> None:
            checked(_libc.setns(self.fd, _NEWNET))
            checked(_libc.unshare(_NEWNS))
            mount(b"sysfs", b"/sys", b"sysfs")

        with log.open("ab") as out:
            return subprocess.Popen(argv, env=environment, stdout=out, stderr=out, preexec_fn=enter)  # noqa: PLW1509  # one thread


def ip(lines: Iterable[str]) -> None:
    """`ip` command lines in the namespace that is entered now."""
    text = "\n".join(lines) + "\n"
    done = subprocess.run(["ip", "-batch", "-"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CageError(f"ip: {done.stderr.strip().splitlines()[0]}")


# -- what processes cost ----------------------------------------------------------------------------------------------


def cpu(pids: Iterable[int]) -> float:
    """Seconds of processor time so far, of all their threads."""
    spent = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                spent += int((task / "schedstat").read_bytes().split()[0])
    return spent / 1e9


def memory(pids: Iterable[int]) -> tuple[float, float]:
    """Bytes resident, and the processes' share of them (PSS)."""
    rss = pss = 0
    for pid in pids:
        found = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        rss += int(found["Rss"].split()[0])
        pss += int(found["Pss"].split()[0])
    return rss * 1024.0, pss * 1024.0
