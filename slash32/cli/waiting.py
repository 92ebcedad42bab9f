# Owns: `--wait`: following a revision until every host has it in its kernel, has failed, or time is up.
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from slash32.errors import printable

from .client import CallError, Client, Json
from .text import age, count, duration, names

POLL = 10.0  # seconds one request may hang; the dispatcher answers earlier when there is progress
AWAY = 10.0  # seconds that the dispatcher may be gone: it is restarted in less
STUCK = 5.0  # seconds without progress after which hosts that report failures are not waited for any longer


@dataclass(frozen=True, slots=True)
class Outcome:
    lines: list[str]
    ok: bool


def follow(client: Client, revision: int, timeout: float, show: Callable[[str], None] | None = None) -> Outcome:
    """`show` gets the state whenever it changes (a terminal's progress line)."""
    started = time.monotonic()
    last: Json = {}
    moved = started
    while True:
        asked = time.monotonic()
        left = timeout - (asked - started)
        wait = max(0.0, min(STUCK if failures(last) else POLL, left))
        state = _ask(client, revision, wait, min(AWAY, max(0.0, left)))
        now = time.monotonic()
        if _settled(state) != _settled(last):
            moved = now
            if show:
                show(progress(state))
        elif now - asked < 0.1:
            time.sleep(0.1)  # a dispatcher that answers at once with no news is not asked in a tight loop
        stuck = now - moved >= STUCK and set(state.get("pending") or ()) <= {host for host, _ in failures(state)}
        if state.get("done") or left <= 0 or stuck:
            return outcome(state, now - started)
        last = state


def _ask(client: Client, revision: int, wait: float, patience: float) -> Json:
    """A dispatcher that is restarted meanwhile is waited for; its store knows the revision."""
    end = time.monotonic() + patience
    while True:
        try:
            return client.get("revisions", str(revision), wait=wait, query=f"wait={wait:.3f}")
        except CallError as error:
            if error.status or time.monotonic() >= end:
                raise CallError([f"{line}; revision {revision} stands" for line in error.lines], error.status) from None
            time.sleep(0.1)


def _settled(state: Json) -> tuple[object, ...]:
    """What counts as news; the clock does not."""
    return state.get("live"), state.get("pending"), failures(state)


def failures(state: Json) -> list[tuple[str, str]]:
    """(host, what is wrong there), of every host."""
    found = state.get("failed") or ()
    return [(str(f.get("host")), f"{f.get('object')}: {f.get('message')}") for f in found]


def progress(state: Json) -> str:
    waiting = [str(name) for name in state.get("pending", [])]
    behind = f", waiting for {names(waiting, 4)}" if waiting else ""
    failed = failures(state)
    behind += f" (failing: {names([host for host, _ in failed], 4)})" if failed else ""
    return f"{_live(state)}{behind}"


def _live(state: Json) -> str:
    hosts = int(state.get("hosts") or 0)
    return f"revision {state.get('revision')} live on {state.get('live', 0)} of {count(hosts, 'host')}"


def outcome(state: Json, seconds: float) -> Outcome:
    failed = failures(state)
    pending = [_behind(str(name), state) for name in state.get("pending") or ()]
    live = _live(state)
    if state.get("done") and not failed and not pending:
        took = state.get("milliseconds")  # None: too long ago, or before the dispatcher was restarted
        return Outcome([live if took is None else f"{live} in {duration(took)}{_percentiles(state)}"], True)
    lines = [f"{live} after {seconds:.0f} s; missing: {names(pending, 1000)}" if pending else live]
    lines += [printable(f"host {name} failed: {why}") for name, why in failed]
    return Outcome(lines, False)


def _percentiles(state: Json) -> str:
    """Of the hosts' times, where there is more than one."""
    p50, p99 = state.get("p50"), state.get("p99")
    if not isinstance(p50, int | float) or not isinstance(p99, int | float) or int(state.get("hosts") or 0) < 2:
        return ""
    return f" (p50 {duration(p50)}, p99 {duration(p99)})"


def _behind(name: str, state: Json) -> str:
    """`h2 (not connected, 61 s behind)`"""
    lagging: Json = next((item for item in state.get("lagging") or () if item.get("host") == name), {})
    away = not lagging["connected"] if "connected" in lagging else name in (state.get("disconnected") or ())
    seconds = lagging.get("seconds")
    about = ["not connected"] * away + ([f"{age(seconds)} behind"] if isinstance(seconds, int | float) else [])
    return f"{name} ({', '.join(about)})" if about else name


def terminal_progress() -> Callable[[str], None] | None:
    """One line on stderr, rewritten in place; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show
