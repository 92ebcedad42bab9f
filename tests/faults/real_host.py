# Owns: a real hostd process with a real kernel in a network namespace of its own, joined by a cable to the one that is
# entered now. Touches: namespaces it makes, a mount namespace for its /sys, processes it starts.
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher_rig import REPO
from netns import Namespace, eventually, run

from bench import rig
from hostd.compiler.world import World
from hostd.dataplane.host import boot_id
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.reporting.report import bring_up_to_date
from slash32.sync import Replica

PYTHON = ["/usr/bin/python3", "-I", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
          "from hostd.__main__ import main\nsys.exit(main())", str(REPO)]  # fmt: skip
OWN_SYS = ["unshare", "-m", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
HERE, THERE = "192.0.2.254", "192.0.2.1"  # the end of the cable in the entered namespace, hostd's end
_NEWNET = 0x40000000
GUESTS = 3  # of bench.rig: web, app, db


class RealHost:
    """h1, with taps and endpoints that it remembers, and no dispatcher's content."""

    def __init__(self, folder: Path, here: Namespace) -> None:
        self.state, self.run_dir, self.config = folder / "state", folder / "run", folder / "hostd.toml"
        self.run_dir.mkdir()
        self.log = folder / "hostd.log"
        self.process: subprocess.Popen[bytes] | None = None
        with here.entered():  # the rig enters a namespace that it makes
            self.kernel = rig.Host(GUESTS, World())
            run("ip", "link", "set", "up1", "netns", here.path)
            self._remember()
        run("ip", "address", "add", f"{HERE}/24", "dev", "up1")
        run("ip", "link", "set", "up1", "up")

    def _remember(self) -> None:
        memory = Memory(Journal(self.state / "hostd.state"), boot_id())
        memory.recall()
        for one in self.kernel.locals:
            memory.locals.put(one)
            memory.changed({one.endpoint.key})
        memory.close()

    def configure(self, port: int, key: str) -> None:
        self.config.write_text(
            f'host = "h1"\ndispatcher = "tcp://{HERE}:{port}"\ndispatcher_key = "{key}"\nlibvirt = ["test:///default"]\n'
            f'state_dir = "{self.state}"\nrun_dir = "{self.run_dir}"\npacket_filter = "nftables"\n'
        )

    def command(self, *verb: str) -> list[str]:
        return [*OWN_SYS, *PYTHON, "--config", str(self.config), *verb]

    def said(self, *verb: str) -> subprocess.CompletedProcess[str]:
        """By a command of hostd's beside the daemon."""
        with self._entered():
            return subprocess.run(self.command(*verb), capture_output=True, text=True, check=False, timeout=60)

    def inside(self, *argv: str) -> str:
        with self._entered():
            return run(*argv)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.kernel.namespace.enter()
        try:
            yield
        finally:
            rig._checked(rig._libc.setns(before, _NEWNET))
            os.close(before)

    def start(self) -> None:
        with self._entered(), self.log.open("ab") as log:
            environment = {"PATH": os.environ["PATH"]}
            self.process = subprocess.Popen(self.command("run"), stdout=log, stderr=log, env=environment)

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def status(self) -> dict[str, Any]:
        """Of now, if the daemon answers."""
        bring_up_to_date(self.run_dir / "hook.sock")
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "hostd.status").read_text())
        except FileNotFoundError:
            return {"in_sync": False, "revision": -1}
        return found

    def replica(self) -> Replica:
        """As the disk has it."""
        memory = Memory(Journal(self.state / "hostd.state"), boot_id())
        memory.recall(read_only=True)
        return memory.replica

    def wait(self, what: str, revision: int) -> None:
        eventually(lambda: self.status()["in_sync"] and self.status()["revision"] >= revision, what, 60)
