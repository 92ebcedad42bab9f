# Owns: which addresses no guest and no hypervisor can have, for all who take one from elsewhere. Pure.
from __future__ import annotations

from slash32.net import Prefix, parse_prefix

_NOBODYS = tuple(
    (parse_prefix(net), why)
    for net, why in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local (169.254.1.1 is every guest's gateway)"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved or broadcast"),
        ("::/96", "unspecified or loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
)
_SUSPECT = {4: frozenset((0, 127, 169, *range(224, 256))), 16: frozenset((0, 0xFE, 0xFF))}  # first bytes of those


def unusable(prefix: Prefix) -> str | None:
    """What the prefix (or address, as its own) is or holds that nobody can have; None where it is usable."""
    network, length = prefix
    if length >= 8 and network[0] not in _SUSPECT[len(network)]:
        return None
    for nobodys, why in _NOBODYS:
        if nobodys.contains(network) or (prefix.contains(nobodys.network) and length <= nobodys.length):
            return why
    return None
