"""What the demo prints: steps, lines with the time since the start, matrices; and waiting that says what it waits for.

Owns standard output's form; touches nothing else.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lab import matrix
from lab.paths import STARTED

REMIND = 3.0  # seconds of silence after which a line says what is still being waited for


class Screen:
    def __init__(self) -> None:
        self.color = matrix.wants_color(sys.stdout.isatty())

    def line(self, text: str = "", style: str = "") -> None:
        print(f"    {time.monotonic() - STARTED:6.1f}s  {self.paint(text, style)}" if text else "", flush=True)

    def step(self, number: int, title: str) -> None:
        print(f"\n{self.paint(f'{number}. {title}', '1')}", flush=True)

    def block(self, lines: Sequence[str]) -> None:
        print("\n".join(f"             {line}".rstrip() for line in lines), flush=True)

    def good(self, text: str) -> None:
        self.line(text, "32")

    def bad(self, text: str) -> None:
        self.line(text, "1;31")

    def paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if style and self.color else text

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While the body runs, say every few seconds WHAT it waits for."""
        over = threading.Event()
        began = time.monotonic()

        def remind() -> None:
            while not over.wait(REMIND):
                self.line(f"... {what} ({time.monotonic() - began:.0f} s)", "2")

        thread = threading.Thread(target=remind, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
