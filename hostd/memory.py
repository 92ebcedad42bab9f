# Owns: what hostd remembers across its own death: the replica and this host's endpoints, as journal records.
# Touches: the journal it is given. A damaged or foreign record is dropped with a warning, never guessed at.
from __future__ import annotations

import logging
from typing import Any

import msgpack

from slash32 import wire
from slash32.model import EndpointKey
from slash32.pack import WireError, pack_endpoint, unpack_endpoint, unpack_key
from slash32.sync import Applied, Replica

from .journal import Journal
from .state import Carrier, Local, Locals, Phase, without_carrier

log = logging.getLogger("slash32.hostd")

_REPLICA, _DELTA, _LOCAL, _GONE, _BOOT, _OWED = range(6)


class Memory:
    """`recall` once, then `changed` and `applied` as things happen, before the kernel is changed."""

    def __init__(self, journal: Journal, boot: str) -> None:
        """`boot`: what interface indexes belong to; they mean nothing beyond it."""
        self.journal = journal
        self.boot = boot
        self.replica = Replica()
        self.locals = Locals({})
        self._revision = 0  # of the replica on disk
        self.owed = False  # a change is, or was when hostd died, on its way that may have to end tracked flows
        self.trouble = ""  # why the disk does not hold the last state, if it does not

    def recall(self, read_only: bool = False) -> None:
        """`read_only`: beside a running hostd, whose boot is this one."""
        same_boot, whole = read_only, True
        for record in self._records():
            try:
                kind, payload = msgpack.unpackb(record, strict_map_key=False)
                if kind == _BOOT:
                    same_boot = read_only or payload == self.boot
                else:
                    self._replay(kind, payload, same_boot)
            except (WireError, ValueError, TypeError, KeyError) as error:
                log.warning("%s: a record was dropped: %s", self.journal.path, error)
                whole = False
        self.replica.lost()
        if not read_only and not (same_boot and whole):
            self._rebase()  # else the first change does it: the disk says what is so

    def _records(self) -> list[bytes]:
        try:
            return self.journal.load()
        except OSError as error:
            log.error("%s: %s: hostd starts with nothing remembered", self.journal.path, error)
            return []

    def changed(self, keys: set[EndpointKey]) -> None:
        for key in sorted(keys):
            local = self.locals.get(key)
            self._append(_LOCAL if local else _GONE, _pack_local(local) if local else list(key))

    def applied(self, batch: list[Applied]) -> None:
        if any(a.snapshot for a in batch) or self.journal.full:
            self._rebase()  # the replica has taken the whole batch
            return
        for outcome in batch:
            changes = [piece for change in outcome.changes for piece in wire.encode_change(change)]
            self._append(_DELTA, [self._revision, outcome.revision, b"".join(changes)])
            self._revision = outcome.revision

    def owes(self, owed: bool) -> None:
        if owed != self.owed:
            self.owed = owed
            self._append(_OWED, owed)

    def close(self) -> None:
        self.journal.close()

    def _replay(self, kind: int, payload: Any, same_boot: bool) -> None:
        if kind == _REPLICA:
            self.replica = Replica.load(payload)
        elif kind == _DELTA:
            self.replica.replay(*payload)
        elif kind == _LOCAL:
            self.locals.put(_unpack_local(payload, same_boot))
        elif kind == _GONE:
            self.locals.remove(unpack_key(payload))
        elif kind == _OWED:
            self.owed = bool(payload)
        else:
            raise WireError(f"unknown record {kind!r}")

    def _append(self, kind: int, payload: Any) -> None:
        try:
            if self.journal.full:
                self._rebase()
            else:
                self.journal.append(wire.packb([kind, payload]))
        except OSError as error:
            self._failed(error)

    def _rebase(self) -> None:
        records = [[_BOOT, self.boot], [_REPLICA, self.replica.dump()]]
        records += [[_LOCAL, _pack_local(local)] for local in self.locals]
        records += [[_OWED, True]] * self.owed
        try:
            self.journal.rebase([msgpack.packb(record) for record in records])
            self._revision = self.replica.revision
            self.trouble = ""
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Enforcing goes on; the state on disk grows old, and status says so."""
        if not self.trouble:
            log.error("%s: %s: the last state is not kept", self.journal.path, error)
        self.trouble = str(error)
        self.journal.close()


def _pack_local(local: Local) -> list[Any]:
    return [
        pack_endpoint(local.endpoint),
        local.driver,
        local.phase.value,
        list(local.carrier) if local.carrier else None,
        pack_endpoint(local.accepted) if local.accepted else None,
    ]


def _unpack_local(raw: Any, same_boot: bool) -> Local:
    endpoint, driver, phase, carrier, accepted = raw
    tagged = unpack_endpoint(endpoint)
    local = Local(
        tagged,
        driver,
        Phase(phase),
        Carrier(*carrier) if carrier else None,
        tagged if accepted == endpoint else unpack_endpoint(accepted) if accepted else None,
    )
    return local if local.carrier and same_boot else without_carrier(local)
