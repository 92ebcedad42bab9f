"""Processes that the lab started: who they are (pid and start time, so that a reused pid is never taken for ours), how
they end, and their cgroups. Ends nothing but what it is handed; removes no cgroup outside our own subtree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.paths import LabError

CGROUP = Path("/sys/fs/cgroup")
V1 = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")


class CommandError(LabError):
    """A command that failed inside the lab; .result has all of it."""

    def __init__(self, where: str, result: subprocess.CompletedProcess[str]) -> None:
        said = (result.stderr or "").strip() or (result.stdout or "").strip()
        super().__init__(f"{where}: {' '.join(map(str, result.args))} -> {result.returncode}: {said[-800:]}")
        self.result = result


@dataclass(frozen=True)
class Process:
    """A process by pid and start time."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, _started(pid) or 0)

    def alive(self) -> bool:
        return _started(self.pid) == self.started != 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait_gone(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True


class Started(subprocess.Popen[str]):
    """A command in a session of its own; signals reach all of it, also what nsenter forked."""

    def __init__(self, argv: Sequence[str], stdin: int | None, env: dict[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        super().__init__(argv, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.killpg(self.pid, sig)


def _started(pid: int) -> int | None:
    """The start time of PID in ticks; None for none, and for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """A signal that would interrupt the body is handled when it is done. (Only the main thread is interrupted.)"""
    late: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if here else ()
    handlers = {number: signal.signal(number, lambda number, frame: late.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if late:
            signal.raise_signal(late[0])


def run(
    argv: list[str],
    where: str,
    *,
    check: bool = True,
    input: str | None = None,
    timeout: float = 60,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ARGV; on a timeout end its whole process group, across pid namespaces, and say so."""
    pipe = subprocess.PIPE
    stdin = subprocess.DEVNULL if input is None else pipe
    process = subprocess.Popen(
        argv, stdin=stdin, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env, start_new_session=True
    )
    try:
        out, err = process.communicate(input, timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise LabError(f"{where}: {' '.join(argv)} took longer than {timeout:g} s") from None
        raise
    result = subprocess.CompletedProcess(argv, process.returncode, out, err)
    if check and process.returncode:
        raise CommandError(where, result)
    return result


def cgroups(name: str) -> tuple[list[str], list[str]]:
    """The cgroup folders for node NAME, one in each hierarchy, and the v1 controllers to show it (none: cgroup2)."""
    if (CGROUP / "cgroup.controllers").exists():
        return [str(CGROUP / name)], []
    controllers = [each for each in V1 if (CGROUP / each).is_dir()]
    hierarchies = [*controllers, "systemd", *(["unified"] if (CGROUP / "unified").is_dir() else [])]
    if not (CGROUP / "systemd").is_dir():
        raise LabError(f"{CGROUP} has neither cgroup2 nor name=systemd: mount one, then run again")
    return [str(CGROUP / hierarchy / name) for hierarchy in hierarchies], controllers


def kill_members(folders: list[str]) -> None:
    """End every process in our cgroup folders: all of them came from our node."""
    for folder in folders:
        for members in Path(folder).glob("**/cgroup.procs"):
            with contextlib.suppress(OSError):
                for pid in members.read_text().split():
                    if pid != "0":
                        Process.of(int(pid)).kill()


def remove_cgroups(folders: list[str], seconds: float = 5) -> None:
    """Remove our (now empty) cgroup folders; the last processes may take some ms to leave them."""
    until = time.monotonic() + seconds
    for folder in folders:
        while Path(folder).is_dir():
            for below, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    Path(below).rmdir()
            if Path(folder).is_dir():
                if time.monotonic() > until:
                    raise LabError(f"cgroup {folder} does not empty: see its cgroup.procs")
                time.sleep(0.01)
