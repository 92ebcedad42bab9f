"""Commands inside guests: containers through nsenter from their node, QEMU guests through their second serial port.

Opens /run/slash32-lab/GUEST.sock of the node (one caller at a time, by a lock in the node's folder); owns nothing else.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import shlex
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.domains import DOORS
from lab.node import Node
from lab.paths import LabError
from lab.process import CommandError

# A container's init is the only child of its controller, whose pid libvirt keeps.
ENTER = r"""
controller=$(cat "/run/libvirt/lxc/$1.pid") || exit 125
read -r init _ < "/proc/$controller/task/$controller/children" || init=$(pgrep -o -P "$controller") || exit 125
shift; export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
exec nsenter -t "$init" -a -- /bin/busybox env "$@"
"""


def guest_run(
    node: Node,
    domain: str,
    argv: Sequence[str],
    *,
    check: bool = True,
    input: str | None = None,
    timeout: float = 15,
) -> str:
    """Run ARGV inside the guest DOMAIN of NODE and return its output (QEMU: stderr too). A QEMU guest that is still
    booting is waited for, within TIMEOUT. With CHECK, CommandError if the command fails."""
    result = guest_result(node, domain, argv, input=input, timeout=timeout)
    if check and result.returncode:
        raise CommandError(f"{node.name}/{domain}", result)
    return result.stdout


def guest_result(
    node: Node, domain: str, argv: Sequence[str], *, input: str | None = None, timeout: float = 15
) -> subprocess.CompletedProcess[str]:
    """The same, with the exit status."""
    door = node.sees(f"{DOORS}/{domain}.sock")
    if not door.exists():
        result = node.run(["sh", "-c", ENTER, "enter", domain, *argv], check=False, input=input, timeout=timeout)
        if result.returncode == 125:
            raise LabError(f"{node.name} runs no guest '{domain}': see virsh list, virsh -c lxc:/// list")
        return subprocess.CompletedProcess(list(argv), result.returncode, result.stdout, result.stderr)
    with _alone(node.folder / f"door-{domain}.lock"):
        status, output = _knock(door, f"{node.name}/{domain}", shlex.join(argv), input, timeout)
    return subprocess.CompletedProcess(list(argv), status, output, "")


def wait_guest(node: Node, domain: str, timeout: float = 30) -> None:
    """Wait until the guest's init has come as far as its servers."""
    until = time.monotonic() + timeout
    while "GUEST-UP" not in (said := guest_run(node, domain, ["cat", "/tmp/up"], check=False, timeout=timeout)):
        if time.monotonic() > until:
            raise LabError(f"{node.name}/{domain} did not come up in {timeout:g} s: {said.strip()}")
        time.sleep(0.05)


def probe(node: Node, domain: str, addresses: Sequence[str], *options: str) -> dict[tuple[str, str], bool]:
    """Who answers: {(address, "icmp" | "80" | "5432" | "udp/PORT"): bool}; OPTIONS as in lab/guest/probe.c."""
    said = guest_run(node, domain, ["probe", *options, *addresses], timeout=20)
    return {(address, what): answer == "yes" for address, what, answer in map(str.split, said.splitlines())}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _knock(door: Path, where: str, command: str, input: str | None, timeout: float) -> tuple[int, str]:
    """One command through a serial port: wait until the guest's shell reads it, send, wait for the marked answer."""
    until = time.monotonic() + timeout
    if input is not None:
        command = f"echo {base64.b64encode(input.encode()).decode()} | base64 -d | {command}"
    mark = f"s32-{uuid.uuid4().hex[:8]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        try:
            wire.connect(str(door))
        except OSError as error:
            raise LabError(f"{where}: its serial port {door.name} is dead: {error.strerror}") from None
        while not _answer(wire, rf"{mark}-sync ok\n", min(time.monotonic() + 0.25, until), f"\n{mark}-sync\n"):
            if time.monotonic() > until:
                raise LabError(f"{where}: no answer on its serial port in {timeout:g} s (still booting, or dead)")
        line = f"{mark} {max(1, int(timeout))} {base64.b64encode(command.encode()).decode()}\n"
        found = _answer(wire, rf"{mark} (\d+) (\S*) end\n", until, line)
    if not found:
        raise LabError(f"{where}: {command[:200]} took longer than {timeout:g} s")
    return int(found.group(1)), base64.b64decode(found.group(2)).decode(errors="replace")


def _answer(wire: socket.socket, pattern: str, until: float, send: str) -> re.Match[str] | None:
    wire.settimeout(max(0.01, until - time.monotonic()))
    said = b""
    try:
        wire.sendall(send.encode())
        while not (found := re.search(pattern, said.decode("latin-1"))):
            wire.settimeout(max(0.01, until - time.monotonic()))
            data = wire.recv(65536)
            if not data:
                return None
            said += data
    except TimeoutError:
        return None
    return found
