# Owns: what no policy on a host endpoint closes, so that nobody locks himself out of a hypervisor. Pure data.
# Besides these: the dispatcher's port (outbound), what is established, lo, and the ICMPv6 without which a host has no
# neighbours (130..137, and 143: switches that snoop pass questions only on to who reported its groups).
from __future__ import annotations

from typing import NamedTuple

TCP, UDP = 6, 17
VITAL_ICMP6 = (*range(130, 138), 143)  # multicast listeners, router and neighbour discovery, redirects


class Failsafe(NamedTuple):
    """Destination ports, both ends inclusive."""

    protocol: int
    first: int
    last: int
    why: str


INBOUND = (
    Failsafe(TCP, 22, 22, "ssh"),
    Failsafe(UDP, 68, 68, "DHCP answers"),
    Failsafe(UDP, 546, 546, "DHCPv6 answers"),
    Failsafe(TCP, 179, 179, "BGP"),
    Failsafe(UDP, 3784, 3785, "BFD"),
    Failsafe(TCP, 16509, 16509, "libvirt"),
    Failsafe(TCP, 16514, 16514, "libvirt over TLS"),
    Failsafe(TCP, 49152, 49215, "live migration"),
)
OUTBOUND = (
    Failsafe(TCP, 22, 22, "ssh, libvirt over ssh"),
    Failsafe(UDP, 53, 53, "DNS"),
    Failsafe(TCP, 53, 53, "DNS"),
    Failsafe(UDP, 67, 67, "DHCP"),
    Failsafe(UDP, 547, 547, "DHCPv6"),
    Failsafe(TCP, 179, 179, "BGP"),
    Failsafe(UDP, 3784, 3785, "BFD"),
    Failsafe(TCP, 16509, 16509, "libvirt"),
    Failsafe(TCP, 16514, 16514, "libvirt over TLS"),
    Failsafe(TCP, 49152, 49215, "live migration"),
)
