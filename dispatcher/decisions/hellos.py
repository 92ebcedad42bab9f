# Owns: what a host's Hello changes of what is known of it: its key, its next hops, and how far it has got in a content
# of which ours is an old copy. Pure.
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from slash32.journal import fields
from slash32.model import Host
from slash32.wire import Hello

from .ledger import Ledger

log = logging.getLogger("slash32.dispatcher")


class Hellos:
    def __init__(self, ledger: Ledger, warn: Callable[..., None]) -> None:
        """`warn(host, format, *values)` writes a line about a host."""
        self._ledger, self._registry, self._warn = ledger, ledger.registry, warn
        self._began = ledger.revision
        self.followed: set[str] = set()  # hosts that took our content since then

    def decide(self, name: str, key: str, hello: Hello, now: float, shared: bool) -> None:
        """`key`: it came with; `now`: Unix time; `shared`: others write to this store, and are known up to now."""
        host = self._registry.hosts[name]
        self._new_key(host, key, now)
        self._next_hops(host, hello)
        self._look_ahead(name, hello, shared)

    def _new_key(self, host: Host, key: str, now: float) -> None:
        """It uses the key that it was to use next."""
        state = self._ledger.host(host.name)
        if key and key == state.next_key:
            self._ledger.set_host(host.name, state._replace(next_key=""))
            self._ledger.put(replace(host, public_key=key))
            self._ledger.note(now, f"Host {host.name}", "rotated")
            log.info("host %s: uses its new key", host.name, extra=fields(host=host.name))

    def _next_hops(self, host: Host, hello: Hello) -> None:
        state = self._ledger.host(host.name)
        if host.addresses or hello.addresses == state.addresses:
            return
        refusal = self._registry.refuses_next_hops(host.name, hello.addresses)
        if refusal is not None:
            self._warn(host.name, "%s", refusal)
            return
        self._ledger.set_host(host.name, state._replace(addresses=hello.addresses))

    def _look_ahead(self, name: str, hello: Hello, shared: bool) -> None:
        """A host beyond our revision: this database is an old copy. That host keeps what it has until `adopt`.

        What we have committed ourselves since we began nobody has who did not follow us: it is another commit.
        """
        state = self._ledger.host(name)
        seen = state.ahead
        known = self._ledger.revision if shared or name in self.followed else self._began
        if hello.epoch == self._ledger.epoch and hello.revision > known:
            seen = hello.revision
            self._warn(name, "is at revision %d, this database at %d: it is an old copy; `slash32 adopt` if wanted",
                       hello.revision, known)  # fmt: skip
        elif seen is not None and (hello.epoch != self._ledger.epoch or hello.revision < seen):
            seen = None
        if seen != state.ahead:
            self._ledger.set_host(name, state._replace(ahead=seen))
