# Fixtures of the contract's tests: clusters of etcd and what follows them, ended with the test.
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etcd_rig import Etcd, Replica, Tls

from dispatcher.store.etcd.store import EtcdConfig


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Callable[..., Etcd]]:
    made: list[Etcd] = []

    def make(members: int = 1, tls: Tls | None = None, options: tuple[str, ...] = ()) -> Etcd:
        made.append(Etcd(tmp_path / f"etcd{len(made)}", members, tls, options))
        return made[-1].start()

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def replica() -> Iterator[Callable[[EtcdConfig], Replica]]:
    made: list[Replica] = []

    def make(config: EtcdConfig) -> Replica:
        made.append(Replica(config))
        return made[-1]

    yield make
    for one in made:
        one.store.close()
