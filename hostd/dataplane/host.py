# Owns: the host as a whole, as far as slash32 changes it: the guard, forwarding, and what stood before us.
# Touches: the kernel through its door, and the note of how the host forwarded when slash32 first came.
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..compiler.ruleset import Guard
from ..config import Config
from . import sysctl, uplink
from .choice import chosen
from .filter import IPTABLES, NFTABLES, is_there, opened
from .kernel import Kernel
from .nft.table import is_owned, supports_owner_persist
from .sysctl import Setting
from .uplink import Forwarding

_NOTE = "forwarding-before"
_OWNED_TABLE = b"table inet slash32-probe { flags owner,persist; }\n"


class Machine:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.packet_filter = chosen(config.packet_filter)
        self.before = self._forwarding_before()
        self.owned = self.packet_filter == NFTABLES and self._own()
        self.kernel = Kernel(_guard(config, self.before), self.owned, self.packet_filter)
        self.follows = is_there(self._other)  # the other packet filter still is in force, until supplant()

    @property
    def _other(self) -> str:
        return NFTABLES if self.packet_filter == IPTABLES else IPTABLES

    def prepare(self) -> None:
        """The guard stands, then the host forwards. Raises TransactionRefused, OSError."""
        if self.follows:
            self._prime()
        self.kernel.load()
        self.keep()

    def _prime(self) -> None:
        """Ours is built asleep beside the other, with the classes that the taps are in already."""
        other = opened(self._other, self.kernel.guard, False, tuple)
        try:
            old = other.read()
        finally:
            other.close()
        self.kernel.table.asleep = True
        self.kernel.load()
        have = self.kernel.table.read()
        classes = {group: chains for group, chains in old.classes.items() if group not in have.classes}
        self.kernel.table.prime(classes, old.exempt - have.exempt)

    def supplant(self) -> bool:
        """Ours is loaded, all of it: it is in force from now on, then the other goes, and nothing of it stays. True if
        there was another. Raises TransactionRefused, OSError."""
        if not self.follows:
            return False
        self.kernel.table.wake()
        other = opened(self._other, self.kernel.guard, False, tuple)
        try:
            other.remove()
        finally:
            other.close()
        self.follows = False
        return True

    def keep(self) -> None:
        """Forwarding and its limits as they should be; writes what differs."""
        self._note_listeners(uplink.switch_on(self._uplinks(), self.before))
        sysctl.write_all(sysctl.host_sysctls())

    def _uplinks(self) -> Iterator[str]:
        """Looked for where somebody asks: there may be thousands of taps beside them."""
        yield from uplink.uplinks(self.kernel.rtnl.links(), self.kernel.guard)

    def _own(self) -> bool:
        if self.config.table_owner != "auto":
            return self.config.table_owner == "yes"
        present = is_owned()  # since the guard was put up at boot: what the kernel and nft can has been asked then
        return may_own() if present is None else present

    def _note_listeners(self, written: list[Setting]) -> None:
        """Interfaces that were made to go on listening to routers: a purge makes them what they were."""
        note = self.config.state_dir / "accept-ra-before"
        keys = {key for key, _ in written if key.endswith("/accept_ra")}
        known = set(note.read_text().split()) if keys and note.exists() else set()
        if not keys <= known:
            note.write_text("".join(f"{key}\n" for key in sorted(keys | known)))

    def _forwarding_before(self) -> Forwarding:
        """How the host forwarded before slash32, written down when it first runs: afterwards nothing tells it."""
        note = self.config.state_dir / _NOTE
        known = _noted(note)
        if known is not None:
            return known
        found = uplink.forwarding()
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(".new")
        fresh.write_text(json.dumps(found._asdict()))
        fresh.replace(note)
        return found


def guard_of(config: Config) -> Guard:
    """The guard as it is put up here. Changes nothing."""
    return _guard(config, _noted(config.state_dir / _NOTE) or uplink.forwarding())


def _guard(config: Config, before: Forwarding) -> Guard:
    return config.guard(tuple(version for version, did in ((4, before.v4), (6, before.v6)) if not did))


def _noted(note: Path) -> Forwarding | None:
    try:
        return Forwarding(**json.loads(note.read_text()))
    except FileNotFoundError:
        return None


def boot_id() -> str:
    """What interface indexes belong to: this boot of the kernel, and this network namespace of it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').stat().st_ino}"


def may_own() -> bool:
    """Kernel and nft both know tables that outlive their owner.

    Debian 12's nft (1.0.6) lists such a table as `flags ` and nothing, which does not load again.
    """
    if not supports_owner_persist():
        return False
    import subprocess  # once a boot

    try:
        done = subprocess.run(
            ["nft", "-c", "-f", "-"], input=_OWNED_TABLE, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
