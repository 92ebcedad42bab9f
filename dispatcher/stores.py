# Owns: which store a configuration names, and moving a content from one to the other. Touches: nothing itself.
from __future__ import annotations

from collections.abc import Callable

from .commits import Saved, Store, StoreError, Table
from .config import Config
from .disk import Disk
from .etcd.gateway import EtcdConfig
from .etcd.store import EtcdStore


def opened(config: Config, wake: Callable[[], None]) -> Store:
    """`wake` is called, from any thread, when `take` has something. Raises StoreError."""
    return EtcdStore(_etcd(config), wake) if config.store == "etcd" else Disk(config.database)


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
    saved = _without_dispatchers(EtcdStore.read(_etcd(config)))
    Disk.create(config.database, saved)
    return saved


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
