"""slash32 on a rack: its .debs, keys, configuration and Host resources, as an operator would put them there by hand.

Owns /etc/slash32 and /root/slash32 of the nodes it is given. Shared by the demo and the system tests.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lab.matrix import at_once
from lab.node import Node
from lab.paths import LabError
from lab.process import CommandError
from lab.rack import Rack

REPO = Path(__file__).resolve().parent.parent
PORT = 5532
FOLDER = "/root/slash32"  # of a node: what is handed to commands there
URIS = {"qemu": "qemu:///system", "lxc": "lxc:///"}


@dataclass(frozen=True)
class Debs:
    """The product's packages, as files of this machine."""

    common: Path
    hostd: Path
    dispatcher: Path

    @property
    def on_hosts(self) -> list[Path]:
        return [self.common, self.hostd]

    @property
    def on_dispatchers(self) -> list[Path]:
        return [self.common, self.dispatcher]

    @property
    def version(self) -> str:
        return self.common.name.split("_")[1]


def debs() -> Debs:
    """The .debs of this checkout, built unless they are up to date."""
    built = subprocess.run([str(REPO / "packaging/deb/build")], capture_output=True, text=True, check=False)
    if built.returncode:
        said = (built.stderr.strip() or built.stdout.strip()).splitlines()[-1:]
        raise LabError(f"packaging/deb/build failed: {' '.join(said)} (run it to see all)")
    paths = [Path(line) for line in built.stdout.splitlines() if line.endswith(".deb")]
    found = {path.name.split("_")[0]: path for path in paths}
    try:
        return Debs(*(found[f"slash32-{name}"] for name in ("common", "hostd", "dispatcher")))
    except KeyError as missing:
        raise LabError(f"packaging/deb/build made no {missing.args[0]}") from None


def new_rack(
    name: str, hosts: int = 2, *, tied: bool = True, suite: str = "bookworm", legacy: Collection[str] = ()
) -> Rack:
    """A rack (not up yet) whose nodes have the packages installed, in cached layers."""
    files = debs()
    layers = {"host_debs": files.on_hosts, "dispatcher_debs": files.on_dispatchers}
    return Rack(name, hosts, True, suite=suite, legacy=legacy, tied=tied, **layers)


def deploy(rack: Rack, seconds: float = 30) -> None:
    """Keys, configuration, Host resources; returns when every host is in sync with the dispatcher."""
    dispatcher = dispatcher_of(rack)
    *keys, dispatcher_key = at_once(public_key, [*rack.hosts, dispatcher])

    def configure(node: Node) -> None:
        node.write("/etc/slash32/hostd.toml", host_config(node, dispatcher, dispatcher_key))
        restart(node, "slash32-hostd")

    def admit(node: Node) -> None:
        restart(node, "slash32-dispatcher")
        hosts = [host_resource(host, key) for host, key in zip(rack.hosts, keys, strict=True)]
        apply(rack, "---\n".join(json.dumps(each) + "\n" for each in hosts), wait=False)

    at_once(lambda pair: pair[0](pair[1]), [(admit, dispatcher), *((configure, host) for host in rack.hosts)])
    wait_in_sync(rack, seconds=seconds)


def restart(node: Node, unit: str) -> None:
    """systemctl restart, returning when the service is ready."""
    if node.run(["systemctl", "restart", unit], check=False).returncode:
        raise LabError(f"{node.name}: {unit} does not start; {journal_tail(node, unit)}")


def dispatcher_of(rack: Rack) -> Node:
    return rack.node("d1")


def public_key(node: Node) -> str:
    """The node's CURVE public key (made now if it has none)."""
    program = "slash32-dispatcher" if node.name.startswith("d") else "slash32-hostd"
    key = node.run([program, "key"]).stdout.strip()
    if len(key) != 40:
        raise LabError(f"{node.name}: '{program} key' printed no public key of 40 characters: {key[:200]!r}")
    return key


def host_config(node: Node, dispatcher: Node, key: str) -> str:
    """The text of hostd.toml. (A key in Z85 has no quote and no backslash.)"""
    return (
        f'host = "{node.name}"\n'
        f'addresses = ["{node.address}", "{node.address6}"]\n'
        f'dispatcher = "tcp://{dispatcher.address}:{PORT}"\n'
        f'dispatcher_key = "{key}"\n'
    )


def host_resource(node: Node, key: str) -> dict[str, Any]:
    spec = {"publicKey": key, "addresses": [node.address, node.address6]}
    return {"apiVersion": "slash32/v1", "kind": "Host", "metadata": {"name": node.name}, "spec": spec}


def apply(rack: Rack, what: Path | str, wait: bool = True) -> str:
    """`slash32 apply` on the dispatcher, of a file of this machine or of a text; what it printed."""
    text, name = (what.read_text(), what.name) if isinstance(what, Path) else (what, "applied.yaml")
    node = dispatcher_of(rack)
    node.write(f"{FOLDER}/{name}", text)
    return cli(rack, "apply", "-f", f"{FOLDER}/{name}", *(["--wait"] if wait else []))


def cli(rack: Rack, *words: str) -> str:
    """The operators' command on the dispatcher; CommandError if it fails."""
    return dispatcher_of(rack).run(["slash32", *words]).stdout


def host_status(node: Node) -> dict[str, Any]:
    """What hostd says of itself (LabError if it does not answer)."""
    said = node.run(["slash32-hostd", "status", "-o", "json"]).stdout
    try:
        status: dict[str, Any] = json.loads(said)
    except ValueError:
        raise LabError(f"{node.name}: slash32-hostd status printed no JSON: {said[:200]!r}") from None
    return status


def wait_in_sync(rack: Rack, nodes: Sequence[Node] | None = None, seconds: float = 20) -> None:
    """Wait until these hosts (all) hold everything the dispatcher has for them."""

    def one(node: Node) -> str | None:
        return poll(lambda: sync_problem(node), seconds)

    hosts = list(rack.hosts if nodes is None else nodes)
    late = {host: problem for host, problem in zip(hosts, at_once(one, hosts), strict=True) if problem}
    if late:
        names = ", ".join(f"{host.name} ({problem})" for host, problem in late.items())
        raise LabError(f"not in sync after {seconds:g} s: {names}; {journal_tail(next(iter(late)))}")


def sync_problem(node: Node) -> str | None:
    """Why the host is not in sync, None if it is."""
    try:
        status = host_status(node)
    except CommandError as error:
        return f"hostd does not answer: {(error.result.stderr or error.result.stdout).strip()[-200:]}"
    if not status["connected"]:
        return "no connection to the dispatcher"
    return None if status["in_sync"] else "connected, but not in sync"


def wait_connected(node: Node, *domains: str, seconds: float = 15) -> None:
    """Wait until hostd says that these guests' endpoints are open."""
    problem = poll(lambda: connection_problem(node, domains), seconds)
    if problem:
        raise LabError(f"{node.name}: not connected after {seconds:g} s: {problem}; {journal_tail(node)}")


def connection_problem(node: Node, domains: Sequence[str]) -> str | None:
    """Why these guests are not connected, None if they all are."""
    try:
        endpoints = host_status(node)["endpoints"]
    except CommandError as error:
        return f"hostd does not answer: {(error.result.stderr or error.result.stdout).strip()[-200:]}"
    known = {each["domain"]: each for each in endpoints}
    for name in domains:
        if name not in known:
            return f"hostd does not know {name}"
        if not known[name]["connected"]:
            return f"{name} is {known[name]['phase']}: {known[name].get('problem') or 'no problem named'}"
    return None


def poll(problem: Callable[[], str | None], seconds: float) -> str | None:
    """Ask until PROBLEM says None, or the time is over: then the last problem."""
    until = time.monotonic() + seconds
    while said := problem():
        if time.monotonic() > until:
            return said
        time.sleep(0.05)
    return None


def journal_tail(node: Node, unit: str = "slash32-hostd", lines: int = 6) -> str:
    """The end of a unit's journal, as one line."""
    text = node.run(["journalctl", "--no-pager", "-o", "cat", "-n", str(lines), "-u", unit], check=False).stdout
    return f"its journal ends: {' | '.join(text.split(chr(10))).strip(' |')[-600:] or '(empty)'}"


def driver_of(xml: str) -> str:
    """qemu or lxc."""
    return "lxc" if ElementTree.fromstring(xml).get("type") == "lxc" else "qemu"


def virsh(node: Node, driver: str, *words: str, timeout: float = 60) -> str:
    return node.run(["virsh", "-q", "-c", URIS[driver], *words], timeout=timeout).stdout


def define(node: Node, xml: str) -> str:
    """virsh define; the guest's name."""
    name = ElementTree.fromstring(xml).findtext("name") or "?"
    node.write(f"{FOLDER}/{name}.xml", xml)
    virsh(node, driver_of(xml), "define", f"{FOLDER}/{name}.xml")
    return name


def start(node: Node, xml: str) -> str:
    """virsh define and virsh start; the guest's name."""
    name = define(node, xml)
    try:
        virsh(node, driver_of(xml), "start", name)
    except CommandError as error:
        if "/sys/fs/cgroup/" not in str(error):
            raise
        virsh(node, driver_of(xml), "start", name)  # the nodes share this machine's cgroups: another's end, just then
    return name
