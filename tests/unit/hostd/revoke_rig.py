# A host with three guests and their tracked flows, on the model kernel, and what a change of policy makes of them.
from __future__ import annotations

from dataclasses import replace

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.revocation.revoke import Flow
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import Address, Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.policy import Action, Direction, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import Commit, Run, Scene, key

BASE = Guard().group_base
WEB, DB, OTHER, FAR = map(parse_address, ("10.65.0.1", "10.65.0.2", "10.65.0.3", "10.99.0.1"))
WEB6, DB6 = map(parse_address, ("fd00:65::1", "fd00:65::2"))
BEHIND = parse_prefix("10.66.0.0/26")
ALLOW, DENY = Rule(Action.ALLOW), Rule(Action.DENY)
PORTS = Peer(ports=(PortRange(80, 80),))
TO_DB = Rule(Action.ALLOW, 6, destination=Peer(selector='role == "db"'))
BOTH = (Direction.INGRESS, Direction.EGRESS)


def policy(name: str, whom: str, ingress: tuple[Rule, ...], egress: tuple[Rule, ...], keep: bool = False) -> Policy:
    types = tuple(d for d, rules in zip(BOTH, (ingress, egress), strict=True) if rules)
    return Policy(name, whom, types, None, ingress, egress, keep_established=keep)


ANY_DB = policy("db", 'role == "db"', (ALLOW,), (ALLOW,))


def flow(source: Address, destination: Address, port: int = 80, begun: int = 40000, protocol: int = 6) -> Flow:
    packet = Packet(source, destination, protocol, begun, port)
    return Flow(repr(packet).encode(), packet)


class Host:
    """web (10.65.0.1) on vnet100, db (10.65.0.2) on vnet101, other (10.65.0.3) on vnet102. All may all, but web says
    nothing but TCP to db."""

    def __init__(self) -> None:
        self.scene = Scene()
        self.model = Model(links={100 + n: Link(100 + n, f"vnet{100 + n}", 0, bytes(6), True) for n in range(3)})
        self.owed: list[bool] = []
        self.settler = self.start()
        for number, (role, own) in enumerate((("web", (WEB, WEB6)), ("db", (DB, DB6)), ("other", (OTHER,)))):
            self.run(number, Endpoint(key(number), role, {"role": role}, ("open",), own))
        self.put(
            Profile("open", (ALLOW,), (ALLOW,)),
            policy("web", 'role == "web"', (), (TO_DB,)),
            policy("odd", 'role == "odd"', (DENY,), ()),
        )
        self.members('role == "db"', DB, DB6)
        self.model.walks = 0
        self.owed.clear()

    def start(self) -> Settler:
        self.kernel = FakeKernel(self.model)
        self.settler = Settler(self.kernel, self.scene.calc, Limits(BASE), ("vnet",), owes=self.owed.append)
        assert self.settler.resync() == []
        return self.settler

    def run(self, number: int, endpoint: Endpoint) -> None:
        tap = Carrier(f"vnet{100 + number}", 100 + number)
        self.scene.take(Run(number, Local(endpoint, "qemu", Phase.LIVE, tap, endpoint)))
        self.settle()

    def label(self, number: int, **labels: str) -> None:
        local = self.scene.locals.get(key(number))
        assert local is not None
        self.run(number, replace(local.endpoint, labels=labels))

    def put(self, *items: Policy | Profile) -> None:
        kinds = {Policy: Kind.POLICY, Profile: Kind.PROFILE}
        self.take({ObjectKey(kinds[type(item)], item.name): item for item in items})

    def gone(self, kind: Kind, name: str) -> None:
        self.take({ObjectKey(kind, name): None})

    def members(self, selector: str, *members: Address | Prefix) -> None:
        some = AddressSet({m for m in members if isinstance(m, bytes)}, {m for m in members if isinstance(m, Prefix)})
        self.take({ObjectKey(Kind.SET, selector): some})

    def take(self, values: dict[ObjectKey, Value | None]) -> None:
        self.scene.take(Commit(tuple(values.items())))
        self.settle()
        assert self.settler.failures() == []

    def settle(self) -> None:
        self.scene.rest()
        dirty, self.scene.dirty = self.scene.dirty, Dirty()
        self.settler.settle(dirty)

    def join(self, rules: tuple[Rule, ...] = (ALLOW,)) -> None:
        """The guest db, which a policy lets do all, comes under one more, which is asked first. Another one stays."""
        self.put(ANY_DB, policy("also", "has(more)", rules, rules))
        self.label(2, role="db")
        self.model.walks = 0
        self.owed.clear()
        self.label(1, role="db", more="yes")

    def track(self, *flows: Flow) -> None:
        self.model.tracked = set(flows)


SESSION, SIX, BACK, STRANGER = flow(WEB, DB), flow(WEB6, DB6), flow(DB, WEB, 90), flow(OTHER, DB)
ALL = (SESSION, SIX, BACK, STRANGER)
