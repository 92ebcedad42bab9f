# Owns: what hosts' claims, releases and reports mean, and which of them were refused. Pure. The border against a host
# that lies; what it may say at all is in ownership.py.
from __future__ import annotations

from collections.abc import Callable, Iterator

from slash32 import wire
from slash32.model import Endpoint, EndpointKey
from slash32.wire import Refusal

from .ledger import Ledger

MAX_HELD = 4 * wire.MAX_REPORT  # addresses and prefixes of one host's guests: each is a route on every host
MAX_ALARMS = 1000  # of one host: it hides no other's
Alarms = dict[str, dict[EndpointKey, str]]


class Claims:
    def __init__(self, ledger: Ledger, refused: Callable[[str, EndpointKey, str], None]) -> None:
        """`refused` is told of each refusal that is news: host, endpoint, why."""
        self.alarms: Alarms = {}  # refused claims, by host
        self._ledger, self._refused = ledger, refused

    def report(self, host: str, endpoints: tuple[Endpoint, ...]) -> list[Refusal]:
        """All that the host has; what it expects it says after this."""
        self._ledger.expect_nothing(host)
        live = {endpoint.key for endpoint in endpoints}
        for key in sorted(set(self._ledger.registry.of_host(host)) - live):
            self.release(host, key)
        for key in self.alarms.get(host, {}).keys() - live:
            self._calm(host, key)
        return [refusal for endpoint in endpoints for refusal in self.claim(host, endpoint)]

    def claim(self, host: str, endpoint: Endpoint) -> list[Refusal]:
        present = self._ledger.registry.endpoints.get(endpoint.key)
        if present is not None and present.host == host and present.endpoint == endpoint:
            self._calm(host, endpoint.key)
            return []
        refusal = next(self._against(host, endpoint), None)
        if refusal is not None:
            self.alarm(host, endpoint.key, refusal)
            return [Refusal(endpoint.key, refusal)]
        self._calm(host, endpoint.key)
        self._ledger.claim(host, endpoint)
        self._arrived(host, endpoint.key)
        return []

    def expect(self, host: str, endpoint: Endpoint) -> list[Refusal]:
        """A guest that migrates there. It learns no more by that than by a claim, and gets nothing: it needs no owner's
        consent, but it must be one that the host may claim when it has come."""
        present = self._ledger.registry.endpoints.get(endpoint.key)
        if present is not None and present.host == host:
            return []
        refusal = next(self._against(host, endpoint, coming=True), None)
        if refusal is not None:
            self._refused(host, endpoint.key, refusal)
            return [Refusal(endpoint.key, refusal)]
        self._ledger.expect(host, endpoint)
        return []

    def _arrived(self, host: str, key: EndpointKey) -> None:
        """Or it will not come."""
        if key in self._ledger.registry.expected_at(host):
            self._ledger.expect_no_more(host, key)

    def _against(self, host: str, endpoint: Endpoint, coming: bool = False) -> Iterator[str]:
        """Why it cannot be, each in one line."""
        registry, fenced = self._ledger.registry, self._ledger.host(host).fenced
        if fenced:
            yield f"host {host} is fenced by an operator ({fenced}): slash32 host unfence {host}"
        refusal = registry.refusal(host, endpoint, coming)
        if refusal is not None:
            yield refusal
        mine, expected = registry.of_host(host), registry.expected_at(host)
        fresh = endpoint.key not in mine and (endpoint.key not in expected or not coming)
        if fresh and len(mine) + coming * len(expected) >= wire.MAX_REPORT:
            yield f"host {host} has {wire.MAX_REPORT} endpoints, the most a host may have"
        if registry.held_with(host, endpoint) > MAX_HELD:
            yield f"host {host} would have more than {MAX_HELD} addresses and prefixes, the most a host may have"

    def alarm(self, host: str, key: EndpointKey, message: str) -> None:
        mine = self.alarms.setdefault(host, {})
        if mine.get(key) != message and (key in mine or len(mine) < MAX_ALARMS):
            self._refused(host, key, message)
            mine[key] = message

    def release(self, host: str, key: EndpointKey) -> None:
        self._calm(host, key)
        self._arrived(host, key)
        present = self._ledger.registry.endpoints.get(key)
        if present is not None and present.host == host:
            self._ledger.release(key)

    def _calm(self, host: str, key: EndpointKey) -> None:
        self.alarms.get(host, {}).pop(key, None)
