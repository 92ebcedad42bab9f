# Owns: what the dispatcher has, as a world: all resources and endpoints, of one revision where that can be had.
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from slash32.edits import Id, identified
from slash32.errors import Slash32Error
from slash32.matching import World
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import parse_address, parse_prefix
from slash32.policy import HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.resources import KINDS, Resource, decode

from .client import Client, Json

_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fleet:
    resources: Mapping[Id, Resource]
    endpoints: tuple[Endpoint, ...]
    places: Mapping[EndpointKey, str] = field(default_factory=dict)
    steady: bool = True  # False: it changed while it was read

    def world(self, resources: Mapping[Id, Resource] | None = None) -> World:
        """With its own resources, or with others."""
        have = list((self.resources if resources is None else resources).values())
        return World(
            self.endpoints,
            _of(Policy, have),
            _of(Profile, have),
            _of(Tier, have),
            _of(NetworkSet, have),
            _of(HostEndpoint, have),
            self.places,
        )


def read(client: Client) -> Fleet:
    for _ in range(_TRIES):
        revision = client.get("status").get("revision")
        documents = [item for kind in KINDS for item in client.items("resources", kind)]
        items = client.items("endpoints")
        steady = client.get("status").get("revision") == revision
        if steady:
            break
    resources = identified(decode(document, stored=True) for document in documents)
    endpoints = [(_endpoint(item), str(item.get("host") or "")) for item in items]
    places = {endpoint.key: host for endpoint, host in endpoints if host}
    return Fleet(resources, tuple(endpoint for endpoint, _ in endpoints), places, steady)


def _endpoint(item: Json) -> Endpoint:
    try:
        return Endpoint(
            EndpointKey(str(item["uuid"]), str(item["mac"])),
            str(item["domain"]),
            {str(key): str(value) for key, value in item["labels"].items()},
            tuple(map(str, item["profiles"])),
            tuple(map(parse_address, item["addresses"])),
            tuple(SharedAddress(parse_address(s["address"]), str(s["group"])) for s in item["shared"]),
            tuple(map(parse_prefix, item["prefixes"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Slash32Error(
            "the dispatcher answered endpoints that this slash32 cannot read: are versions equal?"
        ) from None


def _of(kind: type[T], resources: Iterable[object]) -> tuple[T, ...]:
    return tuple(each for each in resources if isinstance(each, kind))
