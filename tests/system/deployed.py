# Owns: what the system tests ask of the one deployed rack (fixture `site`, conftest.py): guests with known names and
# addresses, policies, and that all of it is gone when a scope ends. Touches the rack through lab only.
from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import access, domains, matrix, product
from lab.node import Node
from lab.process import CommandError
from lab.rack import Rack

FULL = os.environ.get("SLASH32_COUNTS") == "full"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Guest:
    """A domain of the lab. Nothing runs before Site.start."""

    node: Node
    name: str
    driver: str
    role: str
    mac: str
    address4: str
    address6: str
    xml: str

    def run(self, *argv: str, input: str | None = None, timeout: float = 30, check: bool = True) -> str:
        """A command inside the guest; its output."""
        return access.guest_run(self.node, self.name, argv, input=input, timeout=timeout, check=check)

    def virsh(self, *words: str, timeout: float = 60) -> str:
        """virsh of the guest's driver on its host."""
        return product.virsh(self.node, self.driver, *words, timeout=timeout)

    def status(self) -> dict[str, Any] | None:
        """What hostd says of it, None if hostd does not know it."""
        found = [each for each in product.host_status(self.node)["endpoints"] if each["domain"] == self.name]
        return found[0] if found else None

    @property
    def tap(self) -> str:
        """The name of its tap (or veth) now, also when hostd is dead or the guest has no tag."""
        return self.virsh("domiflist", self.name).split()[0]

    @property
    def running(self) -> bool:
        return self.name in self.virsh("list", "--name").split()

    def probe(self, *others: Guest, ms: int = 1000) -> dict[tuple[str, str], bool]:
        """{(address, "icmp" | "80" | "5432"): does it answer within MS} for both addresses of each of the others."""
        addresses = [address for other in others for address in (other.address4, other.address6)]
        return access.probe(self.node, self.name, addresses, "-t", str(ms))

    def reaches(self, other: Guest, what: str = "icmp", ms: int = 300) -> bool:
        """By v4 and by v6: both, or (asked by both, AssertionError if they differ) none."""
        said = {address: yes for (address, service), yes in self.probe(other, ms=ms).items() if service == what}
        assert len(said) == 2 and len(set(said.values())) == 1, f"{self.name} to {other.name} {what}: {said}"
        return all(said.values())


@dataclass
class Site:
    """The deployed rack: hosts h1 and h2, dispatcher d1."""

    rack: Rack
    _number: int = 0
    _guests: list[Guest] = field(default_factory=list)
    _resources: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def h1(self) -> Node:
        return self.rack.node("h1")

    @property
    def h2(self) -> Node:
        return self.rack.node("h2")

    @property
    def d1(self) -> Node:
        return self.rack.node("d1")

    def guest(
        self, node: Node, role: str, driver: str = "lxc", *, like: Guest | None = None, name: str = "", **options: Any
    ) -> Guest:
        """A guest with a name and addresses of its own (or the MAC and addresses of another, LIKE it), tagged with
        role=ROLE. OPTIONS go to lab.domains (tag, target, extra, words, uuid, labels, profiles, mac, addr4, addr6)."""
        self._number += 1
        n = self._number
        mac = options.pop("mac", like.mac if like else f"52:54:00:66:{n >> 8:02x}:{n & 255:02x}")
        four = options.pop("addr4", like.address4 if like else f"10.65.{4 + n // 250}.{1 + n % 250}")
        six = options.pop("addr6", like.address6 if like else f"fd00:65::4:{n:x}")
        options["labels"] = {"role": role, **options.get("labels", {})}
        name = name or f"{role}-{n}"
        make = {"lxc": domains.lxc_domain, "qemu": domains.qemu_domain}[driver]
        xml = make(name, mac=mac, addr4=four, addr6=six, **options)
        return Guest(node, name, driver, role, mac, four, six, xml)

    def start(self, *guests: Guest, connected: bool = True, seconds: float = 40) -> None:
        """virsh define and start, all at once; returns when they are up and (unless CONNECTED is False) open."""
        self._guests += guests

        def one(guest: Guest) -> None:
            product.start(guest.node, guest.xml)
            if connected:
                product.wait_connected(guest.node, guest.name, seconds=seconds)
            access.wait_guest(guest.node, guest.name, seconds)

        matrix.at_once(one, guests)

    def keep(self, *guests: Guest) -> None:
        """To be removed when the scope ends, for guests that a test defines and starts by itself."""
        self._guests += guests

    def stop(self, *guests: Guest) -> None:
        """virsh destroy and undefine; what does not run or does not exist is fine."""

        def one(guest: Guest) -> None:
            for words in (["destroy", guest.name], ["undefine", guest.name]):
                argv = ["virsh", "-q", "-c", product.URIS[guest.driver], *words]
                done = guest.node.run(argv, check=False)
                fine = ("failed to get domain", "not running", "Domain not found")
                if done.returncode and not any(text in done.stderr for text in fine):
                    raise CommandError(guest.node.name, done)

        matrix.at_once(one, dict.fromkeys(guests))
        self._guests = [guest for guest in self._guests if guest not in guests]

    def apply(self, what: Path | str, wait: bool = True) -> str:
        """slash32 apply (a file or a text), live on every host when this returns; deleted when the scope ends."""
        for each in yaml.safe_load_all(what.read_text() if isinstance(what, Path) else what):
            if each:
                self._resources[each["kind"], each["metadata"]["name"]] = each["apiVersion"]
        return product.apply(self.rack, what, wait)

    def delete(self, *resources: tuple[str, str]) -> None:
        """slash32 delete of (kind, name)s, live on every host when this returns."""
        for kind, name in resources:
            product.cli(self.rack, "delete", kind, name)
            self._resources.pop((kind, name), None)
        self.settled()

    def settled(self, seconds: float = 30) -> None:
        """Wait until every host has in its kernel what the dispatcher has for it."""

        def behind() -> str | None:
            said = json.loads(product.cli(self.rack, "status", "-o", "json"))
            late = [h for h in said["hosts"] if not h["in_sync"] or h["revision"] != said["revision"]]
            return str(late) if late else None

        problem = product.poll(behind, seconds)
        assert problem is None, problem

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is started and applied inside is removed at the end, also on failure."""
        guests, resources = list(self._guests), set(self._resources)
        try:
            yield
        finally:
            self.stop(*(guest for guest in self._guests if guest not in guests))
            self.delete(*(each for each in reversed(self._resources) if each not in resources))


def alive(guests: Sequence[Guest]) -> list[str]:
    return [guest.name for guest in guests if guest.running]
