# Owns: network namespaces for tests: make, enter, leave. The thread that runs the test moves; subprocesses follow it.
from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Namespace:
    """A fresh network namespace with lo up; gone when closed and empty."""

    def __init__(self) -> None:
        with _current() as here:
            _checked(_libc.unshare(_CLONE_NEWNET))
            try:
                self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                self.ip("link set lo up")
            finally:
                _checked(_libc.setns(here, _CLONE_NEWNET))

    @property
    def path(self) -> str:
        """For `ip link set DEV netns PATH`."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[Namespace]:
        with _current() as here:
            _checked(_libc.setns(self._fd, _CLONE_NEWNET))
            try:
                yield self
            finally:
                _checked(_libc.setns(here, _CLONE_NEWNET))

    def close(self) -> None:
        os.close(self._fd)

    @staticmethod
    def ip(command: str) -> str:
        """`ip` in the namespace that is entered now."""
        return run("ip", *command.split())


@contextlib.contextmanager
def _current() -> Iterator[int]:
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield here
    finally:
        os.close(here)


def run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout


def eventually(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Polls; a deadline is a failure, never a measurement."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
