# slash32 get, describe, status, validate and completion against a real dispatcher process.
from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from cli_rig import Fleet, completed
from dispatcher_rig import REPO

# --- get, describe, status, validate, adopt --------------------------------------------------------------------------


def test_get_in_every_output(fleet: Fleet) -> None:
    named = {"endpoints": "web1", "hosts": "h1", "gnp": "standing", "profiles": "base"}
    calls = [(kind, name, output) for kind, name in named.items() for output in ("table", "wide", "yaml", "json")]

    def both(call: tuple[str, str, str]) -> tuple[str, str]:
        kind, name, output = call
        whole, one = (fleet.popen("get", *words, "-o", output).communicate() for words in ([kind], [kind, name]))
        assert (whole[1], one[1]) == ("", "")
        return whole[0], one[0]

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(calls, pool.map(both, calls), strict=True))
    for (kind, name, output), (whole, one) in found.items():
        if output in ("table", "wide"):
            assert len(one.splitlines()) == 2 and name in one and one.splitlines()[0] == one.splitlines()[0].upper()
            assert len(whole.splitlines()) == {"endpoints": 4, "hosts": 4, "gnp": 2, "profiles": 2}[kind], whole
        else:
            read = yaml.safe_load if output == "yaml" else json.loads
            one, items = read(one), read(whole)["items"]
            if kind == "hosts":  # when it was last seen changes
                assert all(each.pop("status") for each in [one, *items])
            assert one in items
    assert "52:54:00" in found["endpoints", "web1", "wide"][0]
    assert "52:54:00" not in found["endpoints", "web1", "table"][0]


def test_what_get_prints_can_be_applied_again(fleet: Fleet) -> None:
    before = fleet.revision()
    for output in ("yaml", "json"):
        for kind in ("hosts", "gnp", "profiles"):
            out = fleet.ok("apply", "-f", "-", text=fleet.ok("get", kind, "-o", output))
            *changes, last = out.splitlines()
            assert changes and all(line.endswith(" unchanged") for line in changes) and last == f"revision {before}"


def test_hosts_have_a_status_that_is_not_applied(fleet: Fleet) -> None:
    fleet.settle()
    host = json.loads(fleet.ok("get", "hosts", "h1", "-o", "json"))
    status, before = host["status"], fleet.revision()
    assert (status["connected"], status["inSync"], status["lagSeconds"], status["held"]) == (True, True, 0, "")
    assert status["revision"] == before and status["lastSeen"] and {"version", "filter", "endpoints"} <= status.keys()
    host["status"] = {"revision": 99, "addresses": ["192.0.2.99"]}
    assert fleet.ok("apply", "-f", "-", text=json.dumps(host)).splitlines() == [
        "Host h1 unchanged",
        f"revision {before}",
    ]
    host["status"] = "well"
    code, _, err = fleet.run("apply", "-f", "-", text=json.dumps(host))
    assert code == 1 and "status" in err and len(err.splitlines()) == 1
    host["status"], host["spec"]["addresses"] = {}, ["192.0.2.98"]  # the control
    assert fleet.ok("apply", "-f", "-", text=json.dumps(host)).splitlines()[0] == "Host h1 configured"


def test_describe(fleet: Fleet) -> None:
    fields = dict(line.split(":", 1) for line in fleet.ok("describe", "endpoint", "web1").splitlines())
    assert {k: v.strip() for k, v in fields.items() if k in ("domain", "host", "labels", "ingress", "egress")} == {
        "domain": "web1", "host": "h1", "labels": "role=web,zone=1e3", "ingress": "standing", "egress": "profiles base",
    }  # fmt: skip
    assert "web1, web2\n" in fleet.ok("describe", "gnp", "standing")
    assert "web1, web2, web3\n" in fleet.ok("describe", "profile", "base")
    assert re.search(r"^connected: +yes$", fleet.ok("describe", "host", "h2"), re.M)


MODEL = """
{apiVersion: slash32/v1, kind: Tier, metadata: {name: platform}, spec: {order: 10, defaultAction: Pass}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: office}
spec:
  {tier: platform, order: 5, selector: role == "web", ingress: [{action: Allow, source: {selector: net == "office"}}]}
---
apiVersion: slash32/v1
kind: StagedGlobalNetworkPolicy
metadata: {name: later}
spec: {tier: platform, selector: role == "web", ingress: [{action: Deny}]}
---
apiVersion: slash32/v1
kind: GlobalNetworkSet
metadata: {name: office, labels: {net: office}}
spec: {nets: [198.51.100.0/24]}
---
apiVersion: slash32/v1
kind: HostEndpoint
metadata: {name: h1-eth0, labels: {role: web}}
spec: {node: h1, interfaceName: eth0, expectedIPs: [192.0.2.77]}
"""
TABLES = {
    "tiers": "NAME ORDER DEFAULT-ACTION platform 10 Pass",
    "sgnp": 'NAME TIER ORDER SELECTOR TYPES later platform - role == "web" Ingress',
    "globalnetworksets": "NAME LABELS NETS office net=office 198.51.100.0/24",
    "hostendpoints": "NAME NODE INTERFACE ADDRESSES LABELS PROFILES h1-eth0 h1 eth0 192.0.2.77 role=web -",
}


def test_the_whole_model(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(MODEL)
    assert fleet.ok("apply", "-f", file, "--wait").count(" created\n") == 5
    for kind, table in TABLES.items():
        assert fleet.ok("get", kind).split() == table.split()
    again = "---\n".join(fleet.ok("get", kind, "-o", "yaml") for kind in ("stagedglobalnetworkpolicies", "hep"))
    assert fleet.ok("apply", "-f", "-", text=again).count(" unchanged\n") == 2

    def described(kind: str, name: str) -> dict[str, str]:
        lines = fleet.ok("describe", kind, name).partition("\n\n")[0].splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    web1 = described("endpoint", "web1")
    assert (web1["ingress"], web1["staged ingress"]) == ("platform/office, standing", "platform/later")
    assert web1["egress"] == "profiles base" and "staged egress" not in web1
    assert described("tier", "platform")["policies"] == "office, later (staged)"
    assert described("gns", "office")["named by rules of"] == "office"
    assert described("sgnp", "later").items() >= {"endpoints": "web1, web2", "host endpoints": "h1-eth0"}.items()
    card = described("hep", "h1-eth0")
    assert card["ingress"] == "platform/office, standing" and card["forwarded ingress"] == "nothing is asked"
    fields = dict(line.split(":", 1) for line in fleet.ok("status").splitlines())
    assert [fields[word].strip() for word in ("tiers", "stagedPolicies", "networkSets", "hostEndpoints")] == ["1"] * 4
    code, _, err = fleet.run("delete", "tier", "platform")
    assert code == 1 and "GlobalNetworkPolicy office, StagedGlobalNetworkPolicy later name it" in err
    assert fleet.ok("delete", "-f", file).count(" deleted ") == 5, "the tier stands first in the file"
    assert fleet.ok("get", "tiers") == "no Tier yet\n"


def test_status(fleet: Fleet) -> None:
    fleet.settle()
    fields = dict(line.split(":", 1) for line in fleet.ok("status").splitlines())
    assert fields["connected"].strip() == "3 of 3 hosts" and int(fields["revision"]) == fleet.revision()
    assert "not in sync" not in fields and "failing" not in fields
    assert len(json.loads(fleet.ok("status", "-o", "json"))["hosts"]) == 3


def test_validate_needs_no_dispatcher(fleet: Fleet) -> None:
    out = fleet.ok("--socket", "/nowhere", "validate", "-f", REPO / "examples")
    assert "three-tier.yaml: 3 documents, valid" in out and "web1.xml: domain web1: 1 endpoint, valid" in out
    assert "stray.xml: domain stray: no slash32 tag: it is left alone, valid" in out


def test_completion_knows_kinds_and_names(fleet: Fleet) -> None:
    def complete(line: str) -> list[str]:
        return completed(fleet, line)

    assert complete("slash32 desc") == ["describe"]
    assert complete("slash32 get e") == ["endpoints"] and "endpoints" not in complete("slash32 delete ")
    assert complete("slash32 describe endpoint w") == ["web1", "web2", "web3"]
    assert complete("slash32 delete gnp ") == ["standing"] and complete("slash32 adopt h") == ["h1", "h2", "h3"]
    assert complete("slash32 --socket /nowhere get gnp ") == []
