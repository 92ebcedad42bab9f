# The whole policy model on real guests of two hypervisors: what is written, and what packets then do. Every "closed"
# has its "open" in the same test.
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from deployed import Guest, Site
from policy_rig import ALLOW, AMONG, EVERYTHING, ROLES, Scene, explain, policy, poll, resource, scene, tcp, text

from lab import access, product
from lab.node import Node

__all__ = ["scene"]  # the fixture

# ---- tiers, profiles, network sets ----------------------------------------------------------------------------------

TIERS = (
    resource("Tier", "pm-first", order=10, defaultAction="Deny"),
    resource("Tier", "pm-second", order=20, defaultAction="Pass"),
    resource("Tier", "pm-third", order=30, defaultAction="Deny"),
    policy(
        "pm-first.web",
        'role == "pm-web"',
        tier="pm-first",
        ingress=[
            tcp(5432, action="Deny"),
            {"action": "Pass"},
        ],
    ),
    policy("pm-second.db", 'role == "pm-db"', tier="pm-second", ingress=[{"action": "Deny", "protocol": "ICMP"},
                                                                         {"action": "Deny", "protocol": "ICMPv6"}]),
    policy("pm-third.ops", 'role == "pm-ops"', tier="pm-third",
           ingress=[tcp(80)]),
)  # fmt: skip


def test_tiers(scene: Scene) -> None:
    """Deny and Pass of a tier's rules, and both default actions; the default tier alone is the control."""
    scene.site.apply(text(AMONG))
    assert [scene.open_to(guest) for guest in scene.guests] == [set(EVERYTHING)] * 4
    scene.site.apply(text(*TIERS))
    opened = {guest.role: scene.open_to(guest) for guest in scene.guests}
    assert opened == {
        "pm-web": {"80", "icmp"},
        "pm-app": {"80", "5432", "icmp"},
        "pm-db": {"80", "5432"},
        "pm-ops": {"80"},
    }
    said = explain(scene.site, scene.ops, scene.web, "tcp/5432", code=3)
    assert (said["ingress"]["tier"], said["ingress"]["policy"]) == ("pm-first", "pm-first.web")
    assert said["kernel"]["ingress"]["host"] == "h1" and "pm-first.web" in said["kernel"]["ingress"]["rule"]
    said = explain(scene.site, scene.app, scene.ops, "icmp", code=3)
    assert said["ingress"]["tier"] == "pm-third" and said["ingress"]["rule"] is None
    said = explain(scene.site, scene.ops, scene.web, "tcp/80", code=0)
    assert (said["ingress"]["tier"], said["ingress"]["policy"]) == ("default", "pm-among")


def test_the_order_of_tiers_decides(scene: Scene) -> None:
    scene.site.apply(text(AMONG, *TIERS))
    opener = resource("Tier", "pm-before", order=5)
    scene.site.apply(text(opener, policy("pm-before.web", 'role == "pm-web"', tier="pm-before", ingress=ALLOW)))
    assert scene.open_to(scene.web) == set(EVERYTHING)
    scene.site.apply(text(opener | {"spec": {"order": 15}}))
    assert scene.open_to(scene.web) == {"80", "icmp"}


def test_profiles_and_their_labels(scene: Scene) -> None:
    """A profile's rules count where no policy applies; its labels select from the start, its changes at once."""
    site = scene.site
    profile = resource("Profile", "pm-base", ingress=[tcp(80)], labelsToApply={"pm-zone": "blue"})
    site.apply(text(AMONG, profile))
    guest, bare = (site.guest(site.h1, "pm-x", profiles=names) for names in (["pm-base"], []))
    site.start(guest, bare)
    assert scene.open_to(guest) == {"80"} and scene.open_to(bare) == set()
    changed = resource("Profile", "pm-base", ingress=ALLOW, labelsToApply={"pm-zone": "blue"})
    site.apply(text(changed))
    assert scene.open_to(guest) == set(EVERYTHING)
    site.apply(text(policy("pm-blue", 'pm-zone == "blue"', ingress=[tcp(5432)])))
    assert scene.open_to(guest) == {"5432"}


OUTSIDE4, OUTSIDE6 = "203.0.113.7", "2001:db8:cafe::7"


@pytest.fixture
def outside(scene: Scene) -> Iterator[None]:
    """Addresses of the world outside, at the top-of-rack router, which knows its way back."""
    tor = scene.site.rack.tor
    addresses = f"ip addr add {OUTSIDE4}/32 dev lo; ip addr add {OUTSIDE6}/128 dev lo"
    back = [(g.node.address, g.address4) for g in scene.guests] + [(g.node.address6, g.address6) for g in scene.guests]
    for via, address in back:
        tor.route(address, via)
    tor.run(["sh", "-ec", addresses])
    yield
    tor.run(["sh", "-c", addresses.replace("addr add", "addr del")])
    for _, address in back:
        tor.run(["ip", "-6" if ":" in address else "-4", "route", "del", address])


def pings(guest: Guest, *addresses: str) -> list[bool]:
    said = access.probe(guest.node, guest.name, addresses, "-t", "500")
    return [said[address, "icmp"] for address in addresses]


def test_network_set(scene: Scene, outside: None) -> None:
    """An outside address is open as long as a set of it says so: a prefix, and a single address in another set."""
    to_set = policy("pm-out", ROLES, types=["Egress"], egress=[
        {"action": "Allow", "destination": {"selector": 'pm-net == "partner"'}}])  # fmt: skip
    scene.site.apply(text(to_set))

    def partner(*nets: str) -> str:
        return text(resource("GlobalNetworkSet", "pm-partner", nets=list(nets)) | {
            "metadata": {"name": "pm-partner", "labels": {"pm-net": "partner"}}})  # fmt: skip

    scene.site.apply(partner("198.51.100.0/24"))
    assert [pings(guest, OUTSIDE4, OUTSIDE6) for guest in (scene.web, scene.db)] == [[False, False]] * 2
    scene.site.apply(partner("203.0.113.0/24", f"{OUTSIDE6}/128"))
    assert [pings(guest, OUTSIDE4, OUTSIDE6) for guest in (scene.web, scene.db)] == [[True, True]] * 2
    assert explain(scene.site, scene.web, OUTSIDE4, "icmp", code=0)["egress"]["policy"] == "pm-out"
    scene.site.apply(partner("203.0.113.0/24"))
    assert pings(scene.db, OUTSIDE4, OUTSIDE6) == [True, False]
    scene.site.delete(("GlobalNetworkSet", "pm-partner"))
    assert pings(scene.web, OUTSIDE4, OUTSIDE6) == [False, False]


# ---- Log, staged policies -------------------------------------------------------------------------------------------


def logged(node: Node, **fields: str) -> list[dict[str, str]]:
    said = node.sh("journalctl -o json --no-pager -q SYSLOG_IDENTIFIER=slash32-hostd || :")
    entries = [json.loads(line) for line in said.splitlines()]
    return [each for each in entries if all(each.get(key) == value for key, value in fields.items())]


def test_log_goes_to_the_journal(scene: Scene) -> None:
    log = policy("pm-log", 'role == "pm-db"', order=1, ingress=[
        tcp(5432, action="Log")])  # fmt: skip
    scene.site.apply(text(AMONG, log))
    assert scene.open_to(scene.db) == set(EVERYTHING), "to log is not to decide"
    wanted = {"SLASH32_POLICY": "pm-log", "SLASH32_SOURCE": scene.web.address4, "SLASH32_PORT": "5432"}
    poll(lambda: None if logged(scene.site.h2, **wanted) else "no entry")
    entry = logged(scene.site.h2, **wanted)[-1]
    shown = {key: value for key, value in entry.items() if key.startswith("SLASH32_")}
    assert shown.pop("SLASH32_SOURCE_PORT").isdigit() and scene.db.name in shown.pop("SLASH32_ENDPOINT")
    shown.pop("SLASH32_MAC", None)
    assert shown == wanted | {
        "SLASH32_DESTINATION": scene.db.address4,
        "SLASH32_PROTOCOL": "tcp",
        "SLASH32_RULE": "0",
        "SLASH32_DIRECTION": "ingress",
        "SLASH32_TIER": "default",
    }
    assert scene.db.name in entry["MESSAGE"] and entry["_SYSTEMD_UNIT"] == "slash32-hostd.service"
    assert logged(scene.site.h2, **wanted | {"SLASH32_SOURCE": scene.web.address6})
    assert not logged(scene.site.h2, **wanted | {"SLASH32_PORT": "80"}), "nothing but what the rule names"
    assert not logged(scene.site.h1, SLASH32_POLICY="pm-log"), "the sender's host does not ask it"


def staged_counts(site: Site, node: Node, name: str) -> dict[int | None, int]:
    found = [each for each in product.host_status(node)["staged"] if each["policy"] == name]
    return {each["rule"]: each["packets"] for each in found}


def test_staged_policies_drop_nothing_and_count(scene: Scene) -> None:
    rules = [
        tcp(80),
        tcp(5432, action="Deny"),
    ]
    staged = resource("StagedGlobalNetworkPolicy", "pm-stage", selector='role == "pm-db"', order=1, ingress=rules)
    scene.site.apply(text(AMONG, staged))
    before = staged_counts(scene.site, scene.site.h2, "pm-stage")
    assert list(before) == [1]
    assert scene.open_to(scene.db) == set(EVERYTHING), "nothing is dropped"
    poll(lambda: None if staged_counts(scene.site, scene.site.h2, "pm-stage")[1] > before[1] else "not counted")
    assert staged_counts(scene.site, scene.site.h1, "pm-stage") == {}, "h1 has no such guest"
    counted = staged_counts(scene.site, scene.site.h2, "pm-stage")
    assert scene.web.reaches(scene.db, "80") and counted[1] >= 6  # three guests, both families
    said = product.cli(scene.site.rack, "describe", "sgnp", "pm-stage")
    shown = re.search(r"would have dropped: +(\d+) packets\n +ingress rule 1: +(\d+) packets\n", said)
    assert shown and int(shown[1]) == int(shown[2]) >= counted[1], said
    enforced = policy("pm-stage", 'role == "pm-db"', order=1, ingress=rules)
    scene.site.apply(text(enforced))
    assert scene.open_to(scene.db) == {"80", "icmp"}, "the control: enforced it does drop"


# ---- host endpoints -------------------------------------------------------------------------------------------------

PORT = 9999
LISTEN = f"""
import socket, sys
s = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True: s.accept()[0].close()
"""
DIAL = """
import socket, sys
for address in sys.argv[2:]:
    try: socket.create_connection((address, int(sys.argv[1])), 0.7).close(); print("yes")
    except OSError: print("no")
"""


@contextmanager
def listening(node: Node) -> Iterator[None]:
    server = node.popen(["python3", "-c", LISTEN])
    try:
        poll(lambda: None if f":{PORT}" in node.sh("ss -lnt") else "not listening")
        yield
    finally:
        server.kill()
        server.communicate()


def dials(scene: Scene, node: Node, port: int) -> list[bool]:
    """From the top-of-rack router, by both families."""
    argv = ["python3", "-c", DIAL, str(port), node.address, node.address6]
    return [word == "yes" for word in scene.site.rack.tor.run(argv).stdout.split()]


def host_endpoint(name: str, node: Node, interface: str) -> dict[str, Any]:
    made = resource("HostEndpoint", name, node=node.name, interfaceName=interface, expectedIPs=[node.address])
    return made | {"metadata": {"name": name, "labels": {"pm-host": "yes"}}}


def test_host_endpoint_on_the_uplink(scene: Scene) -> None:
    site = scene.site
    site.apply(text(AMONG))
    with listening(site.h1), listening(site.h2):
        assert [dials(scene, node, port) for node in (site.h1, site.h2) for port in (PORT, 22)] == [[True, True]] * 4
        site.apply(text(host_endpoint("pm-h1", site.h1, "eth0")))
        assert dials(scene, site.h1, PORT) == [False, False], "no policy: closed"
        assert dials(scene, site.h1, 22) == [True, True], "failsafe"
        assert dials(scene, site.h2, PORT) == [True, True], "another host is none of its business"
        one = tcp(PORT)
        site.apply(text(policy("pm-port", 'pm-host == "yes"', types=["Ingress"], ingress=[one])))
        assert dials(scene, site.h1, PORT) == [True, True]
        deny = [{"action": "Deny"}]
        shut = policy("pm-shut", 'pm-host == "yes"', types=["Ingress", "Egress"], order=1, ingress=deny, egress=deny)
        site.apply(text(shut))  # acknowledged over the uplink that it closes
        assert dials(scene, site.h1, PORT) == [False, False]
        assert dials(scene, site.h1, 22) == [True, True], "nobody locks himself out"
        site.h1.sh("systemctl restart slash32-hostd")  # nor does it lock hostd out of a new connection
        product.wait_in_sync(site.rack)
        assert scene.open_to(scene.db, [scene.web]) == set(EVERYTHING), "what is forwarded is not asked"
        forward = policy("pm-fwd", 'pm-host == "yes"', types=["Egress"], order=1, applyOnForward=True, egress=[
            tcp(5432, action="Deny"), {"action": "Allow"}])  # fmt: skip
        site.apply(text(forward))
        assert scene.open_to(scene.db, [scene.web]) == {"80", "icmp"}, "but by policies with applyOnForward"
        said = explain(site, scene.web, scene.db, "tcp/5432", code=3)
        assert said["kernel"]["host_egress"]["verdict"] == "deny"
        assert scene.open_to(scene.app, [scene.web]) == set(EVERYTHING), "not out of the uplink"
    site.delete(("HostEndpoint", "pm-h1"))
    with listening(site.h1):
        assert dials(scene, site.h1, PORT) == [True, True]


def test_guests_may_speak_to_their_host_where_any_interface_is_under_policy(scene: Scene) -> None:
    site = scene.site

    def to_host(guest: Guest) -> list[bool]:
        addresses = guest.node.address, guest.node.address6
        said = access.probe(guest.node, guest.name, addresses, "-t", "500", "-p", str(PORT))
        return [said[address, str(PORT)] for address in addresses]

    site.apply(text(AMONG))
    with listening(site.h1):
        assert to_host(scene.web) == to_host(scene.app) == [False, False], "closed, whatever the guest's policy"
        one = tcp(PORT, source="pm-web")
        opener = policy("pm-any", 'pm-host == "yes"', types=["Ingress"], ingress=[one])
        site.apply(text(host_endpoint("pm-any", site.h1, "*"), opener))
        assert to_host(scene.web) == [True, True]
        assert to_host(scene.app) == [False, False]
        assert dials(scene, site.h1, PORT) == [False, False] and dials(scene, site.h1, 22) == [True, True]
        quiet = policy("pm-quiet", 'role == "pm-web"', order=1, types=["Egress"], egress=[
            tcp(PORT, action="Deny"), {"action": "Pass"}])  # fmt: skip
        site.apply(text(quiet))
        assert to_host(scene.web) == [False, False], "the guest's own policy counts, too"
        site.delete(("GlobalNetworkPolicy", "pm-quiet"))
        assert to_host(scene.web) == [True, True]
        site.delete(("HostEndpoint", "pm-any"))
        assert to_host(scene.web) == [False, False]


# ---- revocation -----------------------------------------------------------------------------------------------------

PUSH = 7000  # a server here speaks all the time, and is never answered


class Push(NamedTuple):
    """A connection from SOURCE to a server in TARGET that pushes numbered lines."""

    source: Guest
    file: str

    def lines(self) -> int:
        return int(self.source.run("sh", "-c", f"wc -l < {self.file}"))

    def grows(self, by: int = 20) -> None:
        start = self.lines()
        poll(lambda: None if self.lines() >= start + by else "it stands still")


@contextmanager
def pushing(target: Guest, *sources: tuple[Guest, int]) -> Iterator[list[Push]]:
    """One server port for each, from PUSH on; by v4 or by v6."""
    found = []
    try:
        for number, (source, version) in enumerate(sources):
            port = PUSH + number
            serve = "n=0; while :; do n=\\$((n+1)); echo \\$n; usleep 20000; done"
            target.run("sh", "-c", f'nc -ll -p {port} -e sh -c "{serve}" > /dev/null 2>&1 < /dev/null &')
            address = target.address4 if version == 4 else target.address6
            file = f"/tmp/push-{port}"
            command = f"(sleep 300 | nc {address} {port} > {file} 2>/dev/null) > /dev/null 2>&1 < /dev/null &"
            poll(lambda port=port: None if f":{port:04X} " in target.run("sh", "-c", "cat /proc/net/tcp /proc/net/tcp6")
                 else "no server")  # fmt: skip
            source.run("sh", "-c", command)
            found.append(Push(source, file))
        for push in found:
            push.grows()
        yield found
    finally:
        for guest in {source for source, _ in sources} | {target}:
            guest.run("sh", "-c", "killall nc sleep; rm -f /tmp/push-*", check=False)


def allowing(*roles: str, **more: Any) -> dict[str, Any]:
    rules = [{"action": "Allow", "source": {"selector": f'role == "{role}"'}} for role in roles]
    return policy("pm-to-db", 'role == "pm-db"', types=["Ingress"], ingress=rules, **more)


OTHERS = 'role in {"pm-web", "pm-app", "pm-ops"}'
OTHER_WAY = policy("pm-others", OTHERS, types=["Ingress", "Egress"], ingress=ALLOW, egress=ALLOW)


def test_a_revoked_flow_ends_before_the_apply_does(scene: Scene) -> None:
    """The server pushes, and may itself open connections to that guest: the flow ends all the same, by v4 and v6, on
    its way between hypervisors; those of others go on."""
    site = scene.site
    site.apply(text(allowing("pm-web", "pm-app"), OTHER_WAY))
    with pushing(scene.db, (scene.web, 4), (scene.web, 6), (scene.app, 4), (scene.app, 6)) as flows:
        site.apply(text(allowing("pm-app")))
        ended = [flow.lines() for flow in flows[:2]]
        for flow in flows[2:]:
            flow.grows(100)
        assert [flow.lines() for flow in flows[:2]] == ended
        site.apply(text(allowing("pm-web", "pm-app")))
        poll(lambda: None if scene.web.reaches(scene.db, "5432") else "control: it is open again")


def test_keep_established(scene: Scene) -> None:
    site = scene.site
    site.apply(text(allowing("pm-web", "pm-app", keepEstablished=True), OTHER_WAY))
    with pushing(scene.db, (scene.web, 4), (scene.web, 6)) as flows:
        assert scene.web.reaches(scene.db, "5432")
        site.apply(text(allowing("pm-app", keepEstablished=True)))
        assert not scene.web.reaches(scene.db, "5432"), "nothing new is allowed"
        for flow in flows:
            flow.grows(50)
