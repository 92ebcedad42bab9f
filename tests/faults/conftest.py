# Owns: the fixtures of the fault tests: real processes, with somebody in between. They borrow the rigs of the contract
# and kernel tests.
from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / room) for room in ("contract", "kernel") if str(TESTS / room) not in sys.path]

from dispatcher_rig import Rack  # noqa: E402
from netns import Namespace  # noqa: E402


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    rack = Rack(tmp_path)
    yield rack
    rack.end()


@pytest.fixture
def here() -> Iterator[Namespace]:
    """The test runs inside it."""
    namespace = Namespace()
    try:
        with namespace.entered():
            yield namespace
    finally:
        namespace.close()


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many descriptors as the machine allows, here and in what is started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
