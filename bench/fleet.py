# Owns: slash32 as a fleet in a cage (bench.cage): one dispatcher with its durable store and CURVE, and a hostd for each
# host, in a network namespace of its own with real taps and the kernel really programmed. Only libvirt is missing: what
# it would say comes through hostd's hook socket, and where a start is measured from the hook program.
from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.api import PATIENCE, Api, document, until
from bench.cage import CageError, Network, ip
from bench.hook import DEVICE, install, spawn
from bench.rig import make_tap

REPO = Path(__file__).resolve().parents[1]
RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {room}.__main__ import main; sys.exit(main())"
SWITCH, PORT = "10.99.0.1", 5532
GROUPS = 10
AT_ONCE = 8  # hosts whose first guests start
STRIDE = 1009  # between guests that join a group


def _daemon(room: str, config: Path) -> list[str]:
    """As the package runs it: Debian's interpreter and libraries, this tree's code."""
    return ["/usr/bin/python3", "-I", "-c", RUN.format(room=room), str(REPO), "--config", str(config), "run"]


class Dispatcher:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._log, config = folder / "log", folder / "dispatcher.toml"
        config.write_text(
            f'listen = "tcp://{SWITCH}:{PORT}"\ndatabase = "{folder}/d.db"\nsocket = "{folder}/api.sock"\n'
            f'key_file = "{folder}/d.key"\n'
        )
        argv = _daemon("dispatcher", config)
        self.key = subprocess.run([*argv[:-1], "key"], capture_output=True, text=True, check=True).stdout.strip()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        self._api = Api(folder / "api.sock")
        until((folder / "api.sock").exists, self._why)

    def _why(self) -> str:
        return f"the dispatcher does not start: {self._log.read_text().strip()[-300:]}"

    def apply(self, *documents: dict[str, Any]) -> int:
        return int(self._api.call("POST", "/v1/apply", {"documents": documents})["revision"])

    def revision(self) -> int:
        return int(self._api.call("GET", "/v1/status")["revision"])

    def live(self, revision: int) -> None:
        """Returns when every host's kernel has it, and said so; it may be the one that is next."""
        status, said = self._api.ask("GET", f"/v1/revisions/{revision}?wait={PATIENCE:.0f}")
        if status != 200 or said["pending"] or said["failed"]:
            raise CageError(f"revision {revision}: {said}")

    def change(self, *documents: dict[str, Any]) -> None:
        """Returns when every host's kernel has it, and said so."""
        path = f"/v1/apply?wait={PATIENCE:.0f}"
        said = self._api.call("POST", path, {"documents": documents})["progress"]
        if said["pending"] or said["failed"]:
            raise CageError(f"{said}")


class Host:
    """A hypervisor, wired to the switch."""

    def __init__(self, number: int, folder: Path, dispatcher: Dispatcher) -> None:
        self.name, self.address = f"h{number + 1}", f"10.99.{1 + (number >> 7)}.{1 + (number & 127)}"
        self.folder = folder / self.name
        (self.folder / "run").mkdir(parents=True)
        self.network = Network()
        self._config = self.folder / "hostd.toml"
        self._config.write_text(
            f'host = "{self.name}"\naddresses = ["{self.address}"]\ndispatcher = "tcp://{SWITCH}:{PORT}"\n'
            f'dispatcher_key = "{dispatcher.key}"\nlibvirt = ["test:///default"]\n'
            f'state_dir = "{self.folder}/state"\nrun_dir = "{self.folder}/run"\n'
        )
        self.socket = self.folder / "run/hook.sock"
        self._argv = _daemon("hostd", self._config)
        where = f"/proc/{os.getpid()}/fd/{self.network.fd}"
        ip([f"link add p{number} type veth peer name eth0 netns {where}", f"link set p{number} master br0 up"])
        with self.network:
            ip(["link set lo up", f"addr add {self.address}/16 dev eth0", "link set eth0 up"])
        self.hook = install(self.folder / "run")
        self.process: subprocess.Popen[bytes]

    def resource(self) -> dict[str, Any]:
        key = subprocess.run([*self._argv[:-1], "key"], capture_output=True, text=True, check=True).stdout.strip()
        return document("Host", self.name, publicKey=key, addresses=[self.address])

    def start(self) -> None:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self.process = self.network.start(self._argv, self.folder / "log", environment)

    def wait(self) -> None:
        until(self.socket.exists, self._why)

    def _why(self) -> str:
        return f"{self.name}: hostd does not start: {(self.folder / 'log').read_text().strip()[-300:]}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)

    def taps(self, numbers: Iterable[int]) -> None:
        with self.network:
            names = [f"vnet{number}" for number in numbers]
            for name in names:
                make_tap(name)
            ip(f"link set {name} up" for name in names)

    def tell(self, guest: Guest, operation: str, suboperation: str = "begin") -> None:
        """What the hook program would."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(PATIENCE)
            s.connect(str(self.socket))
            s.sendall("\1".join(["1", "qemu", guest.name, operation, suboperation]).encode() + b"\0" + guest.xml)
            s.shutdown(socket.SHUT_WR)
            answer = s.recv(4096)
        if answer != b"\0":
            raise CageError(f"{self.name}: {guest.name} {operation}: {answer[1:].decode() or 'no answer'}")


class Guest:
    """One NIC with one IPv4 address, as its OVN counterpart has, and 5 kB of XML, as libvirt would hand it over."""

    def __init__(self, number: int, labels: Sequence[str], folder: Path) -> None:
        self.number, self.name = number, f"guest{number}"
        mac = f"52:54:{number >> 24 & 255:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        words = "".join(f'<slash32:label key="{key}" value="yes"/>' for key in labels)
        tag = f"{words}<slash32:interface><slash32:address>{address(number)}"
        nic = f"<interface type='ethernet'><mac address='{mac}'/><target dev='vnet{number}'/></interface>"
        self.xml = f"""<domain type='qemu'><name>{self.name}</name>
<uuid>00000000-0000-4000-8000-{number:012x}</uuid><metadata>
<slash32:endpoint xmlns:slash32="urn:slash32:domain:1">{tag}</slash32:address></slash32:interface></slash32:endpoint>
</metadata><devices>{nic}{DEVICE * 45}</devices></domain>""".encode()
        self.file = folder / "new.xml"


def address(number: int) -> str:
    return f"10.{64 + (number >> 14)}.{number >> 7 & 127}.{1 + (number & 127)}"


class Fleet:
    """`hosts` with `guests` each, in ten groups by turns; `spare` guests may come. A group's policy admits what is in
    the group, a network set on port 443, and anybody on port 22; the rest is dropped."""

    name = "slash32"

    def __init__(self, folder: Path, hosts: int, guests: int, spare: int) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a tap is a descriptor
        self._folder, self._each, self._settled = folder, guests, hosts * guests
        ip(["link set lo up", "link add br0 type bridge", "link set br0 up", f"addr add {SWITCH}/16 dev br0"])
        self.dispatcher = Dispatcher(folder / "d1")
        self.hosts = [Host(number, folder, self.dispatcher) for number in range(hosts)]
        self.dispatcher.apply(*(host.resource() for host in self.hosts))
        for number, host in enumerate(self.hosts):
            host.taps(range(number * guests, (number + 1) * guests))
            host.taps(range(self._settled + number, self._settled + spare, hosts))
            host.start()
        for host in self.hosts:
            host.wait()
        self._policies()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._fill, range(hosts)))
        self.dispatcher.live(self.dispatcher.revision())
        self._late = [number for number in range(self._settled) if number % GROUPS]
        self._last = (self._settled - 1) % GROUPS  # a group of which the last host has a guest

    def _policies(self) -> None:
        def allow(port: int | None, source: str | None) -> dict[str, Any]:
            rule: dict[str, Any] = {"action": "Allow"}
            if source is not None:
                rule["source"] = {"selector": source}
            if port is not None:
                rule |= {"protocol": "TCP", "destination": {"ports": [port]}}
            return rule

        for group in range(GROUPS):
            ingress = [allow(None, f"has(g{group})"), allow(443, f"has(outside{group})"), allow(22, None)]
            spec = {"selector": f"has(g{group})", "types": ["Ingress", "Egress"], "ingress": ingress}
            policy = document("GlobalNetworkPolicy", f"group{group}", **spec, egress=[{"action": "Allow"}])
            self.dispatcher.apply(policy, self._outside(group, 49))

    @staticmethod
    def _outside(group: int, count: int) -> dict[str, Any]:
        found = document("GlobalNetworkSet", f"outside{group}", nets=[f"10.200.{group}.{n}/32" for n in range(count)])
        found["metadata"]["labels"] = {f"outside{group}": "yes"}
        return found

    def _guest(self, number: int) -> Guest:
        return Guest(number, [f"g{number % GROUPS}"], self._folder)

    def _host(self, number: int) -> Host:
        new = number - self._settled
        return self.hosts[number // self._each if new < 0 else new % len(self.hosts)]

    def _fill(self, host: int) -> None:
        for number in range(host * self._each, (host + 1) * self._each):
            self._start(self._guest(number))

    def _start(self, guest: Guest) -> None:
        for operation in ("prepare", "start"):
            self._host(guest.number).tell(guest, operation)

    # -- what is measured: each turn once, from 0 on; what came stays --------------------------------------------------

    def join(self, turn: int) -> Callable[[], None]:
        """What is to be measured: a running guest of another group is tagged as one of group 0, too."""
        number = self._late[turn * STRIDE % len(self._late)]
        guest = Guest(number, ["g0", f"g{number % GROUPS}"], self._folder)
        before = self.dispatcher.revision()

        def run() -> None:
            self._host(number).tell(guest, "started")  # as libvirt's event would
            self.dispatcher.live(before + 1)

        return run

    def element(self, turn: int) -> Callable[[], None]:
        return lambda: self.dispatcher.change(self._outside(0, 50 + turn))

    def new(self, turn: int) -> Callable[[], None]:
        """What is to be measured: libvirt runs the hook before a guest has its tap and once it has; when the second
        returns the guest is live here, and its group's hosts have told that it is in their sets."""
        guest, before = self._guest(self._settled + turn), self.dispatcher.revision()
        guest.file.write_bytes(guest.xml)
        host = self._host(guest.number)

        def run() -> None:
            for operation in ("prepare", "start"):
                spawn([str(host.hook), guest.name, operation, "begin", "-"], guest.file)
            self.dispatcher.live(before + 1)

        return run

    def stop_agent(self) -> None:
        """The last host's; the fleet changes while it is away."""
        self.hosts[-1].stop()
        self.dispatcher.apply(self._outside(self._last, 50))

    def start_agent(self) -> None:
        """Returns when it has all that it missed."""
        self.hosts[-1].start()
        self.dispatcher.live(self.dispatcher.revision())

    def agent_started(self) -> None:
        self.dispatcher.change(self._outside(self._last, 49))

    # -- what it costs -------------------------------------------------------------------------------------------------

    def agents(self) -> list[list[int]]:
        """The processes of each host."""
        return [[host.process.pid] for host in self.hosts]

    def centre(self) -> list[int]:
        return [self.dispatcher.process.pid]
