# Owns: which of the two packet filters this host is to have, and whether it can. Touches: looks at what `iptables` is
# here; runs it where its file does not tell.
from __future__ import annotations

from pathlib import Path

from ..config import Unusable
from .filter import IPTABLES, NFTABLES

_PLACES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
LEGACY, NF_TABLES, NONE = "legacy", "nf_tables", ""
AUTO = "auto"


def chosen(setting: str) -> str:
    """Raises Unusable. `auto`: nf_tables, but where the host's own iptables is iptables-legacy."""
    flavour = flavour_of_iptables()
    if setting == AUTO:
        return IPTABLES if flavour == LEGACY else NFTABLES
    if setting == IPTABLES and flavour == NF_TABLES:
        raise Unusable(
            'packet_filter = "iptables": this host\'s iptables speaks to nf_tables (iptables -V): set packet_filter to '
            '"nftables" or "auto", or run: update-alternatives --set iptables /usr/sbin/iptables-legacy'
        )
    if setting == IPTABLES and flavour == NONE:
        raise Unusable('packet_filter = "iptables": there is no iptables on this host: apt install iptables ipset')
    return setting


def flavour_of_iptables() -> str:
    found = next((place for place in _PLACES if Path(place, "iptables").exists()), None)
    if found is None:
        return NONE
    program = Path(found, "iptables")
    name = program.resolve().name
    if "legacy" in name:
        return LEGACY
    if "nft" in name:
        return NF_TABLES
    import subprocess  # hardly ever

    try:
        said = subprocess.run([str(program), "-V"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return NONE
    return NF_TABLES if "nf_tables" in said else LEGACY
