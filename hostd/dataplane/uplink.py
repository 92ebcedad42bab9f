# Owns: switching forwarding on without cutting the host off. A forwarding kernel takes no router advertisements and
# throws away the default routes it learned from them, unless the interface says accept_ra=2; any write of a v6
# forwarding key does so, a tap's included. May touch: /proc/sys/net, through sysctl.py.
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..compiler.forwarding import LOOPBACK, Link
from ..compiler.ruleset import GROUP_MASK, Guard
from . import sysctl

_FORWARD4 = "ipv4/ip_forward"
_FORWARD6 = "ipv6/conf/all/forwarding"


class Forwarding(NamedTuple):
    v4: bool
    v6: bool


def forwarding() -> Forwarding:
    """Whether the host forwards now. Write it down before the first switch_on: it is not to be had later."""
    return Forwarding(sysctl.read(_FORWARD4) != "0", sysctl.has_ipv6() and sysctl.read(_FORWARD6) != "0")


def uplinks(links: Mapping[int, Link], guard: Guard) -> list[str]:
    """The interfaces that are the host's own: no guest's, and not mere ports of a bridge or bond."""
    found = []
    for link in links.values():
        guests = link.name.startswith(guard.prefixes) or (link.group and link.group & GROUP_MASK == guard.group_base)
        master = links.get(link.master)
        port = link.master and (master is None or master.kind != "vrf")
        if link.ifindex != LOOPBACK and not guests and not port:
            found.append(link.name)
    return found


def switch_on(names: Iterable[str], before: Forwarding) -> list[sysctl.Setting]:
    """Lets the host forward. `names`: its uplinks; `before`: what forwarding() said when slash32 first came to this
    host. Returns what had to be written. Raises OSError."""
    written = []
    if sysctl.has_ipv6():
        if not before.v6:
            written += [setting for name in names for setting in keep_router_advertisements(name)]
        written += _differing_written(sysctl.Setting(_FORWARD6, "1"))
    return written + _differing_written(sysctl.Setting(_FORWARD4, "1"))


def keep_router_advertisements(name: str) -> list[sysctl.Setting]:
    """An interface that listened to routers while the host did not forward goes on listening. Call it for each
    uplink that appears later, where the host did not forward v6 before us."""
    setting = sysctl.Setting(f"ipv6/conf/{sysctl.check_interface(name)}/accept_ra", "2")
    try:
        if sysctl.read(setting.key) != "1":  # 0: somebody else (networkd) listens, or nobody is to
            return []
        sysctl.write(*setting)
    except FileNotFoundError:  # no IPv6 on this one, or it is gone
        return []
    return [setting]


def _differing_written(setting: sysctl.Setting) -> list[sysctl.Setting]:
    if sysctl.read(setting.key) == setting.value:
        return []
    sysctl.write(*setting)
    return [setting]
