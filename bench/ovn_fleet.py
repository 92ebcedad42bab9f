# Owns: Debian's OVN as a fleet in a cage (bench.cage), the peer of bench.fleet: one central and as many chassis, each
# with its own ovsdb-server, ovs-vswitchd and ovn-controller, run dirs of their own, loopback between them. Its data
# path is OVS's dummy: OVN's time is without any kernel, ours is with it.
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.api import until
from bench.cage import CageError, ip
from bench.fleet import GROUPS, STRIDE, address

NEEDS = {"ovn-controller": "ovn-host", "ovn-northd": "ovn-central", "ovs-vswitchd": "openvswitch-switch"}
SB_PORT = 6642
SYNC, SYNCS = 30, 12  # seconds until a mass convergence that hangs is asked for again, and how often
PATIENCE = 120.0


def missing() -> str:
    """What to do where OVN is not installed; "" where it is."""
    packages = " ".join(sorted(package for program, package in NEEDS.items() if shutil.which(program) is None))
    how = "apt-get install --no-install-recommends ovn-central ovn-host openvswitch-switch"
    return packages and f"{packages}: not installed; {how} (then stop the services they start: the bench needs none)"


class Appctl:
    """A daemon's control socket, spoken to directly: no process is spawned for a command."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def run(self, *arguments: str, seconds: float = PATIENCE) -> str:
        """Raises TimeoutError where nothing is heard for so long."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(self._path))
        self._socket.settimeout(seconds)
        self._socket.sendall(json.dumps({"method": "run", "params": arguments, "id": 0}).encode())
        data = b""
        try:
            while True:
                data += self._socket.recv(1 << 20) or self._gone()
                try:
                    answer = json.loads(data)
                    break
                except ValueError:
                    continue  # it has not all come
        except TimeoutError:
            self._socket.close()
            self._socket = None
            raise
        if answer["error"] is not None:
            raise CageError(f"ovn-nbctl {' '.join(arguments)[:200]}: {answer['error']}")
        return str(answer["result"])

    def _gone(self) -> bytes:
        raise CageError(f"{self._path}: closed")


def _command(argv: Sequence[str], environment: dict[str, str] | None = None, check: bool = True) -> str:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE)
    if check and done.returncode:
        raise CageError(f"{' '.join(argv)[:200]}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


class Chassis:
    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder / f"ch{number}"
        self.folder.mkdir(parents=True)
        names = ("OVN_RUNDIR", "OVS_RUNDIR", "OVN_LOGDIR", "OVS_LOGDIR", "OVN_DBDIR", "OVS_DBDIR")
        self.environment = {"PATH": os.environ["PATH"]} | {name: str(self.folder) for name in names}
        self.database = f"unix:{self.folder}/db.sock"
        _command(["ovsdb-tool", "create", f"{self.folder}/conf.db", "/usr/share/openvswitch/vswitch.ovsschema"])
        remote, control = f"--remote=p{self.database}", f"--unixctl={self.folder}"
        argv = ["ovsdb-server", f"{self.folder}/conf.db", remote, f"{control}/db.ctl", "-vconsole:off"]
        self.processes = [self.start(argv)]
        until((self.folder / "db.sock").exists, lambda: f"ovsdb-server of chassis {number} does not start")
        self.vsctl("--no-wait", "init", "--", "set", "open", ".", *self._settings(), "--", "add-br", "br-int")
        dummy = ["--enable-dummy=system", "--disable-system", f"{control}/vs.ctl", "-vconsole:off"]
        self.processes.append(self.start(["ovs-vswitchd", self.database, *dummy]))
        self.processes.append(self.controller())

    def _settings(self) -> list[str]:
        number = self.number
        outside = {
            "system-id": f"ch{number}",
            "ovn-remote": f"tcp:127.0.0.1:{SB_PORT}",
            "ovn-remote-probe-interval": "180000",
            "ovn-openflow-probe-interval": "180",
            "ovn-encap-type": "geneve",
            "ovn-encap-ip": f"192.168.{number >> 7}.{1 + (number & 127)}",
        }
        threads = ["other_config:n-handler-threads=1", "other_config:n-revalidator-threads=1"]
        return [*(f"external_ids:{key}={value}" for key, value in outside.items()), *threads]

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log)

    def controller(self) -> subprocess.Popen[bytes]:
        return self.start(["ovn-controller", self.database, "-vconsole:off"])

    def vsctl(self, *words: str) -> None:
        _command(["ovs-vsctl", f"--db={self.database}", *words], self.environment)

    def plug(self, numbers: Sequence[int]) -> None:
        words: list[str] = []
        for n in numbers:
            port = ["add-port", "br-int", f"v{n}", "--", "set", "interface", f"v{n}", f"external_ids:iface-id=p{n}"]
            words += [*(["--"] if words else []), *port]
        self.vsctl("--no-wait", *words)

    def unplug(self, number: int) -> None:
        self.vsctl("--no-wait", "del-port", "br-int", f"v{number}")


class Ovn:
    """`hosts` chassis with `guests` ports each, in ten port groups by turns, whose ACLs are bench.fleet's; `spare` more
    logical ports are made, to be bound later."""

    name = "OVN"

    def __init__(self, folder: Path, hosts: int, guests: int, spare: int) -> None:
        self._folder, self._total = folder / "ovn", hosts * guests
        self._folder.mkdir()
        ip(["link set lo up"])
        self._central = self._start_central()
        self.hosts = [Chassis(number, self._folder) for number in range(hosts)]
        until(lambda: self._count("sb", "chassis") >= hosts, lambda: "not all chassis registered")
        self.nb = self._nbctl_daemon()
        self._fill(spare)
        for chassis in self.hosts:
            chassis.plug(range(chassis.number * guests, (chassis.number + 1) * guests))
        self.sync()
        until(lambda: self._up() >= self._total, lambda: f"{self._up()} of {self._total} ports are up")
        self.sync()
        self._uuid = self._uuids()
        self._late = [number for number in range(self._total) if number % GROUPS]

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _start_central(self) -> list[subprocess.Popen[bytes]]:
        where, found = self._folder, []
        log = (where / "log").open("wb")
        for name in ("nb", "sb"):
            _command(["ovsdb-tool", "create", f"{where}/{name}.db", f"/usr/share/ovn/ovn-{name}.ovsschema"])
            remotes = [f"--remote=punix:{where}/{name}.sock"]
            remotes += [f"--remote=ptcp:{SB_PORT}:127.0.0.1"] if name == "sb" else []
            argv = ["ovsdb-server", f"{where}/{name}.db", *remotes, f"--unixctl={where}/{name}.ctl", "-vconsole:off"]
            found.append(subprocess.Popen(argv, stdout=log, stderr=log))
            until((where / f"{name}.sock").exists, lambda: "ovsdb-server does not start")
            self._ctl(name, "init")
        self._ctl("nb", "set", "nb_global", ".", "options:northd_probe_interval=180000")
        argv = ["ovn-northd", f"--ovnnb-db=unix:{where}/nb.sock", f"--ovnsb-db=unix:{where}/sb.sock"]
        found.append(subprocess.Popen([*argv, f"--unixctl={where}/n.ctl", "-vconsole:off"], stdout=log, stderr=log))
        return found

    def _ctl(self, which: str, *words: str, check: bool = True) -> str:
        return _command([f"ovn-{which}ctl", f"--db=unix:{self._folder}/{which}.sock", *words], check=check)

    def _count(self, which: str, table: str, *conditions: str) -> int:
        return len(self._ctl(which, "--bare", "--columns=_uuid", "find", table, *conditions, check=False).split())

    def _nbctl_daemon(self) -> Appctl:
        control = self._folder / "nbctl.ctl"
        options = [f"--db=unix:{self._folder}/nb.sock", f"--unixctl={control}", f"--pidfile={self._folder}/nbctl.pid"]
        log = [f"--log-file={self._folder}/nbctl.log"]
        subprocess.run(["ovn-nbctl", *options, *log, "--detach"], check=True, stdout=subprocess.DEVNULL)
        until(control.exists, lambda: "ovn-nbctl does not start")
        return Appctl(control)

    def _fill(self, spare: int) -> None:
        self.nb.run("ls-add", "s0")
        ports = [self._port(number) for number in range(self._total + spare)]
        for at in range(0, len(ports), 50):
            self.nb.run(*(word for port in ports[at : at + 50] for word in port))
        for group in range(GROUPS):
            members = [f"p{number}" for number in range(group, self._total, GROUPS)]
            self.nb.run("pg-add", f"pg{group}", *members)
            outside = ",".join(f"10.200.{group}.{number}" for number in range(49))
            self.nb.run("create", "address_set", f"name=as{group}", f"addresses={outside}")
            to = f"outport==@pg{group}"
            for priority, match, action in (
                (1001, f"{to} && ip4 && ip4.src==$pg{group}_ip4", "allow-related"),
                (1001, f"{to} && ip4 && ip4.src==$as{group} && tcp.dst==443", "allow-related"),
                (1001, f"{to} && ip4 && tcp.dst==22", "allow-related"),
                (1000, f"{to} && ip", "drop"),
            ):
                self.nb.run("acl-add", f"pg{group}", "to-lport", str(priority), match, action)
            self.nb.run("acl-add", f"pg{group}", "from-lport", "1001", f"inport==@pg{group} && ip4", "allow-related")

    @staticmethod
    def _port(number: int) -> list[str]:
        mac = f"52:54:{number >> 24 & 255:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        found = ["--", "lsp-add", "s0", f"p{number}"]
        for verb in ("lsp-set-addresses", "lsp-set-port-security"):
            found += ["--", verb, f"p{number}", f"{mac} {address(number)}"]
        return found

    def _up(self) -> int:
        return self._count("nb", "logical_switch_port", "up=true")

    def _uuids(self) -> dict[str, str]:
        said = self._ctl("nb", "--bare", "--columns=_uuid,name", "list", "logical_switch_port")
        return {words[1]: words[0] for words in (each.split() for each in said.split("\n\n")) if len(words) == 2}

    def sync(self) -> None:
        """By processes of its own, again and again: OVN's first mass convergence may hang; a new one recovers it."""
        for _ in range(SYNCS):
            argv = ["ovn-nbctl", f"--db=unix:{self._folder}/nb.sock", f"--timeout={SYNC}", "--wait=hv", "sync"]
            if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
                return
            print(f"bench.ovn: OVN's sync hung for {SYNC} s, asked again", file=sys.stderr, flush=True)
        raise CageError(f"OVN: no sync in {SYNCS} times {SYNC} s")

    # -- what is measured: each turn once, from 0 on; what came stays --------------------------------------------------

    def _hv(self, *words: str) -> None:
        self.nb.run("--wait=hv", *words)

    def _joins(self, turn: int) -> str:
        return self._uuid[f"p{self._late[turn * STRIDE % len(self._late)]}"]

    def join(self, turn: int) -> Callable[[], None]:
        return lambda: self._hv("add", "port_group", "pg0", "ports", self._joins(turn))

    def element(self, turn: int) -> Callable[[], None]:
        return lambda: self._hv("add", "address_set", "as0", "addresses", f"10.200.0.{49 + turn}")

    def new(self, turn: int) -> Callable[[], None]:
        """What is to be measured: a logical port that was made before joins a group and is bound on its chassis."""
        number, chassis = self._total + turn, self.hosts[turn % len(self.hosts)]

        def run() -> None:
            self.nb.run("add", "port_group", f"pg{number % GROUPS}", "ports", self._uuid[f"p{number}"])
            chassis.plug([number])
            self.nb.run("wait-until", "logical_switch_port", f"p{number}", "up=true")
            self._hv("sync")

        return run

    def stop_agent(self) -> None:
        """The last chassis' ovn-controller; the fleet changes while it is away."""
        controller = self.hosts[-1].processes.pop()
        controller.terminate()
        controller.wait(PATIENCE)
        self.nb.run("add", "address_set", "as0", "addresses", "10.201.0.1")

    def start_agent(self) -> None:
        """Returns when it has all that it missed."""
        self.hosts[-1].processes.append(self.hosts[-1].controller())
        self._hv("sync")

    def agent_started(self) -> None:
        self._hv("remove", "address_set", "as0", "addresses", "10.201.0.1")

    # -- what it costs -------------------------------------------------------------------------------------------------

    def agents(self) -> list[list[int]]:
        """The processes of each chassis."""
        return [[process.pid for process in chassis.processes] for chassis in self.hosts]

    def centre(self) -> list[int]:
        return [process.pid for process in self._central]
