# Owns: what stands between a guest and its start, or its coming: reasons to refuse it that this host knows by itself,
# and the hooks that wait for the dispatcher's word. Pure; `now` is monotonic seconds.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from slash32.model import Endpoint, EndpointKey
from slash32.net import host_prefix
from slash32.tag import Domain, quote

from ..compiler.calc import Calculation
from ..state import Locals

CLAIM_WAIT = 3.0  # seconds `virsh start` waits for the dispatcher's word on an address

Answer = Callable[[int, str], None]


@dataclass(slots=True)
class _Hook:
    """A `prepare` whose guest may not start before its addresses are granted."""

    keys: set[EndpointKey]
    answer: Answer
    until: float
    unheard: tuple[int, str] = (0, "")  # the answer where the dispatcher gives none


@dataclass(slots=True)
class Waiting:
    """Each hook is answered once."""

    _hooks: list[_Hook] = field(default_factory=list)

    def add(self, keys: set[EndpointKey], answer: Answer, now: float) -> None:
        """Unheard, it starts isolated and is connected when the dispatcher's answer comes."""
        self._hooks.append(_Hook(keys, answer, now + CLAIM_WAIT))

    def add_coming(self, domain: Domain, answer: Answer, now: float) -> None:
        """Unheard, it does not come: where it runs it has its network."""
        keys = {endpoint.key for endpoint, _ in domain.endpoints}
        self._hooks.append(_Hook(keys, answer, now + CLAIM_WAIT, (1, cannot_come(domain))))

    def answered(self, endpoint: Endpoint, refusal: str) -> None:
        """The dispatcher's word on one endpoint; "" grants it. One that is refused refuses its guest."""
        for hook in [h for h in self._hooks if endpoint.key in h.keys]:
            hook.keys.discard(endpoint.key)
            if refusal or not hook.keys:
                self._hooks.remove(hook)
                hook.answer(1 if refusal else 0, f"{quote(endpoint.domain)}: {refusal}" if refusal else "")

    def expire(self, now: float) -> None:
        """The dispatcher takes too long."""
        for hook in [h for h in self._hooks if now >= h.until]:
            self._hooks.remove(hook)
            hook.answer(*hook.unheard)

    def give_up(self) -> None:
        """Nobody will answer."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.answer(*hook.unheard)


def cannot_come(domain: Domain) -> str:
    """One line."""
    return (
        f"{quote(domain.name)}: cannot come to this host while no dispatcher answers it, for its addresses could not "
        f"follow: it stays where it is; see slash32-hostd status, then migrate it again"
    )


def outside(domain: Domain, guard_prefixes: tuple[str, ...]) -> str | None:
    """A tap that the guard does not match would escape it: one line."""
    for _, nic in domain.endpoints:
        if nic.target is not None and not nic.target.startswith(guard_prefixes):
            wanted = ", ".join(f"{p}*" for p in guard_prefixes)
            return (
                f"{quote(domain.name)}: interface {nic.mac}: target dev {quote(nic.target)} is outside the guarded "
                f"names ({wanted}): leave out <target dev>, or add its prefix to guard_prefixes in hostd.toml"
            )
    return None


def conflict(domain: Domain, locals_: Locals, elsewhere: Calculation | None = None) -> str | None:
    """An address or prefix of the guest that is in use: one line. `elsewhere`: with no dispatcher to ask, the last
    known routes tell who has it."""
    for endpoint, _ in domain.endpoints:
        taken = locals_.conflict(endpoint)
        if taken is None and elsewhere is not None:
            taken = _known_elsewhere(endpoint, elsewhere)
        if taken is not None:
            return f"{quote(endpoint.domain)}: {taken}"
    return None


def _known_elsewhere(endpoint: Endpoint, calc: Calculation) -> str | None:
    for prefix in (*map(host_prefix, endpoint.addresses), *endpoint.prefixes):
        others = [host for host in calc.world.routes.get(prefix, ()) if host != calc.host]
        if others:
            return f"{prefix} is in use on host {others[0]}, as far as is known without a dispatcher"
    return None
