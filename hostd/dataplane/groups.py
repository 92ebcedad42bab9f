# Owns: putting a link into its device group at the cost of one link: by netlink each such change walks all IPv6 routes
# (160 us with 2,000 taps), by /sys it is that one store (18 us). May touch: /sys/class/net/*/netdev_group.
#
# /sys may be that of another network namespace, where a link of this name has this index, too. So the first group is
# written by netlink, and /sys is trusted if the very change is seen there. What it refuses goes by netlink.
from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..compiler.forwarding import Failure, SetGroup

_LINKS = "/sys/class/net"

ByNetlink = Callable[[SetGroup], list[Failure]]


class Groups:
    """Of this thread's network namespace."""

    def __init__(self, by_netlink: ByNetlink, links: str = _LINKS) -> None:
        self._by_netlink, self.links = by_netlink, links
        self._ours: bool | None = None  # not known yet

    def set(self, op: SetGroup) -> list[Failure]:
        if self._ours is None:
            return self._first(op)
        if self._ours:
            try:
                with self._link(op.ifindex) as link:
                    _write(link, op.group)
            except OSError:  # gone, or not to be written: netlink says which
                pass
            else:
                return []
        return self._by_netlink(op)

    def _first(self, op: SetGroup) -> list[Failure]:
        try:
            with self._link(op.ifindex) as link:
                before = _read(link, "netdev_group")
                failures = self._by_netlink(op)
                if not failures and before != op.group:
                    self._ours = _read(link, "netdev_group") == op.group
                return failures
        except OSError:
            self._ours = False
            return self._by_netlink(op)

    @contextmanager
    def _link(self, ifindex: int) -> Iterator[int]:
        """Its folder: it stays that of this link, whatever it or another is called next."""
        folder = os.open(f"{self.links}/{socket.if_indextoname(ifindex)}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _read(folder, "ifindex") != ifindex:
                raise FileNotFoundError(f"link #{ifindex}")
            yield folder
        finally:
            os.close(folder)


def _read(folder: int, name: str) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def _write(folder: int, group: int) -> None:
    fd = os.open("netdev_group", os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(fd, b"%d" % group)
    finally:
        os.close(fd)
