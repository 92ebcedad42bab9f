# Four guests on two hypervisors that have a policy written for them, what they can open of each other, and what explain
# says of it.
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import yaml
from deployed import Guest, Site

from lab import matrix, product

SECONDS = 30.0
ROLES = 'role in {"pm-web", "pm-app", "pm-db", "pm-ops"}'
EVERYTHING = ("80", "5432", "icmp")


def resource(kind: str, name: str, /, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def policy(name: str, selector: str, /, **spec: Any) -> dict[str, Any]:
    return resource("GlobalNetworkPolicy", name, selector=selector, **spec)


def text(*resources: dict[str, Any]) -> str:
    return yaml.safe_dump_all(resources, sort_keys=False)


ALLOW = [{"action": "Allow"}]


def tcp(*ports: int, action: str = "Allow", source: str = "") -> dict[str, Any]:
    """A rule; SOURCE is a role."""
    peer = {"source": {"selector": f'role == "{source}"'}} if source else {}
    return {"action": action, "protocol": "TCP", **peer, "destination": {"ports": list(ports)}}


AMONG = policy("pm-among", ROLES, types=["Ingress", "Egress"], ingress=ALLOW, egress=ALLOW, order=100)


class Scene(NamedTuple):
    """web and app on h1, db (a virtual machine) and ops on h2."""

    site: Site
    web: Guest
    app: Guest
    db: Guest
    ops: Guest

    @property
    def guests(self) -> tuple[Guest, ...]:
        return self.web, self.app, self.db, self.ops

    def open_to(self, target: Guest, sources: Sequence[Guest] = ()) -> set[str]:
        """What all the others (or SOURCES) can open there; they and both families must agree."""
        askers = [guest for guest in sources or self.guests if guest is not target]
        said = matrix.at_once(lambda guest: guest.probe(target, ms=500), askers)
        assert all(each[target.address4, w] == each[target.address6, w] for each in said for w in EVERYTHING), said
        found = [{what for what in EVERYTHING if each[target.address4, what]} for each in said]
        assert all(each == found[0] for each in found), dict(zip([a.name for a in askers], found, strict=True))
        return found[0]


@pytest.fixture(scope="module")
def scene(site: Site) -> Iterator[Scene]:
    with site.scope():
        web, app = site.guest(site.h1, "pm-web"), site.guest(site.h1, "pm-app")
        db, ops = site.guest(site.h2, "pm-db", "qemu"), site.guest(site.h2, "pm-ops")
        site.start(web, app, db, ops)
        yield Scene(site, web, app, db, ops)


def poll(wrong: Any, seconds: float = SECONDS) -> None:
    problem = product.poll(wrong, seconds)
    assert problem is None, problem


def explain(site: Site, source: Guest | str, target: Guest | str, traffic: str, *, code: int) -> dict[str, Any]:
    """What slash32 explain says; both kernels have been asked and say the same as the model unless CODE is 1."""
    ends = [each if isinstance(each, str) else each.name for each in (source, target)]
    done = site.d1.run(["slash32", "explain", *ends, traffic, "-o", "json"], check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert code == 1 or done.stderr == "", done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said
