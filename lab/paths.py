"""Where the lab keeps its files. Owns the layout of the work folder (SLASH32_LAB_DIR, else /var/tmp/slash32-lab),
its locks and its progress lines; touches nothing outside that folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTED = time.monotonic()


class LabError(Exception):
    """One clear line for the operator: what failed, on what, and what to do."""


def work() -> Path:
    """The lab's work folder, made on first use."""
    path = Path(os.environ.get("SLASH32_LAB_DIR", "/var/tmp/slash32-lab"))
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path


def cache() -> Path:
    """Built things, each named by the hash of what it was built from; safe to delete when no rack is up."""
    path = work() / "cache"
    path.mkdir(exist_ok=True)
    return path


def racks() -> Path:
    """One folder for each rack that is up (or died)."""
    path = work() / "racks"
    path.mkdir(exist_ok=True)
    return path


def digest(*parts: str | bytes) -> str:
    """A short content hash, used in the names of cached things."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()[:16]


def say(what: str) -> None:
    """One progress line on stderr, with the seconds since the start of this program."""
    print(f"lab {time.monotonic() - STARTED:6.1f}s  {what}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock NAME; says so when another process holds it. The kernel frees it when the holder dies."""
    descriptor = os.open(work() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab process that holds the lock '{name}'")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
