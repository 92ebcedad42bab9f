# Owns: a load on a dispatcher of which the test keeps a journal: appliers whose resources belong together, hosts that
# claim and release; and what a store must have after any end, given that journal. Reads stores as a dispatcher does.
from __future__ import annotations

import http.client
import random
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dispatcher_rig import Dispatcher, FakeHost, Rack, document, guest

from dispatcher.store.commits import Holding, Saved, Table
from dispatcher.store.disk import Disk
from slash32.model import Endpoint, EndpointKey
from slash32.policy import NetworkSet, Policy, Profile

WEB = 'role == "web"'


def group(name: str, number: int) -> list[dict[str, Any]]:
    """Three resources that make sense together only."""
    source = {"selector": f'applier == "{name}" && n == "{number}"'}
    nets = document(
        "GlobalNetworkSet", name, nets=[f"10.{200 + number // 65536}.{number // 256 % 256}.{number % 256}/32"]
    )
    nets["metadata"]["labels"] = {"applier": name, "n": str(number)}
    return [
        document("GlobalNetworkPolicy", name, selector=WEB, ingress=[{"action": "Allow", "source": source}]),
        nets,
        document("Profile", name, labelsToApply={"n": str(number)}),
    ]


class Applier:
    """One after the other; only the last may be unanswered."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.dispatcher, self.name = dispatcher, name
        self.sent = self.acknowledged = self.revision = 0
        self.refused: list[tuple[int, Any]] = []
        self.lost = 0  # without an answer
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        """Until there is no answer."""
        while not self._stop.is_set():
            self.sent += 1
            try:
                status, body = self.dispatcher.call("POST", "/v1/apply", {"documents": group(self.name, self.sent)})
            except (OSError, ValueError, http.client.HTTPException):
                self.lost += 1
                return
            if status == 200:
                self.acknowledged, self.revision = self.sent, int(body["revision"])
            else:
                self.refused.append((status, body))
                self.sent = self.acknowledged  # "nothing was changed"

    def found(self, numbers: Iterable[str | None]) -> list[str]:
        """What is wrong with the numbers that its resources have in a store."""
        seen = set(numbers)
        if len(seen) != 1:
            return [f"{self.name}: half there: {seen}"]
        number = int(seen.pop() or 0)
        wrong = [] if self.acknowledged <= number <= self.sent else [
            f"{self.name}: {number}, acknowledged {self.acknowledged}, sent {self.sent}"
        ]  # fmt: skip
        self.sent = self.acknowledged = number
        return wrong


class Claimer:
    def __init__(self, host: FakeHost, first: int, noise: random.Random) -> None:
        self.host, self.noise = host, noise
        self.guests = [_guest(first + n) for n in range(30)]
        self.said: dict[EndpointKey, tuple[int | None, bool]] = {}  # the last word; None: it is known to be durable

    def step(self) -> None:
        one = self.noise.choice(self.guests)
        there = one.key in self.host.claims
        self.said[one.key] = self.host.release(one.key) if there else self.host.claim(one), not there

    def certain(self) -> dict[EndpointKey, bool]:
        return {key: there for key, (seq, there) in self.said.items() if seq is None or seq in self.host.answered}

    def settled(self) -> None:
        self.said = {one.key: (None, one.key in self.host.claims) for one in self.guests}


def _guest(number: int) -> Endpoint:
    return guest(number, "web", f"10.70.{number >> 8}.{number & 255}")


class Load:
    def __init__(self, rack: Rack, noise: random.Random, appliers: int = 3) -> None:
        self.rack, self.noise = rack, noise
        self.appliers = [Applier(rack.dispatcher, f"a{n}") for n in range(appliers)]
        self.claimers = [Claimer(host, 100 * n, noise) for n, host in enumerate(rack.hosts, 1)]
        self.last = 0  # revision that was there for certain

    @property
    def acknowledged(self) -> int:
        return sum(applier.acknowledged for applier in self.appliers)

    def wrong(self, saved: Saved) -> list[str]:
        """What a store that ended under this load should not look like."""
        resources = {key: record for (table, key), record in saved.records.items() if table is Table.RESOURCE}
        last = max(self.last, *(a.revision for a in self.appliers), *(h.replica.revision for h in self.rack.hosts))
        found = [] if saved.revision >= last else [f"revision {saved.revision}, but {last} was known"]
        for applier in self.appliers:
            found += applier.found(_numbers(resources, applier.name))
        held = {key: record.host for (_, key), record in saved.records.items() if isinstance(record, Holding)}
        for claimer in self.claimers:
            for key, there in claimer.certain().items():
                if (held.get(tuple(key)) == claimer.host.name) != there:
                    found.append(
                        f"{claimer.host.name}: {key}: granted {there}, but the store says {held.get(tuple(key))}"
                    )
        self.last = saved.revision
        return found

    def settle(self) -> None:
        """All hosts are in sync, with what they want and no more."""
        self.rack.until(lambda: all(host.in_sync for host in self.rack.hosts))
        self.rack.until(lambda: self._claims() == self._wanted())
        self.rack.settle()
        for claimer in self.claimers:
            assert claimer.host.refused == {}
            claimer.settled()
            claimer.host.answered.clear()

    def _claims(self) -> set[tuple[str, str]]:
        return {(e["host"], e["uuid"]) for e in self.rack.dispatcher.get("/v1/endpoints")["items"]}

    def _wanted(self) -> set[tuple[str, str]]:
        return {(c.host.name, key.uuid) for c in self.claimers for key in c.host.claims}


def _numbers(resources: dict[Any, Any], name: str) -> list[str | None]:
    nets, profile = resources.get(("GlobalNetworkSet", name)), resources.get(("Profile", name))
    policy = resources.get(("GlobalNetworkPolicy", name))
    assert isinstance(nets, NetworkSet | None) and isinstance(profile, Profile | None)
    assert isinstance(policy, Policy | None)
    said = None if policy is None else str(policy.ingress[0].source.selector).split('"')[3]
    return [nets and nets.labels["n"], profile and profile.labels["n"], said]


def left_behind(database: Path) -> Saved:
    """What a dispatcher would begin with; the files stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        for path in database.parent.glob(database.name + "*"):
            shutil.copy(path, folder)
        disk = Disk(Path(folder) / database.name)
        try:
            return disk.load()
        finally:
            disk.close()
