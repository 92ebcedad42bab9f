# Owns: the fixtures of the tests of several dispatchers: three members of etcd for all tests of a module, three
# dispatchers of a store of their own for each. They borrow the rigs of the contract tests.
from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CONTRACT = Path(__file__).resolve().parents[1] / "contract"
sys.path[:0] = [str(CONTRACT)] if str(CONTRACT) not in sys.path else []

from etcd_rig import Etcd  # noqa: E402
from trio import Trio  # noqa: E402

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd"), members=3)
    try:
        yield etcd.start()
    finally:
        etcd.stop()


@pytest.fixture
def trio(cluster: Etcd, tmp_path: Path) -> Iterator[Trio]:
    """Whatever a test does to the members is undone after it."""
    trio = Trio(cluster, tmp_path, f"/t{next(_NUMBERS)}/")
    try:
        yield trio
    finally:
        trio.end()
        for member in cluster.members:
            if member.runs:
                member.resume()
            else:
                member.start()
        cluster.join()
        cluster.until_healthy()
