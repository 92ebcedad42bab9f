# Owns: /proc/sys/net of this network namespace: which settings a tap and the host need, reading and writing them.
# Keys are paths below /proc/sys/net, with "/": "ipv4/conf/vnet0/forwarding".
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

_ROOT = "/proc/sys/net/"
_KEY = re.compile(r"[A-Za-z0-9_.:@+-]+(/[A-Za-z0-9_.:@+-]+)+")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@+-]{1,15}")

_TAP4 = (
    ("forwarding", "1"),
    ("proxy_arp", "1"),  # the host answers for every gateway and neighbour that a guest asks for
    ("rp_filter", "1"),
    ("accept_redirects", "0"),
    ("send_redirects", "0"),
    ("accept_source_route", "0"),
    ("arp_accept", "0"),  # a guest makes no neighbour entries by gratuitous ARP
    ("arp_announce", "2"),  # asks with an address of the guest's own subnet or the best one, not just any source
    ("route_localnet", "0"),
)
_TAP6 = (
    ("accept_ra", "0"),  # before forwarding: no moment in which a guest's RA could count
    ("autoconf", "0"),
    ("accept_redirects", "0"),
    ("accept_source_route", "0"),
    ("accept_dad", "0"),
    ("dad_transmits", "0"),
    ("forwarding", "1"),
    ("disable_ipv6", "0"),  # last: where the host's default is 1, v6 begins here with all of the above
)
# Every guest is a neighbour; the kernel's own limit (1,024) is reached at about 1,017 of them. Its limit of tracked
# connections (at most 262,144) is that of four guests at theirs (conn_limit): a few would close the host to all others.
_MINIMUM = (
    *((f"{version}/neigh/default/{name}", least)
      for version in ("ipv4", "ipv6")
      for name, least in (("gc_thresh3", 65536), ("gc_thresh2", 32768), ("gc_thresh1", 8192))),
    ("netfilter/nf_conntrack_max", 1 << 20),
)  # fmt: skip


class Setting(NamedTuple):
    key: str
    value: str


def read(key: str) -> str:
    """Raises OSError; FileNotFoundError where the interface or the feature is not there."""
    fd = os.open(_path(key), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode().strip()
    finally:
        os.close(fd)


def write(key: str, value: str) -> None:
    """Raises OSError; FileNotFoundError where the interface or the feature is not there."""
    fd = os.open(_path(key), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def write_all(settings: Iterable[Setting]) -> None:
    """The hot path: a blind write costs what a read does, and half of that is the way to the folder."""
    for folder, found in groupby(settings, lambda setting: setting.key.rpartition("/")[0]):
        way = os.open(_path(folder), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for key, value in found:
                fd = os.open(key[len(folder) + 1 :], os.O_WRONLY | os.O_CLOEXEC, dir_fd=way)
                try:
                    os.write(fd, value.encode())
                finally:
                    os.close(fd)
        finally:
            os.close(way)


def differing(settings: Iterable[Setting]) -> list[Setting]:
    """Those that the kernel holds otherwise: a resync writes these and nothing else."""
    return [setting for setting in settings if read(setting.key) != setting.value]


def has_ipv6() -> bool:
    return os.path.isdir(_ROOT + "ipv6/conf/all")  # noqa: PTH112


def tap_sysctls(name: str, ipv6: bool = True) -> tuple[Setting, ...]:
    """What an interface of a guest needs, in the order of writing. Raises ValueError for an odd name."""
    check_interface(name)
    settings = [Setting(f"ipv4/conf/{name}/{key}", value) for key, value in _TAP4]
    settings.append(Setting(f"ipv4/neigh/{name}/proxy_delay", "0"))  # else proxy ARP answers up to 0.8 s late
    if ipv6:
        settings += [Setting(f"ipv6/conf/{name}/{key}", value) for key, value in _TAP6]
    return tuple(settings)


def host_sysctls() -> tuple[Setting, ...]:
    """What the host as a whole lacks now: limits are raised, never lowered. Empty where the system does not show them,
    or not for writing (a network namespace other than the first has none of its own)."""
    lacking = []
    for key, least in _MINIMUM:
        try:
            now = int(read(key))
        except FileNotFoundError:
            continue
        if now < least and writable(key):
            lacking.append(Setting(key, str(least)))
    return tuple(lacking)


def writable(key: str) -> bool:
    return os.access(_path(key), os.W_OK)


def check_interface(name: str) -> str:
    """A name that can stand in a path. Raises ValueError."""
    if not _INTERFACE.fullmatch(name) or name in (".", "..", "all", "default"):
        raise ValueError(f"interface name {name[:64]!r} cannot be used in a sysctl: rename the interface")
    return name


def _path(key: str) -> str:
    if not _KEY.fullmatch(key) or not {".", ".."}.isdisjoint(key.split("/")):
        raise ValueError(f"sysctl {key[:200]!r} is not a key below net, like ipv4/conf/vnet0/forwarding")
    return _ROOT + key
