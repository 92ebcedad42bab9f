# Owns: the records of the store in memory: the registry of the fleet, and what is known of hosts, dispatchers, changes.
# Pure. What is decided is written here first, each write with its inverse: until it is a commit it can be undone.
from __future__ import annotations

from collections.abc import Iterable, Mapping

from slash32.model import Endpoint, EndpointKey, Host
from slash32.policy import HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.resources import Resource, kind_of

from ..registry.registry import Registry
from ..store.commits import (
    AUDIT_KEPT,
    Coming,
    Commit,
    Entry,
    Holding,
    HostState,
    Key,
    Peer,
    Record,
    Saved,
    Table,
    Write,
    endpoint_key,
)

_ORDER = (Table.SUPERSEDED, Table.DISPATCHER, Table.RESOURCE, Table.HOST, Table.ENDPOINT, Table.EXPECTED, Table.AUDIT)
_NOTHING = HostState()
DISPATCHER = "dispatcher:"  # whose a dispatcher's key is; no host is called that


class Ledger:
    def __init__(self, saved: Saved) -> None:
        self.epoch, self.revision = saved.epoch, saved.revision
        self.registry = Registry()
        self.hosts: dict[str, HostState] = {}
        self.superseded: dict[str, int] = {}  # epochs given up for this one, and up to which revision
        self.dispatchers: dict[str, Peer] = {}
        self.audit: dict[Key, Entry] = {}  # in their order
        self.keys: dict[str, str] = {}  # public key -> host, or DISPATCHER
        self._bearers: dict[str, set[str]] = {}  # public key -> hosts
        self.writes: list[Write] = []  # since the last commit
        self.who = ""  # whose doing it is that is written now
        self.displaced: list[tuple[str, EndpointKey]] = []  # by the last commit: whose endpoint is not its own any more
        self._undo: list[tuple[Write, str]] = []  # what was there before, and whose doing it is that it is not
        self._noted = 0
        of: dict[Table, list[Key]] = {table: [] for table in _ORDER}
        for table, key in saved.records:
            of[table].append(key)
        for table, keys in of.items():
            for key in sorted(keys):
                self._set(table, key, saved.records[table, key])

    # -- reading --------------------------------------------------------------------------------------------------

    def saved(self) -> Saved:
        """All of it, speculation included."""
        found: dict[tuple[Table, Key], Record] = {}
        for kind, resources in self.resources().items():
            found |= {(Table.RESOURCE, (kind, name)): resource for name, resource in resources.items()}
        for key, claimed in self.registry.endpoints.items():
            found[Table.ENDPOINT, tuple(key)] = Holding(claimed.host, claimed.endpoint)
        for (host, key), coming in self.registry.expected.items():
            found[Table.EXPECTED, (host, *key)] = Coming(coming.endpoint)
        found |= {(Table.HOST, (name,)): state for name, state in self.hosts.items()}
        found |= {(Table.SUPERSEDED, (epoch,)): upto for epoch, upto in self.superseded.items()}
        found |= {(Table.DISPATCHER, (name,)): peer for name, peer in self.dispatchers.items()}
        found |= {(Table.AUDIT, key): entry for key, entry in self.audit.items()}
        return Saved(self.epoch, self.revision, found)

    def resources(self) -> Mapping[str, Mapping[str, Resource]]:
        """By kind and name."""
        registry = self.registry
        return {
            "GlobalNetworkPolicy": registry.policies,
            "StagedGlobalNetworkPolicy": registry.staged,
            "Tier": registry.tiers,
            "GlobalNetworkSet": registry.network_sets,
            "HostEndpoint": registry.host_endpoints,
            "Profile": registry.profiles,
            "Host": registry.hosts,
        }

    def host(self, name: str) -> HostState:
        return self.hosts.get(name, _NOTHING)

    def _get(self, table: Table, key: Key) -> Record | None:
        match table:
            case Table.RESOURCE:
                return self.resources()[key[0]].get(key[1])
            case Table.ENDPOINT:
                claimed = self.registry.endpoints.get(endpoint_key(key))
                return None if claimed is None else Holding(claimed.host, claimed.endpoint)
            case Table.EXPECTED:
                coming = self.registry.expected.get((key[0], endpoint_key(key[1:])))
                return None if coming is None else Coming(coming.endpoint)
            case Table.HOST:
                return self.hosts.get(key[0])
            case Table.SUPERSEDED:
                return self.superseded.get(key[0])
            case Table.DISPATCHER:
                return self.dispatchers.get(key[0])
            case Table.AUDIT:
                return self.audit.get(key)

    # -- writing, until it is a commit ----------------------------------------------------------------------------

    def write(self, table: Table, key: Key, record: Record | None) -> None:
        """The caller has checked it."""
        before = self._get(table, key)
        if before == record:
            return
        self._undo.append((Write(table, key, before), self.who))
        self.writes.append(Write(table, key, record))
        self._set(table, key, record)

    def put(self, resource: Resource) -> None:
        self.write(Table.RESOURCE, (kind_of(resource), resource.name), resource)

    def delete(self, kind: str, name: str) -> None:
        """A host goes with all that is known of it."""
        if kind == "Host":
            for key in sorted(self.registry.of_host(name)):
                self.release(key)
            self.expect_nothing(name)
            self.write(Table.HOST, (name,), None)
        self.write(Table.RESOURCE, (kind, name), None)

    def claim(self, host: str, endpoint: Endpoint) -> None:
        self.write(Table.ENDPOINT, tuple(endpoint.key), Holding(host, endpoint))

    def release(self, key: EndpointKey) -> None:
        self.write(Table.ENDPOINT, tuple(key), None)

    def expect(self, host: str, endpoint: Endpoint) -> None:
        self.write(Table.EXPECTED, (host, *endpoint.key), Coming(endpoint))

    def expect_no_more(self, host: str, key: EndpointKey) -> None:
        self.write(Table.EXPECTED, (host, *key), None)

    def expect_nothing(self, host: str) -> None:
        for key in sorted(self.registry.expected_at(host)):
            self.expect_no_more(host, key)

    def set_host(self, name: str, state: HostState) -> None:
        self.write(Table.HOST, (name,), None if state == _NOTHING else state)

    def note(self, at: float, what: str, change: str) -> None:
        """Who did what, in the commit that does it."""
        self._noted += 1
        key = (f"{self.revision + 1:020d}", f"{self._noted:05d}")
        self.write(Table.AUDIT, key, Entry(at, self.who, what, change))
        if len(self.audit) > AUDIT_KEPT:
            self.write(Table.AUDIT, next(iter(self.audit)), None)

    def undo(self, mark: int = 0) -> None:
        """All that was written after the first `mark` writes."""
        trimmed = any(table is Table.AUDIT and before is not None for (table, _, before), _ in self._undo[mark:])
        for (table, key, before), _ in reversed(self._undo[mark:]):
            self._set(table, key, before)
        if trimmed:  # what came back stands last
            self.audit = dict(sorted(self.audit.items()))
        del self._undo[mark:], self.writes[mark:]
        self._noted = 0 if mark == 0 else self._noted

    def landed(self, revision: int) -> Commit:
        """What was written is a commit now."""
        commit = Commit(revision, tuple(self.writes))
        self.displaced = [
            (before.record.host, endpoint_key(before.key))
            for before, who in self._undo
            if isinstance(before.record, Holding) and who != of_host(before.record.host) and self._lost(before.record)
        ]
        self.revision = revision
        self.writes, self._undo, self._noted = [], [], 0
        return commit

    def _lost(self, holding: Holding) -> bool:
        present = self.registry.endpoints.get(holding.endpoint.key)
        return present is None or present.host != holding.host

    # -- what others committed ------------------------------------------------------------------------------------

    def follow(self, commit: Commit) -> None:
        """The next one, by another dispatcher. Nothing of ours is speculative now."""
        assert not self.writes
        before = [self._get(table, key) for table, key, _ in commit.writes if table is Table.ENDPOINT]
        for table, key, record in commit.writes:
            self._set(table, key, record)
        held = [holding for holding in before if isinstance(holding, Holding)]
        self.displaced = [(h.host, h.endpoint.key) for h in held if self._lost(h)]
        self.revision = commit.revision

    def difference(self, saved: Saved) -> Commit:
        """The commit that would lead from here to there: what goes first, in the order that records rest on others."""
        mine = self.saved().records
        gone = sorted(mine.keys() - saved.records.keys(), key=_place, reverse=True)
        fresh = sorted((w for w, record in saved.records.items() if mine.get(w) != record), key=_place)
        writes = [*(Write(*w, None) for w in gone), *(Write(*w, saved.records[w]) for w in fresh)]
        return Commit(saved.revision, tuple(writes))

    def _set(self, table: Table, key: Key, record: Record | None) -> None:
        match table, record:
            case Table.RESOURCE, _:
                self._set_resource(key[0], key[1], record)
            case Table.ENDPOINT, Holding(host, endpoint):
                self.registry.claim(host, endpoint)
            case Table.ENDPOINT, None:
                self.registry.release(endpoint_key(key))
            case Table.EXPECTED, Coming(endpoint):
                self.registry.expect(key[0], endpoint)
            case Table.EXPECTED, None:
                self.registry.expect_no_more(key[0], endpoint_key(key[1:]))
            case Table.HOST, HostState() | None:
                self._set_host(key[0], record)
            case Table.DISPATCHER, Peer():
                self._set_dispatcher(key[0], record)
            case Table.AUDIT, Entry():
                self.audit[key] = record
            case Table.AUDIT, None:
                del self.audit[key]
            case Table.DISPATCHER, None:
                self._set_dispatcher(key[0], None)
            case Table.SUPERSEDED, None:
                del self.superseded[key[0]]
            case Table.SUPERSEDED, int():
                self.superseded[key[0]] = record
            case _:
                raise AssertionError(f"{table.value} {key}: {record!r}")

    def _set_resource(self, kind: str, name: str, resource: object) -> None:
        registry = self.registry
        match resource:
            case Host():
                self._forget_keys(name)
                registry.put_host(resource)
                self._learn_keys(name)
            case Policy():
                registry.put_policy(resource)
            case Profile():
                registry.put_profile(resource)
            case Tier():
                registry.put_tier(resource)
            case NetworkSet():
                registry.put_network_set(resource)
            case HostEndpoint():
                registry.put_host_endpoint(resource)
            case _:
                self._delete_resource(kind, name)

    def _delete_resource(self, kind: str, name: str) -> None:
        registry = self.registry
        match kind:
            case "GlobalNetworkPolicy" | "StagedGlobalNetworkPolicy":
                registry.delete_policy(name, staged=kind != "GlobalNetworkPolicy")
            case "Tier":
                registry.delete_tier(name)
            case "GlobalNetworkSet":
                registry.delete_network_set(name)
            case "HostEndpoint":
                registry.delete_host_endpoint(name)
            case "Profile":
                registry.delete_profile(name)
            case _:
                self._forget_keys(name)
                registry.delete_host(name)

    def _set_host(self, name: str, state: HostState | None) -> None:
        self._forget_keys(name)
        if state is None:
            self.hosts.pop(name, None)
        else:
            self.hosts[name] = state
        self._learn_keys(name)
        self.registry.report_addresses(name, self.host(name).addresses)

    def _set_dispatcher(self, name: str, peer: Peer | None) -> None:
        before = self.dispatchers.pop(name, None)
        if peer is not None:
            self.dispatchers[name] = peer
        for each in filter(None, (before, peer)):
            self._settle_key(each.public_key)

    def _forget_keys(self, name: str) -> None:
        for key in self._keys_of(name):
            self._bearers[key].discard(name)
            self._settle_key(key)

    def _learn_keys(self, name: str) -> None:
        for key in self._keys_of(name):
            self._bearers.setdefault(key, set()).add(name)
            self._settle_key(key)

    def _settle_key(self, key: str) -> None:
        """Whose it is does not depend on the order of writes: one commit may take it from one host to another."""
        bearers = self._bearers.get(key)
        if any(peer.public_key == key for peer in self.dispatchers.values()):
            self.keys[key] = DISPATCHER
        elif bearers:
            self.keys[key] = min(bearers)
        else:
            self.keys.pop(key, None)
            self._bearers.pop(key, None)

    def _keys_of(self, name: str) -> Iterable[str]:
        host = self.registry.hosts.get(name)
        return () if host is None else {host.public_key, self.host(name).next_key} - {""}


def of_host(name: str) -> str:
    """Whose doing it is, where a host itself says so."""
    return f"host {name}"


def _place(where: tuple[Table, Key]) -> tuple[int, Key]:
    return _ORDER.index(where[0]), where[1]
