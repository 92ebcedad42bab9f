# Owns: which store a configuration names, and moving a content from one to the other. Touches: where dispatchers
# listen, to know whether one runs.
from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from ..config import Config, address_of
from .commits import Peer, Saved, Store, StoreError, Table
from .disk import Disk
from .etcd.gateway import EtcdConfig
from .etcd.store import EtcdStore
from .witness import Witnessed, note_path, vouch

KNOCK = 1.0  # seconds for a dispatcher to answer


def opened(config: Config, wake: Callable[[], None]) -> Store:
    """`wake` is called, from any thread, when `take` has something. Raises StoreError."""
    if config.store == "etcd":
        return EtcdStore(_etcd(config), wake)
    return Witnessed(Disk(config.database), note_path(config.socket))


def migrate(config: Config, to: str) -> Saved:
    """The whole content, with its epoch and revision, from the other kind of store to this one, which must be empty.

    The one that it leaves is not opened again by mistake. Nobody may use either meanwhile. Raises StoreError.
    """
    if to == "etcd":
        disk = Disk(config.database)
        try:
            saved = _without_dispatchers(disk.load())
            EtcdStore.create(_etcd(config), saved)
            disk.moved_to(f"etcd ({', '.join(config.etcd)})")
        finally:
            disk.close()
        return saved
    saved = EtcdStore.read(_etcd(config))
    _stopped(saved)
    Disk.create(config.database, _without_dispatchers(saved))
    try:
        EtcdStore.moved_to(_etcd(config), saved.revision, str(config.database))
    except StoreError:
        config.database.unlink()
        raise
    vouch(note_path(config.socket), saved)
    return saved


def _stopped(saved: Saved) -> None:
    """Raises StoreError where a dispatcher still runs."""
    peers = {key[0]: record for (_, key), record in saved.records.items() if isinstance(record, Peer)}
    for name, peer in sorted(peers.items()):
        with contextlib.suppress(OSError), socket.create_connection(address_of(peer.address), KNOCK):
            raise StoreError(f"dispatcher {name} answers at {peer.address}: stop every dispatcher first")


def _without_dispatchers(saved: Saved) -> Saved:
    """Those make themselves known when they start."""
    for where in [where for where in saved.records if where[0] is Table.DISPATCHER]:
        del saved.records[where]
    return saved


def _etcd(config: Config) -> EtcdConfig:
    if not config.etcd:
        raise StoreError('etcd: give its addresses in dispatcher.toml, like etcd = ["http://10.0.0.1:2379"]')
    ca, cert, key = config.etcd_ca, config.etcd_cert, config.etcd_key
    return EtcdConfig(config.etcd, config.etcd_prefix, ca, cert, key)
