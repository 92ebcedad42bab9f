# Owns: the fixtures of the kernel tests. Nothing here touches the machine's own network namespace.
from __future__ import annotations

import os
from collections.abc import Iterator

import filters
import pytest
from netns import Namespace
from nft_rig import Rig
from nft_samples import GUARD

from hostd.dataplane.nft import NftTable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid():
        for item in items:
            if "/tests/kernel/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="kernel tests need root"))


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """The test runs inside a fresh network namespace."""
    namespace = Namespace()
    try:
        with namespace.entered():
            yield namespace
    finally:
        namespace.close()


@pytest.fixture
def peer() -> Iterator[Namespace]:
    """A second fresh namespace, not entered."""
    namespace = Namespace()
    try:
        yield namespace
    finally:
        namespace.close()


@pytest.fixture
def table(netns: Namespace) -> Iterator[NftTable]:
    """Of nf_tables, with nothing but the skeleton."""
    made = NftTable(GUARD)
    made.load()
    yield made
    made.close()


@pytest.fixture
def rig(netns: Namespace, peer: Namespace) -> Iterator[Rig]:
    """A host and the others, with nf_tables."""
    made = Rig(peer)
    yield made
    made.close()


@pytest.fixture(params=filters.KINDS)
def packet_filter(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once for each of the two; what filters.py makes is of this kind meanwhile."""
    filters.chosen = request.param
    yield request.param
    filters.chosen = filters.NFTABLES
