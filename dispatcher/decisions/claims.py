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
        """All that the host has."""
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
        return []

    def _against(self, host: str, endpoint: Endpoint) -> Iterator[str]:
        """Why it cannot be, each in one line."""
        registry, fenced = self._ledger.registry, self._ledger.host(host).fenced
        if fenced:
            yield f"host {host} is fenced by an operator ({fenced}): slash32 host unfence {host}"
        refusal = registry.refusal(host, endpoint)
        if refusal is not None:
            yield refusal
        if len(registry.of_host(host)) >= wire.MAX_REPORT and endpoint.key not in registry.of_host(host):
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
        present = self._ledger.registry.endpoints.get(key)
        if present is not None and present.host == host:
            self._ledger.release(key)

    def _calm(self, host: str, key: EndpointKey) -> None:
        self.alarms.get(host, {}).pop(key, None)
