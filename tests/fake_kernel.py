# Owns: a model of the kernel in memory: nf_tables' rules of existence (what is named must be there, what is used must
# not go), links, routes, neighbours. hostd's real door (hostd.dataplane.kernel) works on it as on the real one.
from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hostd.change.plan import Admit, PutSysctls
from hostd.compiler.chains import targets
from hostd.compiler.desired import Member
from hostd.compiler.forwarding import (
    Add,
    Delete,
    Failure,
    Link,
    Neighbour,
    Operation,
    Replace,
    Route,
    SetGroup,
    Take,
    TapAddress,
    Way,
)
from hostd.compiler.ruleset import GUEST_EGRESS, HOST_CHAINS, Guard, InSet, Rule, SetKind, SetSpec
from hostd.dataplane.groups import Groups
from hostd.dataplane.kernel import Kernel
from hostd.dataplane.netlink import Refusal
from hostd.dataplane.nft.admission import Admission
from hostd.dataplane.nft.reading import Actual as Dumped
from hostd.dataplane.nft.rules import fingerprint
from hostd.dataplane.nft.transaction import TransactionRefused
from hostd.revocation.judge import within
from hostd.revocation.revoke import Flow, OwnSocket
from slash32.net import Address, Prefix, host_prefix


class Killed(Exception):
    """hostd died here."""


@dataclass
class Tables:
    """What one transaction changes."""

    sets: dict[str, SetSpec] = field(default_factory=dict)
    members: dict[str, set[Member]] = field(default_factory=dict)
    chains: dict[str, tuple[Rule, ...]] = field(default_factory=lambda: dict.fromkeys(HOST_CHAINS, ()))
    classes: dict[int, tuple[str, str]] = field(default_factory=dict)
    grants: set[tuple[int, bytes, Member]] = field(default_factory=set)
    exempt: set[int] = field(default_factory=set)

    def copied(self) -> Tables:
        return Tables(
            dict(self.sets), {n: set(m) for n, m in self.members.items()}, dict(self.chains), dict(self.classes),
            set(self.grants), set(self.exempt),
        )  # fmt: skip

    def uses_set(self, name: str) -> bool:
        matches = (m for rules in self.chains.values() for r in rules for m in r.matches)
        return any(isinstance(m, InSet) and m.set == name for m in matches)

    def uses_chain(self, name: str) -> bool:
        jumps = any(name in targets(rules) for rules in self.chains.values())
        return jumps or any(name in chains for chains in self.classes.values())


@dataclass
class Model:
    tables: Tables = field(default_factory=Tables)
    links: dict[int, Link] = field(default_factory=dict)
    routes: set[Route] = field(default_factory=set)
    neighbours: set[Neighbour] = field(default_factory=set)
    gateways: set[TapAddress] = field(default_factory=set)
    sysctls: set[str] = field(default_factory=set)
    foreign_routes: set[Prefix] = field(default_factory=set)  # in the place that a route of ours would take
    refuses: Callable[[str, object], bool] = lambda _what, _item: False
    watch: Callable[[Model], None] = lambda _: None  # after each change that packets could see
    own: set[Address] = field(default_factory=set)  # the host's
    sockets: list[OwnSocket] = field(default_factory=list)  # that were ended
    tracked: set[Flow] = field(default_factory=set)
    begun: set[Flow] = field(default_factory=set)  # for tests: what was tracked before
    walks: int = 0  # through what is tracked
    left: int | None = None  # changes until hostd is killed; None: it is not
    log: list[object] = field(default_factory=list)  # link operations, "filter" for a transaction

    @property
    def writes(self) -> int:
        return len(self.log)

    def change(self, what: object) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1
        self.log.append(what)

    def copied(self) -> Model:
        return Model(
            self.tables.copied(), dict(self.links), set(self.routes), set(self.neighbours), set(self.gateways),
            set(self.sysctls), set(self.foreign_routes),
        )  # fmt: skip


class FakeTransaction:
    """Operations are tried one by one on a copy, which becomes the tables if all were possible."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tables = model.tables.copied()
        self.done: list[tuple[str, object, Hashable, int]] = []  # operation, its object, label, errno

    def _note(self, what: str, item: object, label: Hashable, problem: int = 0) -> bool:
        if not problem and self.model.refuses(what, item):
            problem = errno.EINVAL
        self.done.append((what, item, label, problem))
        return not problem

    def add_set(self, name: str, spec: SetSpec, label: Hashable) -> None:
        clash = self.tables.sets.get(name, spec) != spec
        if self._note("add set", name, label, errno.EEXIST * clash):
            self.tables.sets[name] = spec
            self.tables.members.setdefault(name, set())

    def delete_set(self, name: str, label: Hashable) -> None:
        missing, used = name not in self.tables.sets, self.tables.uses_set(name)
        if self._note("delete set", name, label, errno.ENOENT * missing or errno.EBUSY * used):
            del self.tables.sets[name], self.tables.members[name]

    def flush_set(self, name: str, label: Hashable) -> None:
        if self._note("flush set", name, label, errno.ENOENT * (name not in self.tables.sets)):
            self.tables.members[name].clear()

    def add_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None:
        given, spec = list(members), self.tables.sets.get(name)
        have = self.tables.members.get(name, set())
        problem = 0 if spec is not None else errno.ENOENT
        if spec is not None and kind in (SetKind.ADDR4, SetKind.ADDR6) and len(have | set(given)) > spec.size:
            problem = errno.ENFILE
        nets = [m for m in (*have, *given) if isinstance(m, Prefix)]
        if any(a is not b and a.contains(b.network) for a in nets for b in nets):
            problem = errno.EEXIST
        if self._note("add members", name, label, problem):
            have.update(given)

    def delete_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None:
        given = set(members)
        missing = not given <= self.tables.members.get(name, set())
        if self._note("delete members", name, label, errno.ENOENT * missing):
            self.tables.members[name] -= given

    def put_chain(self, name: str, rules: Sequence[Rule], label: Hashable) -> None:
        asked = {m.set for r in rules for m in r.matches if isinstance(m, InSet)}
        lacks = not asked <= self.tables.sets.keys() or not {*targets(rules)} <= {GUEST_EGRESS, *self.tables.chains}
        if self._note("put chain", name, label, errno.ENOENT * lacks):
            self.tables.chains[name] = tuple(rules)

    def delete_chain(self, name: str, label: Hashable) -> None:
        assert name not in HOST_CHAINS, "the skeleton's own"
        missing, used = name not in self.tables.chains, self.tables.uses_chain(name)
        if self._note("delete chain", name, label, errno.ENOENT * missing or errno.EBUSY * used):
            del self.tables.chains[name]

    def put_class(self, number: int, from_chain: str, to_chain: str, label: Hashable) -> None:
        chains = (from_chain, to_chain)
        clash = self.tables.classes.get(number, chains) != chains
        lacks = not set(chains) <= self.tables.chains.keys()
        if self._note("put class", number, label, errno.EEXIST * clash or errno.ENOENT * lacks):
            self.tables.classes[number] = chains

    def delete_class(self, number: int, label: Hashable) -> None:
        if self._note("delete class", number, label, errno.ENOENT * (number not in self.tables.classes)):
            del self.tables.classes[number]

    def admit(self, admission: Admission, label: Hashable) -> None:
        after = self.tables.grants | set(admission.grants())
        nets = [source for i, _, source in after if i == admission.ifindex and isinstance(source, Prefix)]
        overlap = any(a is not b and a.contains(b.network) for a in nets for b in nets)
        if self._note("admit", admission.ifindex, label, errno.EEXIST * overlap):
            self.tables.grants = after

    def expel(self, admission: Admission, label: Hashable) -> None:
        given = set(admission.grants())
        if self._note("expel", admission.ifindex, label, errno.ENOENT * (not given <= self.tables.grants)):
            self.tables.grants -= given

    def exempt(self, ifindex: int, on: bool, label: Hashable) -> None:
        if self._note("exempt", ifindex, label, errno.ENOENT * (not on and ifindex not in self.tables.exempt)):
            (self.tables.exempt.add if on else self.tables.exempt.discard)(ifindex)

    def commit(self) -> None:
        if not self.done:
            return
        for what, item, label, problem in self.done:
            if problem:
                raise TransactionRefused(label, Refusal(0, problem, ""), f"{what} {item}")
        self.model.change("filter")
        self.model.tables = self.tables
        self.model.watch(self.model)


class FakeTable:
    def __init__(self, model: Model) -> None:
        self.model = model

    def load(self, _exempt: Iterable[int] = ()) -> bool:
        return False

    def transaction(self) -> FakeTransaction:
        return FakeTransaction(self.model)

    @staticmethod
    def fingerprints(rules: Sequence[Rule]) -> tuple[str, ...]:
        return tuple(map(fingerprint, rules))

    def read(self) -> Dumped:
        t = self.model.tables.copied()
        return Dumped(
            True, {n: tuple(map(fingerprint, rules)) for n, rules in t.chains.items()}, dict(t.sets),
            {n: frozenset(m) for n, m in t.members.items()},  # type: ignore[misc]
            t.classes, frozenset(t.grants), frozenset(t.exempt),
        )  # fmt: skip


class FakeRtnl:
    def __init__(self, model: Model) -> None:
        self.model = model

    def link(self, name_or_index: str | int) -> Link | None:
        return next((x for x in self.links().values() if name_or_index in (x.ifindex, x.name)), None)

    def links(self) -> dict[int, Link]:
        return self.model.links

    def routes(self) -> set[Route]:
        return set(self.model.routes)

    def neighbours(self) -> set[Neighbour]:
        return set(self.model.neighbours)

    def tap_addresses(self) -> set[TapAddress]:
        return set(self.model.gateways)

    def change(self, operations: Sequence[Operation]) -> list[Failure]:
        return [f for op in operations for f in self._one(op)]

    def _one(self, op: Operation) -> Iterator[Failure]:
        self.model.change(op)
        problem = "refused" if self.model.refuses(type(op).__name__, op) else self._do(op)
        if problem:
            yield Failure(op, errno.EINVAL, problem)
        else:
            self.model.watch(self.model)

    def _do(self, op: Operation) -> str:
        model = self.model
        match op:
            case SetGroup(ifindex, number):
                if ifindex in model.links:
                    model.links[ifindex] = model.links[ifindex]._replace(group=number)
                return "no such device" if ifindex not in model.links and number else ""
            case Replace(old, new):
                return self._route(new) or (model.routes.discard(old) if old != new else None) or ""
            case Add(Route() as route) | Take(route):
                if route.prefix in model.foreign_routes and not isinstance(op, Take):
                    return f"route {route.prefix} exists already"
                model.foreign_routes.discard(route.prefix)
                model.routes -= {r for r in model.routes if r.prefix == route.prefix}
                return self._route(route)
            case Delete(Route() as route):
                model.routes -= {r for r in model.routes if route in (r, r._replace(oif=0))}
            case Add(Neighbour(ifindex, address, _) as neighbour):
                if ifindex not in model.links:
                    return "no such device"
                model.neighbours -= {n for n in model.neighbours if n[:2] == (ifindex, address)}
                model.neighbours.add(neighbour)
            case Delete(Neighbour(ifindex, address, _)):
                model.neighbours -= {n for n in model.neighbours if n[:2] == (ifindex, address)}
            case Add(TapAddress() as gateway):
                if gateway.ifindex not in model.links:
                    return "no such device"
                model.gateways.add(gateway)
            case Delete(TapAddress() as gateway):
                model.gateways.discard(gateway)
        return ""

    def _route(self, route: Route) -> str:
        if route.oif > 1 and route.oif not in self.model.links:
            return "no such device"
        self.model.routes.add(route)
        return ""


class FakeFlows:
    """What is tracked is what a test puts into `tracked`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def forget(self, owned: Collection[Member]) -> int:
        return self.end(owned, lambda _: True)

    def end(self, near: Collection[Member], condemned: Callable[[Flow], bool]) -> int:
        if self.model.refuses("walk", near):
            raise PermissionError(errno.EPERM, "not permitted")
        self.model.walks += 1
        doomed = {flow for flow in self.near(self.model, near) if condemned(flow)}
        self.model.tracked -= doomed
        return len(doomed)

    @staticmethod
    def near(model: Model, owned: Collection[Member]) -> set[Flow]:
        inside = within(each if isinstance(each, Prefix) else host_prefix(each) for each in owned)
        return {f for f in model.tracked if inside(f.packet.source) or inside(f.packet.destination)}


class FakeKernel(Kernel):
    """The real door on a model: everything but what it opens."""

    def __init__(self, model: Model, guard: Guard | None = None) -> None:
        self.model = model
        self.guard = guard or Guard()
        self.table = FakeTable(model)  # type: ignore[assignment]
        self.rtnl = FakeRtnl(model)  # type: ignore[assignment]
        self.flows = FakeFlows(model)  # type: ignore[assignment]
        self.groups = Groups(lambda op: self.rtnl.change([op]), links="/nowhere")
        self.ipv6 = True

    def way_to(self, address: Address) -> Way:
        return Way(address in self.model.own, "" if address in self.model.own else "up0")

    def end_sockets(self, of: Collection[OwnSocket]) -> None:
        self.model.sockets += of

    def tap_sysctls_hold(self, name: str) -> bool:
        return name in self.model.sysctls or self.rtnl.link(name) is None

    def end_flows(self, of: Admit) -> None:
        if self.model.refuses("flows", of.ifindex):
            raise PermissionError(errno.EPERM, "not permitted")
        owned = [*of.prefixes, *map(host_prefix, of.addresses)]
        self.model.tracked -= FakeFlows.near(self.model, owned)

    def write_sysctls(self, tap: str) -> None:
        self.model.change(PutSysctls(0, tap))
        if self.rtnl.link(tap) is None or self.model.refuses("sysctl", tap):
            raise FileNotFoundError(errno.ENOENT, "no such file", tap)
        self.model.sysctls.add(tap)
