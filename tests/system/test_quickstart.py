# README's quick start on bare machines, line by line as it stands there, by an operator who knows no more than it says.
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import access, product
from lab.node import Node
from lab.rack import Rack

REPO = Path(__file__).parents[2]
FOLDER = "/root/quick"
TOML = "/etc/slash32/hostd.toml"
# "editor FILE" makes the changes that /root/edits.json has for it: [old, new] pairs, each old text once in the file.
EDITOR = """#!/usr/bin/python3
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
text = path.read_text()
for old, new in json.loads(pathlib.Path("/root/edits.json").read_text()):
    assert text.count(old) == 1, old
    text = text.replace(old, new)
path.write_text(text)
"""
LINE = re.compile(r"^(?P<command>.+?) +# *(?P<number>\d+) (?P<where>here|dispatcher|hypervisors?)\b", re.M)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")


def quick_start() -> dict[int, tuple[str, str]]:
    """Number: (where, command)."""
    block = (REPO / "README.md").read_text().split("## On real hosts")[1].split("```")[1]
    found = {int(m["number"]): (m["where"], m["command"]) for m in LINE.finditer(block)}
    assert list(found) == list(range(1, 11)) and len(block.strip().splitlines()) == 10, "ten lines, numbered"
    return found


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    made = Rack("tquick", hosts=2, dispatcher=True)
    with made:
        yield made


def type_in(node: Node, command: str, edits: list[list[str]] | None = None) -> str:
    if edits:
        node.write("/root/edits.json", json.dumps(edits))
    return node.sh(f"cd {FOLDER}\n{command}", timeout=120)


def answers(node: Node, address: str) -> bool:
    return node.run(["timeout", "2", "bash", "-c", f"</dev/tcp/{address}/80"], check=False).returncode == 0


def host_edits(node: Node, dispatcher: Node, key: str) -> list[list[str]]:
    """What the comments of the shipped hostd.toml ask for."""
    return [
        ["#addresses = []", f'addresses = ["{node.address}", "{node.address6}"]'],
        ['#dispatcher = ""', f'dispatcher = "tcp://{dispatcher.address}:5532"'],
        ['#dispatcher_key = ""', f'dispatcher_key = "{key}"'],
    ]


def fleet_edits(rack: Rack, keys: dict[str, str]) -> list[list[str]]:
    """What the comments of examples/hosts.yaml ask for."""
    examples = re.findall(r'name: (\S+).*?publicKey: "(.*?)".*?addresses: (\[.*?\])', hosts_yaml(), re.S)
    edits = []
    for (name, key, addresses), node in zip(examples, rack.hosts, strict=True):
        edits.append([f"name: {name}", f"name: {node.name}"])
        edits.append([f'"{key}"', f'"{keys[node.name]}"'])
        edits.append([addresses, f'[{node.address}, "{node.address6}"]'])
    return edits


def hosts_yaml() -> str:
    return (REPO / "examples/hosts.yaml").read_text()


def test_the_quick_start_as_it_stands(rack: Rack) -> None:
    lines = quick_start()
    dispatcher, (h1, h2) = product.dispatcher_of(rack), rack.hosts

    assert lines[1] == ("here", "make deb")
    debs = product.debs()  # which is what `make deb` runs

    def bring(node: Node) -> None:
        for deb in (debs.common, debs.hostd, debs.dispatcher):
            node.push(deb, f"{FOLDER}/dist/{deb.name}")
        node.push(REPO / "examples", f"{FOLDER}/examples")
        node.push(REPO / "examples/web1.xml", f"{FOLDER}/web1.xml")
        node.write("/usr/local/bin/editor", EDITOR, 0o755)
        type_in(node, lines[2 if node is dispatcher else 4][1])

    assert (lines[2][0], lines[4][0]) == ("dispatcher", "hypervisors")
    rack.each(rack.nodes, bring)

    assert lines[3][0] == "dispatcher"
    key = type_in(dispatcher, lines[3][1]).strip()
    assert len(key) == 40

    assert lines[5] == ("hypervisors", f"editor {TOML}") and lines[6][0] == "hypervisors"
    keys = {}
    for node in rack.hosts:
        type_in(node, lines[5][1], host_edits(node, dispatcher, key))
        keys[node.name] = type_in(node, lines[6][1]).strip()
    assert len(set(keys.values())) == 2 and all(len(each) == 40 for each in keys.values())

    assert lines[7][0] == "dispatcher"
    said = type_in(dispatcher, lines[7][1], fleet_edits(rack, keys))
    assert "Host h1 created" in said and "Host h2 created" in said
    product.wait_in_sync(rack)

    assert lines[8][0] == "hypervisor"
    said = type_in(h1, lines[8][1])
    assert "in sync" in said and re.search(r"^web1 +vnet0 +connected +10\.65\.0\.11,fd00:65::11$", said, re.M), said
    access.wait_guest(h1, "web1", 60)
    assert not answers(h2, "10.65.0.11"), "no policy, no packet"

    assert lines[9][0] == lines[10][0] == "dispatcher"
    said = type_in(dispatcher, lines[9][1])
    assert re.search(r"^revision \d+ live on 2 of 2 hosts in \d+ ms \(p50 \d+ ms, p99 \d+ ms\)$", said, re.M), said
    assert answers(h2, "10.65.0.11"), "web's front door is open"

    said = type_in(dispatcher, lines[10][1])
    assert re.search(r"^connected: +2 of 2 hosts$", said, re.M), said
    assert re.search(r"^web1 +h1 +10\.65\.0\.11,fd00:65::11 +env=demo,role=web", said, re.M), said
    assert re.search(r"^ingress: +web$", said, re.M) and re.search(r"^egress: +web$", said, re.M), said
