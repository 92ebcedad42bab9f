"""A rack in one machine: hypervisors h1, h2, ... and dispatchers d1, ... as lab nodes, wired to a top-of-rack router.

Owns racks/NAME in the work folder and everything that is named after it: network namespaces s32-NAME-*, cgroups of the
same names, the nodes' processes. A rack that was killed half way is found by these and removed by the next up or down.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from lab import base, debs, guest, net
from lab.base import remove_tree
from lab.node import ENVIRONMENT, Node
from lab.paths import LabError, locked, racks, say
from lab.tor import Tor

NETNS = r"s32-([a-z0-9]{1,8})-(?:tor|[hd][0-9]+)"
DISPATCHER_INDEX, HOST_INDEX = (10, 9, 8, 7, 6), 11


class Rack:
    """hosts hypervisors (h1...) and dispatchers (d1...; True is one). With tied=True (what the context manager wants)
    the nodes lose power when this process dies, however it dies; tied=False leaves them for the next lab/rack command.
    host_debs and dispatcher_debs are installed into cached layers, so that the nodes boot with them. The hypervisors
    named in legacy have iptables-legacy as their iptables."""

    def __init__(
        self,
        name: str = "lab",
        hosts: int = 2,
        dispatcher: bool | int = False,
        *,
        suite: str = "bookworm",
        host_debs: Sequence[Path] = (),
        dispatcher_debs: Sequence[Path] = (),
        legacy: Collection[str] = (),
        tied: bool = True,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9]{1,8}", name):
            raise LabError(f"rack name {name!r}: want 1 to 8 of a-z and 0-9")
        if not 0 <= hosts <= 200 or not 0 <= int(dispatcher) <= len(DISPATCHER_INDEX):
            raise LabError(f"want 0 to 200 hosts and 0 to {len(DISPATCHER_INDEX)} dispatchers")
        self.name = name
        self.suite = suite
        self._counts = (hosts, int(dispatcher))
        self.folder = racks() / name
        self.tor = Tor(f"s32-{name}-tor", self.folder)
        self.legacy = frozenset(legacy)
        self._debs = {"h": list(host_debs), "d": list(dispatcher_debs)}
        self._life = os.pipe() if tied else None
        self._nodes: dict[str, Node] = {}

    @classmethod
    def attach(cls, name: str) -> Rack:
        """A rack that is up, started by another process."""
        try:
            state = json.loads((racks() / name / "rack.json").read_text())
        except (FileNotFoundError, ValueError):
            raise LabError(f"no rack '{name}' is up: run 'lab/rack up --name {name}'") from None
        kept = {"suite": state["suite"], "legacy": state["legacy"]}
        rack = cls(name, state["hosts"], state["dispatchers"], **kept, tied=False)
        rack._nodes = rack._make({kind: [Path(each) for each in state["layers"][kind]] for kind in "hd"})
        return rack

    @property
    def hosts(self) -> list[Node]:
        return [node for node in self._nodes.values() if node.name.startswith("h")]

    @property
    def nodes(self) -> list[Node]:
        return list(self._nodes.values())

    def node(self, name: str) -> Node:
        try:
            return self._nodes[name]
        except KeyError:
            there = " ".join(self._nodes) or "none: it is not up"
            raise LabError(f"rack {self.name} has no node '{name}' (it has {there})") from None

    def up(self, wait: bool = True) -> Rack:
        """Bring everything up; what an earlier rack of this name left is removed first."""
        with locked(f"rack-{self.name}"):
            self._purge()
            layers = self._layers()
            self.folder.mkdir(parents=True)
            state = {"hosts": self._counts[0], "dispatchers": self._counts[1], "suite": self.suite}
            state |= {"legacy": sorted(self.legacy)}
            state |= {"layers": {kind: [str(each) for each in layers[kind]] for kind in layers}}
            (self.folder / "rack.json").write_text(json.dumps(state))
            try:
                self._start(layers, wait)
            except BaseException:
                self._purge()
                raise
        return self

    def _start(self, layers: dict[str, list[Path]], wait: bool) -> None:
        net.make_tor(self.tor.netns)
        self._nodes = self._make(layers)
        names = "".join(f"{each.address} {each.name}\n{each.address6} {each.name}\n" for each in self.nodes)
        for node in self.nodes:
            node.prepare(f"127.0.0.1 localhost\n::1 localhost\n{names}", node.name in self.legacy)
            node.boot()
        if wait:
            self.each(self.nodes, lambda node: node.wait())
        (self.folder / "ready").touch()
        say(f"rack {self.name}: {' '.join(self._nodes)} {'up' if wait else 'booting'}")

    def down(self) -> None:
        """Cut the power and remove everything of this rack."""
        with locked(f"rack-{self.name}"):
            self._purge()
        self._nodes = {}

    def install(self, packages: Sequence[Path], nodes: Iterable[Node] | None = None) -> None:
        """apt-get install the .deb files on running nodes (all, unless told), in parallel, with no network."""

        def one(node: Node) -> None:
            paths = [f"/root/debs/{package.name}" for package in packages]
            for package, path in zip(packages, paths, strict=True):
                node.push(package, path)
            node.run([*debs.INSTALL.split(), *paths], timeout=180)

        self.each(self.nodes if nodes is None else nodes, one)

    def each(self, nodes: Iterable[Node], work: Callable[[Node], object]) -> None:
        """Do WORK on all NODES at once; the first failure is raised when all have ended."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            for future in [pool.submit(work, node) for node in nodes]:
                future.result()

    def __enter__(self) -> Rack:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _layers(self) -> dict[str, list[Path]]:
        lower = [guest.layer(), base.root(self.suite)]
        return {kind: [debs.layer(files, lower), *lower] if files else lower for kind, files in self._debs.items()}

    def _make(self, layers: dict[str, list[Path]]) -> dict[str, Node]:
        hosts, dispatchers = self._counts
        indexes = {f"d{number + 1}": DISPATCHER_INDEX[number] for number in range(dispatchers)}
        indexes |= {f"h{number + 1}": HOST_INDEX + number for number in range(hosts)}
        owner = self._life[0] if self._life else None
        return {
            name: Node(
                name,
                rack=self.name,
                index=index,
                folder=self.folder / "nodes" / name,
                layers=layers[name[0]],
                owner=owner,
            )
            for name, index in indexes.items()
        }

    def _purge(self) -> None:
        """Remove every trace of a rack of this name, whichever process made it and however far it came."""
        self.tor.stop()
        for folder in sorted((self.folder / "nodes").glob("*")):
            Node(folder.name, rack=self.name, index=0, folder=folder).down()
        for path in Path("/run/netns").glob(f"s32-{self.name}-*"):
            if re.fullmatch(NETNS, path.name):
                net.remove(path.name)
        if self.folder.exists():
            remove_tree(self.folder)


def names() -> list[str]:
    """All racks that are up, or that left something behind."""
    found = {path.name for path in racks().iterdir()}
    for path in Path("/run/netns").glob("s32-*"):
        if match := re.fullmatch(NETNS, path.name):
            found.add(match.group(1))
    return sorted(found)


def status(name: str) -> list[str]:
    """One line for each node of rack NAME: its name, address, pid and what systemd says."""
    lines = []
    for node in Rack.attach(name).nodes:
        said = node.run(["systemctl", "is-system-running"], check=False).stdout.strip() if node.running else "off"
        pid = node.pid if node.running else "-"
        lines.append(f"{node.name:4} {node.address:12} {node.address6:10} pid {pid:>7} {said}")
    return lines


def shell(node: Node, argv: Sequence[str]) -> int:
    """Run ARGV on NODE with the caller's own terminal; its exit status."""
    environment = {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")}
    return subprocess.run(node.enter(argv), env=environment, check=False).returncode
