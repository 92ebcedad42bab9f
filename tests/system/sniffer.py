# Owns: what crossed a node's interfaces and what its own stack was handed, seen by packet and raw sockets in the node's
# network namespace. A packet socket sees what leaves an interface after every filter, a raw socket what passed INPUT.
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from lab.node import Node

LOCAL = "local"  # in the place of an interface: handed to the host's own stack

# Counts distinct frames that hold one of the markers, so that a flood costs no memory; ends at end of file on stdin.
_CHILD = r"""
import json, select, socket, struct, sys
markers = [bytes.fromhex(word) for word in sys.argv[1:]]
FORCE, PACKET, STATISTICS, OUT = 33, 263, 6, 4
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.setsockopt(socket.SOL_SOCKET, FORCE, 64 << 20)
wire.setblocking(False)
raws = []
for family, protocols in ((socket.AF_INET, (1, 4, 6, 17, 41, 47)), (socket.AF_INET6, (6, 17, 41, 47, 58))):
    for protocol in protocols:
        raw = socket.socket(family, socket.SOCK_RAW, protocol)
        raw.setsockopt(socket.SOL_SOCKET, FORCE, 4 << 20)
        raw.setblocking(False)
        raws.append(raw)
seen = {}
def note(where, out, data):
    if any(marker in data for marker in markers):
        seen[where, out, data] = seen.get((where, out, data), 0) + 1
def drain():
    for each in (wire, *raws):
        try:
            while True:
                data, sender = each.recvfrom(65535)
                if each is wire:
                    note(sender[0], sender[2] == OUT, data)
                elif each.family == socket.AF_INET6:
                    note("local", False, socket.inet_pton(socket.AF_INET6, sender[0].partition("%")[0]) + data)
                else:
                    note("local", False, data)
        except BlockingIOError:
            pass
print("ready", flush=True)
while True:
    ready, _, _ = select.select([0, wire, *raws], [], [])
    drain()
    if 0 in ready:
        break
drain()
lost = struct.unpack("II", wire.getsockopt(PACKET, STATISTICS, 8))[1]
json.dump({"lost": lost, "seen": [[w, o, d.hex(), n] for (w, o, d), n in seen.items()]}, sys.stdout)
"""


class Seen(NamedTuple):
    """A frame (of `local`: the packet, for v6 its source address and payload), and how often."""

    where: str
    outgoing: bool
    data: bytes
    count: int


class Sniffer:
    """What was seen in one node. `frames()` ends the capture."""

    def __init__(self, node: Node, markers: Sequence[bytes]) -> None:
        argv = ["nsenter", "-t", str(node.pid), "-n", "--", "/usr/bin/python3", "-I", "-c", _CHILD]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*argv, *(m.hex() for m in markers)], stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"
        self._seen: list[Seen] | None = None

    def frames(self) -> list[Seen]:
        if self._seen is None:
            out, _ = self._process.communicate(timeout=60)
            said = json.loads(out)
            assert said["lost"] == 0, f"the sniffer lost {said['lost']} frames"
            self._seen = [Seen(where, outgoing, bytes.fromhex(d), n) for where, outgoing, d, n in said["seen"]]
        return self._seen

    def count(self, marker: bytes, where: str | None = None, outgoing: bool | None = None) -> int:
        return sum(
            each.count
            for each in self.frames()
            if marker in each.data and where in (None, each.where) and outgoing in (None, each.outgoing)
        )

    def places(self, marker: bytes) -> set[tuple[str, bool]]:
        """(interface or LOCAL, outgoing) of everything with this marker."""
        return {(each.where, each.outgoing) for each in self.frames() if marker in each.data}

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def sniff(nodes: Sequence[Node], *markers: bytes) -> Iterator[dict[str, Sniffer]]:
    """Sniffers in these nodes, by node name, from before the body runs."""
    sniffers: dict[str, Sniffer] = {}
    try:
        for node in nodes:
            sniffers[node.name] = Sniffer(node, markers)
        yield sniffers
        for sniffer in sniffers.values():
            sniffer.frames()
    finally:
        for sniffer in sniffers.values():
            sniffer.end()
