# What explain and diff say of the packets of real guests of two hypervisors is what the packets do.
from __future__ import annotations

import json
from typing import Any

import pytest
from policy_rig import ALLOW, AMONG, ROLES, Scene, explain, policy, poll, scene, tcp, text

from lab import matrix, product
from lab.matrix import Cell

__all__ = ["scene"]  # the fixture

# ---- explain and diff -----------------------------------------------------------------------------------------------


def test_explain_by_both_kernels(scene: Scene) -> None:
    one = tcp(5432, source="pm-web")
    scene.site.apply(text(AMONG, policy("pm-only", 'role == "pm-db"', order=1, ingress=[one, {"action": "Deny"}])))
    yes = explain(scene.site, scene.web, scene.db, "tcp/5432", code=0)
    assert (yes["verdict"], yes["ingress"]["policy"], yes["ingress"]["rule"]) == ("allow", "pm-only", 0)
    assert {stage: (said["host"], said["verdict"]) for stage, said in yes["kernel"].items()} == {
        "egress": ("h1", "allow"),
        "ingress": ("h2", "allow"),
    }
    no = explain(scene.site, scene.app, scene.db, "tcp/5432", code=3)
    assert (no["verdict"], no["ingress"]["rule"]) == ("deny", 1) and no["kernel"]["ingress"]["verdict"] == "deny"
    assert scene.web.reaches(scene.db, "5432") and not scene.app.reaches(scene.db, "5432")


@pytest.mark.parametrize(("host", "stage"), [("h1", "egress"), ("h2", "ingress")])
def test_explain_shouts(scene: Scene, host: str, stage: str) -> None:
    """Somebody keeps putting a rule of his own into the chain; hostd takes it out as often. Asked in between, the
    kernel does not do what the model says, and explain must not hide it."""
    scene.site.apply(text(AMONG))
    said = explain(scene.site, scene.web, scene.db, "tcp/80", code=0)
    assert said["kernel"][stage]["host"] == host
    node, chain = scene.site.rack.node(host), said["kernel"][stage]["chain"]
    legacy = f"iptables-legacy -w -t security -I {chain} -j DROP"
    harm = legacy if host in scene.site.rack.legacy else f"nft insert rule inet slash32 {chain} drop"
    seen: list[tuple[int, str]] = []

    def quiet() -> str | None:
        done = scene.site.d1.run(["slash32", "explain", scene.web.name, scene.db.name, "tcp/80"], check=False)
        seen.append((done.returncode, done.stdout + done.stderr))
        return None if done.returncode == 1 and "DIFFER" in done.stderr else str(seen[-1])

    vandal = node.popen(["sh", "-c", f"while :; do {harm} || :; done"])
    try:
        poll(quiet)
    finally:
        vandal.kill()
        vandal.communicate()
    shout = f"KERNEL AND MODEL DIFFER: {stage}: the model says allow, the kernel of {host} says deny"
    assert shout in seen[-1][1], seen[-1]
    poll(lambda: None if _explained(scene) == 0 else "does not agree again")
    assert scene.web.reaches(scene.db, "80")


def _explained(scene: Scene) -> int:
    return scene.site.d1.run(["slash32", "explain", scene.web.name, scene.db.name, "tcp/80"], check=False).returncode


def test_diff_says_what_then_happens(scene: Scene) -> None:
    """Every row of diff is a change of the packets' matrix, and every change of the matrix is a row of diff."""
    web = tcp(80)
    scene.site.apply(text(policy("pm-a", ROLES, types=["Ingress", "Egress"], ingress=[web], egress=ALLOW)))
    before = observed(scene)
    new = text(
        policy("pm-a", ROLES, types=["Ingress", "Egress"], egress=ALLOW, ingress=[
            {**web, "source": {"notSelector": 'role == "pm-app"'}},
            tcp(5432, source="pm-app")]),
        policy("pm-b", 'role == "pm-ops"', order=1, types=["Ingress"], ingress=[
            {"action": "Allow", "protocol": "ICMP", "source": {"selector": 'role == "pm-db"'}}, {"action": "Deny"}]),
    )  # fmt: skip
    scene.site.d1.write("/root/slash32/new.yaml", new)
    said = json.loads(product.cli(scene.site.rack, "diff", "-f", "/root/slash32/new.yaml", "-o", "json"))
    assert observed(scene) == before, "diff changes nothing"
    foretold = {after: foreseen(scene, said, after) for after in ("allow", "deny")}
    scene.site.apply(new)
    after = observed(scene)
    assert foretold == {"allow": after - before, "deny": before - after}
    assert all(foretold.values())
    again = json.loads(product.cli(scene.site.rack, "diff", "-f", "/root/slash32/new.yaml", "-o", "json"))
    assert again["changes"] == [] and not again["summary"]["verdictsChange"]


def observed(scene: Scene) -> set[Cell]:
    guests = [matrix.Guest(g.name, g.node, g.address4, g.address6) for g in scene.guests]
    return set(matrix.observe(guests, wait_ms=500).open)


def foreseen(scene: Scene, said: dict[str, Any], after: str) -> set[Cell]:
    """The cells of our guests that get the verdict AFTER, as diff tells it."""
    groups = {group["id"]: set(group.get("members", ())) for group in said["groups"]}
    names = {guest.name for guest in scene.guests}
    found = set()
    for change in said["changes"]:
        if change["after"] != after:
            continue
        ends = [set().union(*(groups[n] for n in change[end]["groups"])) & names for end in ("from", "to")]
        for flow in change["traffic"]:
            for source, target in ((s, t) for s in ends[0] for t in ends[1] if s != t):
                found |= {Cell(source, target, what, family) for what, family in cells_of(flow)}
    return found


def cells_of(flow: dict[str, Any]) -> set[tuple[str, int]]:
    """Which of the probes' questions this is about."""
    families = [flow["ipVersion"]] if "ipVersion" in flow else [4, 6]
    cells = set()
    for family in families:
        for what, protocol in (("80", "TCP"), ("5432", "TCP"), ("icmp", "ICMP" if family == 4 else "ICMPv6")):
            if flow.get("protocol", protocol) != protocol or protocol in flow.get("notProtocols", ()):
                continue
            if what == "icmp":
                asked, kind = flow.get("icmpTypes"), 8 if family == 4 else 128
            else:
                asked, kind = flow.get("ports"), int(what)
            if asked is None or any(first <= kind <= last for first, last in map(ends_of, asked)):
                cells.add((what, family))
    return cells


def ends_of(port: int | str) -> tuple[int, int]:
    first, _, last = str(port).partition(":")
    return int(first), int(last or first)
