# Owns: the kernel as a witness for `explain`: its rules as its own tools list them, a tap's device group, the way to an
# address. For one question, in a thread that owns nothing else. Touches: rtnetlink, the packet filter's own tools, ip.
# Writes nothing.
from __future__ import annotations

import json

from slash32.net import Address, format_address

from ..reporting.answers import Listed
from .filter import IPTABLES, NFTABLES
from .rtnl import Rtnl
from .tool import told


class Witness:
    def __init__(self, packet_filter: str = NFTABLES) -> None:
        self._packet_filter = packet_filter

    def listed(self) -> Listed:
        if self._packet_filter == IPTABLES:
            from .iptables.listing import SavedFilter

            return SavedFilter()
        from .nft.listing import KernelFilter

        return KernelFilter()

    def group_of(self, ifindex: int) -> int:
        rtnl = Rtnl()
        try:
            link = rtnl.link(ifindex)
        finally:
            rtnl.close()
        return link.group if link is not None else 0

    def way_to(self, address: Address) -> str:
        """Name of the interface that the host sends through to this address; "": it has no way there."""
        command = ["ip", "-j", "route", "get", format_address(address)]
        done = told(*command)
        if done.returncode:
            return ""
        (way, *_) = json.loads(done.stdout)
        return str(way.get("dev", ""))
