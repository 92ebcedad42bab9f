"""The top-of-rack switch and router of a rack, as tests use it: commands in its namespace, pulled cables, routes, BIRD.

Owns what runs in the tor's namespace: BIRD, started from the lab's base in a mount namespace of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import base, net
from lab.process import Process, Started, run

BIRD = """
mount --make-rprivate /
mount --bind "$1" "$2"; mount -t proc proc "$2/proc"; mount -t tmpfs run "$2/run"; mount --bind "$3" "$2/mnt"
mkdir -p "$2/run/bird"; exec chroot "$2" /usr/sbin/bird -f -c /mnt/bird.conf -s /mnt/bird.ctl
"""


class Tor:
    """10.99.0.1 and fd99::1 on bridge br0, whose port to node NAME is p-NAME."""

    def __init__(self, netns: str, folder: Path) -> None:
        self.netns = netns
        self.folder = folder / "tor"

    def enter(self, argv: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.netns, *argv]

    def run(
        self, argv: Sequence[str], *, check: bool = True, input: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run one of this machine's programs in the tor's network namespace."""
        return run(self.enter(argv), "tor", check=check, input=input, timeout=timeout)

    def popen(self, argv: Sequence[str], stdin: int | None = subprocess.DEVNULL) -> Started:
        return Started(self.enter(argv), stdin)

    def unplug(self, name: str) -> None:
        """Take node NAME's port off the bridge: its link stays up, its packets go nowhere."""
        net.batch(self.netns, [f"link set p-{name} nomaster"])

    def plug(self, name: str) -> None:
        net.batch(self.netns, [f"link set p-{name} master br0"])

    def route(self, prefix: str, via: str) -> None:
        """A static route of the fabric: PREFIX is behind the node with address VIA."""
        net.batch(self.netns, [f"route replace {prefix} via {via}"])

    def start_bird(self, config: str) -> None:
        """BIRD 2 with this configuration (birdc() talks to it)."""
        self.stop()
        root = self.folder / "root"
        root.mkdir(parents=True, exist_ok=True)
        (self.folder / "bird.conf").write_text(config)
        (self.folder / "bird.ctl").unlink(missing_ok=True)
        isolated = ["unshare", "--mount", "bash", "-ec", BIRD, "bird", str(base.root()), str(root), str(self.folder)]
        with (self.folder / "bird.log").open("ab") as log:
            bird = subprocess.Popen(
                self.enter(isolated), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = Process.of(bird.pid)
        (self.folder / "bird.json").write_text(json.dumps([process.pid, process.started]))

    def birdc(self, command: str) -> str:
        """What BIRD answers, e.g. to 'show route'."""
        control = str(self.folder / "bird.ctl")
        return self.run([str(base.root() / "usr/sbin/birdc"), "-s", control, *command.split()], check=False).stdout

    def stop(self) -> None:
        """End what start_bird() started, if it runs."""
        state = self.folder / "bird.json"
        if state.exists():
            pid, started = json.loads(state.read_text())
            process = Process(pid, started)
            process.kill()
            process.wait_gone(5)
            state.unlink()
