# Owns: addresses and prefixes as packed bytes. Pure: no I/O. Text exists only at the edges (tags, YAML, tables);
# inside, an address is 4 or 16 bytes in network order, because that is what sets, routes and the wire hold.
from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

Address = bytes  # 4 (IPv4) or 16 (IPv6) bytes, network order

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PLAIN4 = re.compile(r"\.".join(["(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"] * 4) + "(?:/32)?")


class Prefix(NamedTuple):
    """A CIDR: `network` has its host bits cleared; `length` counts bits."""

    network: Address
    length: int

    @property
    def version(self) -> int:
        return version(self.network)

    def contains(self, address: Address) -> bool:
        if len(address) != len(self.network):
            return False
        shift = 8 * len(address) - self.length
        return int.from_bytes(address, "big") >> shift == int.from_bytes(self.network, "big") >> shift

    def bounds(self) -> tuple[Address, Address]:
        """First and last address, both inclusive."""
        width = len(self.network)
        last = int.from_bytes(self.network, "big") | ((1 << (8 * width - self.length)) - 1)
        return self.network, last.to_bytes(width, "big")

    def __str__(self) -> str:
        return f"{format_address(self.network)}/{self.length}"


def version(address: Address) -> int:
    """4 or 6."""
    return 4 if len(address) == 4 else 6


def parse_address(text: str) -> Address:
    """Raises ValueError for anything but one plain IPv4 or IPv6 address (no zone, no mask)."""
    if "%" in text or "/" in text:
        raise ValueError(f"{text!r} is not a plain IP address")
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address") from None


def format_address(address: Address) -> str:
    if len(address) == 4:  # by far the most, and ipaddress takes ten times as long
        a, b, c, d = address
        return f"{a}.{b}.{c}.{d}"
    return str(ipaddress.ip_address(address))


def parse_prefix(text: str) -> Prefix:
    """A CIDR, or an address (its own /32 or /128). Raises ValueError, also for host bits that are set."""
    plain = _PLAIN4.fullmatch(text)
    if plain is not None:
        return Prefix(bytes(map(int, plain.groups())), 32)
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a prefix (like 10.0.0.0/8, with no bit set behind the mask)") from None
    return Prefix(network.network_address.packed, network.prefixlen)


def host_prefix(address: Address) -> Prefix:
    """The /32 or /128 of an address."""
    return Prefix(address, 8 * len(address))


def parse_mac(text: str) -> str:
    """Canonical form (lower case, colons). Raises ValueError, also for multicast addresses."""
    mac = text.lower()
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
        raise ValueError(f"{text!r} is not a unicast MAC address like 52:54:00:00:00:01")
    return mac


def pack_mac(mac: str) -> bytes:
    """6 bytes."""
    return bytes.fromhex(mac.replace(":", ""))
