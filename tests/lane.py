# Owns: one lane of `make test`: pytest in a process of its own, which tells what happens on the descriptor that it is
# given, a line of JSON each. What pytest itself prints goes where the process's output goes.
from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest


class Teller:
    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # or what a test leaves running would keep it open
        self._out = os.fdopen(descriptor, "w", buffering=1)

    def _tell(self, what: str, **more: Any) -> None:
        self._out.write(json.dumps({"what": what, **more}) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._tell("total", count=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell("begins", name=nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell("done", name=nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._failed(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed(report)

    def _failed(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            when = getattr(report, "when", "collect")
            texts = [report.longreprtext, *(f"--- {title}\n{text}" for title, text in report.sections if text.strip())]
            self._tell("failed", name=report.nodeid, when=when, text="\n".join(texts))


def main(descriptor: str, *arguments: str) -> int:
    # Whoever is started in the background has this signal ignored; here it is how the lane is told to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # as `python -m pytest` does, not this folder
    return int(pytest.main(list(arguments), plugins=[Teller(int(descriptor))]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
