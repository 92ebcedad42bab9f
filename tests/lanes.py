# Owns: `make test`: all tests in two lanes side by side, one with the racks and the kernel, one with all the rest. Each
# is a pytest (lane.py) in a session of its own with its log in build/; here is said how far they are and what failed.
# Other arguments go to both: `python tests/lanes.py -k word`. Ctrl-C or TERM ends both and what they started.
from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
RACKS = ["system", "kernel"]
NOTHING_CHOSEN = 5  # pytest's exit code
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDING = 90.0  # seconds that the fixtures have to take down what they built
SLOW = 30.0  # seconds after which a test is named
WAKE = 0.5

Event = dict[str, Any]


class Lane:
    """`events` can be read when lines of lane.py are there, or the end."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        self.done, self.total = 0, 0
        self.test, self.since = "", time.monotonic()
        self.failures: list[tuple[str, str]] = []
        self._rest = b""
        self.events, theirs = os.pipe()
        argv = [sys.executable, str(TESTS / "lane.py"), str(theirs), "-v", "--color=no", *arguments]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[theirs], start_new_session=True
            )
        os.close(theirs)

    def read(self) -> list[Event] | None:
        """What has happened since; None: it has ended."""
        data = os.read(self.events, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def take(self, event: Event) -> str:
        """What there is to say about it."""
        what, name = event["what"], event.get("name", "")
        if what == "total":
            self.total = event["count"]
            return f"{self.total} tests; log: {shown(self.log)}"
        if what == "failed":
            title = name if event["when"] == "call" else f"{name} ({event['when']})"
            self.failures.append((title, event["text"]))
            return f"FAILED {title}"
        self.test, self.since = (name if what == "begins" else ""), time.monotonic()
        self.done += what == "done"
        return ""

    def state(self) -> str:
        if self.process.returncode is not None:
            return f"{self.name} ended"
        taking = time.monotonic() - self.since
        slow = f", {taking:.0f} s in {self.test}" if self.test and taking > SLOW else ""
        failed = f", {len(self.failures)} FAILED" if self.failures else ""
        return f"{self.name} {self.done}/{self.total or '?'}{failed}{slow}"

    def finish(self) -> int:
        """Once it has ended: its exit code. What it left running is ended."""
        code = self.process.wait()
        os.close(self.events)
        for pid in session_of(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if code not in (0, 1, NOTHING_CHOSEN) and not self.failures:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            at = f" at {self.test}" if self.test else ""
            self.failures.append((f"{self.name}: pytest ended with {code}{at}", tail))
        return code


class Lanes:
    """Runs them all. `period`: seconds between two lines about how far they are."""

    def __init__(self, lanes: Mapping[str, Sequence[str]], logs: Path, period: float) -> None:
        self.began, self.said, self.period = time.monotonic(), time.monotonic(), period
        self.stopped: float | None = None
        self.bells = 0
        logs.mkdir(parents=True, exist_ok=True)
        for stop in STOPS:
            signal.signal(stop, self._stop)
        self.lanes = [Lane(name, arguments, logs / f"{name}.log") for name, arguments in lanes.items()]

    def _stop(self, *_: object) -> None:
        self.bells += 1

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        # A terminal that is gone (SIGHUP) must not keep the lanes from being ended.
        with contextlib.suppress(OSError):
            print(f"{minutes:3}:{seconds:02}  {text}", flush=True)

    def run(self) -> int:
        codes: dict[str, int] = {}
        with selectors.DefaultSelector() as selector:
            for lane in self.lanes:
                selector.register(lane.events, selectors.EVENT_READ, lane)
            while selector.get_map():
                # Before reading: who has ended and is silent has said all, even if a child of it holds the pipe.
                ended = {lane.name for lane in self.lanes if lane.process.poll() is not None}
                ready = {key.data for key, _ in selector.select(WAKE)}
                for lane in (key.data for key in list(selector.get_map().values())):
                    if not self._told(lane) if lane in ready else lane.name in ended:
                        selector.unregister(lane.events)
                        codes[lane.name] = lane.finish()
                        self.say(f"{lane.name}: ended; {lane.done} of {lane.total}, {len(lane.failures)} failed")
                self._minute()
                self._stopping()
        return 130 if self.bells else self._verdict(codes)

    def _told(self, lane: Lane) -> bool:
        events = lane.read()
        for event in events or ():
            if text := lane.take(event):
                self.say(f"{lane.name}: {text}")
        return events is not None

    def _minute(self) -> None:
        if time.monotonic() - self.said >= self.period:
            self.said = time.monotonic()
            self.say(" | ".join(lane.state() for lane in self.lanes))

    def _stopping(self) -> None:
        """The first bell: SIGINT to pytest alone, whose fixtures then end what they began. The second, or the time that
        they have is over: no mercy."""
        if self.bells and self.stopped is None:
            self.stopped = time.monotonic()
            self.say(f"stopping: the tests clean up (up to {ENDING:.0f} s; once more: at once)")
            for lane in self._running():
                lane.process.send_signal(signal.SIGINT)
        elif self.stopped is not None and (self.bells > 1 or time.monotonic() - self.stopped > ENDING):
            for lane in self._running():
                lane.process.kill()

    def _running(self) -> Iterator[Lane]:
        return (lane for lane in self.lanes if lane.process.poll() is None)

    def _verdict(self, codes: Mapping[str, int]) -> int:
        for lane in self.lanes:
            for title, text in lane.failures:
                print(f"\n{'=' * 20} {title}\n{text}", flush=True)
        failures = [(lane, title) for lane in self.lanes for title, _ in lane.failures]
        print()
        for lane, title in failures:
            print(f"FAILED {title}   (all of it in {shown(lane.log)})")
        good = not failures and set(codes.values()) <= {0, NOTHING_CHOSEN}
        if good and 0 not in codes.values():
            self.say("no test was chosen")
            return 1
        done = sum(lane.done for lane in self.lanes)
        self.say(f"{done} tests, {len(failures)} failed{'' if good or failures else ', but not all is well'}")
        return 0 if good else 1


def session_of(leader: int) -> list[int]:
    """The processes of a session whose leader has ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
    return found


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def rooms() -> dict[str, list[str]]:
    """Each room of tests, in one lane."""
    found = sorted({path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")})
    rest = [name for name in found if name not in RACKS]
    return {"racks": [f"tests/{name}" for name in RACKS], "rest": [f"tests/{name}" for name in rest]}


def main(arguments: Sequence[str]) -> int:
    os.chdir(REPO)
    options = ["--durations=30", *arguments]
    lanes = {name: [*folders, *options] for name, folders in rooms().items()}
    return Lanes(lanes, REPO / "build", period=10 if sys.stdout.isatty() else 30).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
