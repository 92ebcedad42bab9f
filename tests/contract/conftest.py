# Fixtures of the contract's tests: dispatchers, racks of hosts, fleets with an operator, clusters of etcd and what
# follows them, ended with the test or, where tests only ask, with the module.
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_rig import Served
from cli_rig import PROFILE, Fleet
from dispatcher_rig import WEB, Dispatcher, FakeHost, Rack, guest, policy
from etcd_rig import Etcd, Replica, Tls

from dispatcher.store.etcd.store import EtcdConfig


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    rack = Rack(tmp_path)
    yield rack
    rack.end()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    """A dispatcher that tests only ask."""
    rack = Rack(tmp_path_factory.mktemp("one"))
    rack.dispatcher.start()
    yield rack
    rack.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("api"))
    served.start()
    yield served
    served.stop()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Dispatcher]:
    fresh = Dispatcher(tmp_path)
    yield fresh
    if fresh.process is not None:
        fresh.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("cli"))
    try:
        for n, host in enumerate(fleet.begin(3), 1):
            host.claim(guest(n, "web" if n < 3 else "db", profiles=("base",)))
        fleet.settle()
        fleet.dispatcher.apply(PROFILE, policy("standing", WEB, WEB))
        fleet.settle()
        yield fleet
    finally:
        fleet.end()


@pytest.fixture
def h3(fleet: Fleet) -> Iterator[FakeHost]:
    """A host that a test may spoil."""
    host = fleet.hosts[2]
    yield host
    host.failures, host.acknowledges = [], True
    host.restart()
    fleet.until(lambda: host.in_sync)
    fleet.settle()


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
