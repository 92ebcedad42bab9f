# Owns: `--wait`: following a revision until every host has it in its kernel, has failed, or time is up.
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from slash32.errors import printable

from .client import Client, Json
from .text import count, duration, names

POLL = 10.0  # seconds one request may hang; the dispatcher answers earlier when there is progress


@dataclass(frozen=True, slots=True)
class Outcome:
    lines: list[str]
    ok: bool


def follow(client: Client, revision: int, timeout: float, show: Callable[[str], None] | None = None) -> Outcome:
    """`show` gets the state whenever it changes (a terminal's progress line)."""
    started = time.monotonic()
    last: Json = {}
    while True:
        left = timeout - (time.monotonic() - started)
        asked = time.monotonic()
        wait = max(0.0, min(POLL, left))
        state = client.get("revisions", str(revision), wait=wait, query=f"wait={wait:.3f}")
        if state.get("done") or left <= 0:
            return outcome(state, timeout)
        if show and state != last:
            show(progress(state))
        if state == last and time.monotonic() - asked < 0.1:
            time.sleep(0.1)  # a dispatcher that answers at once with no news is not asked in a tight loop
        last = state


def progress(state: Json) -> str:
    waiting = [str(name) for name in state.get("pending", [])]
    behind = f", waiting for {names(waiting, 4)}" if waiting else ""
    return f"{_live(state)}{behind}"


def _live(state: Json) -> str:
    hosts = int(state.get("hosts") or 0)
    return f"revision {state.get('revision')} live on {state.get('live', 0)} of {count(hosts, 'host')}"


def outcome(state: Json, timeout: float) -> Outcome:
    failed: dict[str, str] = state.get("failed") or {}
    pending = [str(name) for name in state.get("pending") or []]
    live = _live(state)
    if state.get("done") and not failed and not pending:
        return Outcome([f"{live} in {duration(state.get('milliseconds') or 0.0)}"], True)
    lines = [f"{live} after {timeout:g} s; still waiting for {names(pending)}" if pending else live]
    lines += [f"host {printable(name)} failed: {printable(str(why))}" for name, why in sorted(failed.items())]
    return Outcome(lines, False)


def terminal_progress() -> Callable[[str], None] | None:
    """One line on stderr, rewritten in place; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show
