# Owns: the chains in which host endpoints stand (ruleset.HOST_CHAINS): which of the host's interfaces asks what. Pure.
# All of them are always desired, maybe empty: none is ever deleted, and an empty one closes nothing.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from slash32.policy import ANY_INTERFACE, HostEndpoint

from .desired import ClassChains
from .ruleset import (
    GUEST_EGRESS,
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
    Interface,
    Jump,
    Match,
    Rule,
    Verdict,
)


class Standing(NamedTuple):
    """A host endpoint with the chains that it asks."""

    endpoint: HostEndpoint
    local: ClassChains
    forward: tuple[str | None, str | None]  # egress, ingress; None: no policy applies to what is forwarded


def in_order(endpoints: Iterable[HostEndpoint]) -> list[HostEndpoint]:
    """One for each interface, the first by name; the one for every interface last."""
    by_interface = {e.interface: e for e in sorted(endpoints, key=lambda e: e.name, reverse=True)}
    return sorted(by_interface.values(), key=lambda e: (e.interface == ANY_INTERFACE, e.name))


def host_chains(standing: Sequence[Standing]) -> dict[str, tuple[Rule, ...]]:
    """`standing`: in order."""
    anywhere = next((s for s in standing if s.endpoint.interface == ANY_INTERFACE), None)
    guests, from_guests, to_guests = _guests(anywhere)
    return {
        HOST_IN: tuple(_rule(s, incoming=True, chain=s.local.ingress) for s in standing),
        HOST_OUT: tuple(_rule(s, incoming=False, chain=s.local.egress) for s in standing),
        HOST_FORWARD_IN: tuple(_forward([(s, s.forward[1]) for s in standing], incoming=True)),
        HOST_FORWARD_OUT: tuple(_forward([(s, s.forward[0]) for s in standing], incoming=False)),
        HOST_GUESTS: guests,
        HOST_FROM_GUESTS: from_guests,
        HOST_TO_GUESTS: to_guests,
    }


def _guests(anywhere: Standing | None) -> tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]:
    if anywhere is None:
        return (), (), ()
    why = _comment(anywhere)
    return (
        (Rule((), Jump(GUEST_EGRESS), why),),
        (Rule((), Jump(anywhere.local.ingress), why),),
        (Rule((), Jump(anywhere.local.egress), why),),
    )


def _forward(asked: Sequence[tuple[Standing, str | None]], incoming: bool) -> Iterator[Rule]:
    """Whom nothing applies to passes; said only where the one for every interface would have it otherwise."""
    anywhere = any(chain and standing.endpoint.interface == ANY_INTERFACE for standing, chain in asked)
    for standing, chain in asked:
        if chain is not None:
            yield _rule(standing, incoming, chain)
        elif anywhere and standing.endpoint.interface != ANY_INTERFACE:
            yield Rule(_where(standing, incoming), Verdict.ACCEPT, _comment(standing))


def _rule(standing: Standing, incoming: bool, chain: str) -> Rule:
    return Rule(_where(standing, incoming), Jump(chain), _comment(standing))


def _where(standing: Standing, incoming: bool) -> tuple[Match, ...]:
    name = standing.endpoint.interface
    return () if name == ANY_INTERFACE else (Interface(incoming, name),)


def _comment(standing: Standing) -> str:
    return f"host endpoint {standing.endpoint.name[:40]}"
