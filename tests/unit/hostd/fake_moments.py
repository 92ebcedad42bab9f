# Owns: what must hold at every moment of a way from one state of a host to the next, watched on the model kernel.
from __future__ import annotations

from hostd.change.moves import PARKED
from hostd.compiler.desired import Desired
from hostd.compiler.forwarding import SetGroup
from hostd.compiler.ruleset import GROUP_MASK
from hostd.dataplane.nft.rules import fingerprint
from tests.fake_kernel import Model


class Moments:
    """Made when the old state stands and the new one is known; watches every change that packets could see."""

    def __init__(self, model: Model, desired: Desired, smooth: bool = True) -> None:
        """`smooth`: nothing is refused."""
        self.model, self.desired, self.smooth = model, desired, smooth
        self.groups = {ifindex: link.group for ifindex, link in model.links.items()}
        self.classes = dict(model.tables.classes)
        self.carried = self._carried(model)
        self.count = 0
        self.begun = len(model.log)
        model.watch = self.look

    @staticmethod
    def _carried(model: Model) -> dict[int, tuple[str, str] | None]:
        return {link.group: model.tables.classes.get(link.group) for link in model.links.values() if link.group}

    def look(self, model: Model) -> None:
        self.count += 1
        for ifindex, link in model.links.items():
            if link.group:
                self._open(model, ifindex, link.group)
        now = self._carried(model)
        for group in now.keys() & self.carried.keys():
            if now[group] != self.carried[group]:
                shall = {self._wanted(i) for i, link in model.links.items() if link.group == group}
                assert shall == {now[group]}, "a group means another class than a link in it is to have"
        self.carried = now

    def _wanted(self, ifindex: int) -> tuple[str, str] | None:
        tap = self.desired.taps.get(ifindex)
        return tap.chains if tap is not None else None

    def _open(self, model: Model, ifindex: int, group: int) -> None:
        if group & ~GROUP_MASK == PARKED:
            return
        was, shall = self.groups[ifindex], self.desired.taps.get(ifindex)
        chains = model.tables.classes.get(group)
        assert chains is not None, "a tap is in a group that is no class"
        assert chains in (self.classes.get(was), shall.chains if shall else None), "a class neither old nor new"
        if group == was or shall is None:
            return
        grants = {(ifindex, shall.mac, source) for source in (*shall.addresses, *shall.prefixes)}
        assert grants == {g for g in model.tables.grants if g[0] == ifindex}, "opened before it was admitted"
        for name in chains:
            assert [*map(fingerprint, model.tables.chains[name])] == [*map(fingerprint, self.desired.chains[name])]
        assert shall.name in model.sysctls, "opened before its interface was set up"
        if self.smooth:
            near = {n.address for n in model.neighbours if n.ifindex == ifindex}
            assert near >= set(shall.addresses), "opened before its neighbours were known"
            own = {prefix for prefix, route in self.desired.routes.items() if route.oif == ifindex}
            assert own <= {r.prefix for r in model.routes if r.oif == ifindex}, "opened before it was routed"

    def close_first(self) -> None:
        """Every tap that is withdrawn is closed before anything else happens."""
        log = self.model.log[self.begun :]
        doomed = {i for i, group in self.groups.items() if group and i not in self.desired.taps}
        assert {op.ifindex for op in log[: len(doomed)] if isinstance(op, SetGroup) and not op.group} == doomed
