"""One lab node: a real Debian with systemd as PID 1, in namespaces, on a disk that is an overlay over the base.

Owns its folder (disk, console log, state), its cgroups and the process that is its power supply (lab/boot.py). Its
network namespace is given to it by the rack: a crash takes it away, as a power cut takes the kernel's state.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from lab import net
from lab.base import remove_tree
from lab.paths import LabError, digest
from lab.process import Process, Started, cgroups, kill_members, remove_cgroups, run, unbroken

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/guest/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}
BOOT = Path(__file__).with_name("boot.py")
LEGACY = [f"{name}tables{what}" for name in ("ip", "ip6") for what in ("", "-restore", "-save")]  # alternatives


class Node:
    """A node of a rack. Its methods that need it running say so when it is not."""

    def __init__(
        self, name: str, *, rack: str, index: int, folder: Path, layers: Sequence[Path] = (), owner: int | None = None
    ) -> None:
        self.name = name
        self.index = index
        self.folder = folder
        self.layers = list(layers)
        self.netns = f"s32-{rack}-{name}"
        self.tor = f"s32-{rack}-tor"
        self._owner = owner  # the read end of a pipe that closes when the owner dies
        self._cgroups, self._controllers = cgroups(self.netns)

    @property
    def address(self) -> str:
        return f"10.99.0.{self.index}"

    @property
    def address6(self) -> str:
        return f"fd99::{self.index}"

    @property
    def disk(self) -> Path:
        """The writable layer of its disk: files may be put here before the first boot."""
        return self.folder / "up"

    @property
    def pid(self) -> int:
        """PID 1 of the node, as this machine sees it."""
        return self._process("init").pid

    @property
    def running(self) -> bool:
        return self._recorded("init") is not None

    def prepare(self, hosts: str, legacy: bool = False) -> None:
        """Lay out the disk: host name, hosts file, machine id, libvirt's host uuid. LEGACY: its iptables is the old
        one, as after update-alternatives."""
        for part in ("up", "work", "root"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        identity = digest(self.netns) * 2
        libvirtd = next(layer / "etc/libvirt/libvirtd.conf" for layer in reversed(self.layers)).read_text()
        self._put("etc/hostname", f"{self.name}\n")
        self._put("etc/hosts", hosts)
        self._put("etc/resolv.conf", "")
        self._put("etc/machine-id", f"{identity}\n")
        self._put("etc/libvirt/libvirtd.conf", f'{libvirtd}\nhost_uuid = "{uuid.UUID(identity)}"\n')
        for name in LEGACY if legacy else ():
            link = self.disk / "etc/alternatives" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/usr/sbin/{name.replace('tables', 'tables-legacy')}")

    def _put(self, path: str, text: str) -> None:
        target = self.disk / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def boot(self) -> None:
        """Power on. Returns at once; wait() waits for systemd."""
        if self.running:
            raise LabError(f"{self.name} is already running")
        net.plug(self.netns, self.tor, self.name, self.index)
        spec = {
            "root": str(self.folder / "root"),
            "layers": [str(layer) for layer in self.layers],
            "upper": str(self.disk),
            "work": str(self.folder / "work"),
            "boot_id": str(self.folder / "boot_id"),
            "netns": f"/run/netns/{self.netns}",
            "cgroups": self._cgroups,
            "controllers": self._controllers,
            "owned": self._owner is not None,
        }
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec))
        stdin = subprocess.DEVNULL if self._owner is None else self._owner
        # an interrupt now would leave a boot that has not joined its cgroups yet, where crash() would find it
        with (self.folder / "console.log").open("ab") as console, unbroken():
            command = [sys.executable, "-I", "-S", str(BOOT), str(path)]
            starter = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=console, cwd="/")
            self._record(self._pids(starter))

    def _pids(self, starter: subprocess.Popen[bytes]) -> list[int]:
        """The pids of the power supply and of PID 1, as the power supply tells them."""
        assert starter.stdout is not None
        ready, _, _ = select.select([starter.stdout], [], [], 10)
        line = starter.stdout.readline() if ready else b""
        starter.wait()
        if not line:
            raise LabError(f"{self.name} did not power on: {self.console(3)}")
        return [int(word) for word in line.split()]

    def _record(self, pids: list[int]) -> None:
        pairs = {key: [pid, Process.of(pid).started] for key, pid in zip(("power", "init"), pids, strict=True)}
        temporary = self.folder / "state.tmp"
        temporary.write_text(json.dumps(pairs))
        temporary.rename(self.folder / "state.json")

    def _recorded(self, key: str) -> Process | None:
        try:
            pid, started = json.loads((self.folder / "state.json").read_text())[key]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        process = Process(pid, started)
        return process if process.alive() else None

    def _process(self, key: str) -> Process:
        process = self._recorded(key)
        if process is None:
            raise LabError(f"{self.name} is not running: {self.console(3)}")
        return process

    def wait(self, seconds: float = 60) -> str:
        """Wait until systemd has booted; 'running' or 'degraded'."""
        until = time.monotonic() + seconds
        while True:
            said = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
            if said in ("running", "degraded"):
                return said
            if time.monotonic() > until:
                raise LabError(f"{self.name} is '{said or 'not answering'}' after {seconds:g} s: {self.console(5)}")
            time.sleep(0.05)

    def crash(self) -> None:
        """A power cut: every process and, with the network namespace, the kernel state is gone; the disk stays."""
        for key in ("init", "power"):
            process = self._recorded(key)
            if process is not None:
                process.kill()
                if not process.wait_gone(10):
                    raise LabError(f"{self.name}: {key} (pid {process.pid}) does not die")
        kill_members(self._cgroups)  # of a boot whose pids were never recorded
        remove_cgroups(self._cgroups)
        net.unplug(self.netns, self.tor, self.name)

    def poweroff(self, seconds: float = 30) -> None:
        """An orderly shutdown (systemd stops every unit), then the same as crash()."""
        init = self._process("init")
        init.kill(signal.SIGRTMIN + 4)
        init.wait_gone(seconds)
        self.crash()

    def reboot(self, clean: bool = False, seconds: float = 60) -> str:
        """Off and on again with the same disk; CLEAN for an orderly shutdown. Returns what wait() says."""
        if clean:
            self.poweroff()
        else:
            self.crash()
        self.boot()
        return self.wait(seconds)

    def down(self) -> None:
        """Off, and forget the disk."""
        self.crash()
        remove_tree(self.folder)

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ARGV inside, for callers that start processes themselves (env=ENVIRONMENT)."""
        return ["nsenter", "-t", str(self.pid), "-a", "--", *argv]

    def run(
        self, argv: Sequence[str], *, check: bool = True, input: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside; CommandError names node, command and what it said when it fails."""
        return run(self.enter(argv), self.name, check=check, input=input, timeout=timeout, env=ENVIRONMENT)

    def sh(self, script: str, *, check: bool = True, timeout: float = 60) -> str:
        """Run a shell script inside; its standard output."""
        return self.run(["bash", "-ec", script], check=check, timeout=timeout).stdout

    def popen(self, argv: Sequence[str], stdin: int | None = subprocess.DEVNULL) -> Started:
        """Start a command inside, its output in pipes; the caller ends it with terminate() or kill()."""
        return Started(self.enter(argv), stdin, ENVIRONMENT)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside, with its folders; whole or not at all."""
        quoted = shlex.quote(path)
        script = f"umask 077; mkdir -p -m 755 $(dirname {quoted}); cat > {quoted}.new; chmod {mode:o} {quoted}.new"
        self.run(["sh", "-ec", f"{script}; mv {quoted}.new {quoted}"], input=text)

    def read(self, path: str) -> str:
        """The text of a file inside."""
        return self.run(["cat", path]).stdout

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder of this machine into the node: REMOTE is its new path."""
        source = Path(local).resolve()
        self.run(["mkdir", "-p", remote if source.is_dir() else str(Path(remote).parent)])
        what = ["-C", str(source), "."] if source.is_dir() else ["-C", str(source.parent), source.name]
        pack = subprocess.Popen(["tar", "-c", "--exclude=__pycache__", *what], stdout=subprocess.PIPE)
        if source.is_dir():
            target = ["tar", "-x", "--no-same-owner", "-C", remote]
        else:
            target = ["sh", "-c", f"tar -x --no-same-owner -O > {shlex.quote(remote)}"]
        done = subprocess.run(self.enter(target), stdin=pack.stdout, env=ENVIRONMENT, capture_output=True, check=False)
        if pack.wait() or done.returncode:
            raise LabError(f"{self.name}: push of {source} to {remote} failed: {done.stderr.decode().strip()}")
        if not source.is_dir():
            self.run(["chmod", f"{source.stat().st_mode & 0o777:o}", remote])

    def console(self, lines: int = 50) -> str:
        """The last lines of what systemd wrote on its console, over all boots."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self.folder / "console.log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def journal(self, unit: str | None = None, lines: int = 200) -> str:
        """The last lines of the journal, of one unit or of all."""
        only = ["-u", unit] if unit else []
        return self.run(["journalctl", "--no-pager", "-o", "short-monotonic", "-n", str(lines), *only]).stdout

    def sees(self, path: str) -> Path:
        """A path inside the node as this machine can open it while it runs (no symbolic link on the way)."""
        return Path(f"/proc/{self.pid}/root{os.path.normpath(path)}")
