# What an operator asks of a hypervisor: slash32-hostd status, diff and compile, with hostd well, dead, silent and
# misconfigured.
from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from deployed import Guest, Site

from lab import product
from lab.node import Node

TOML = "/etc/slash32/hostd.toml"
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: operator}
spec:
  selector: role in {"left", "right"}
  types: [Ingress, Egress]
  ingress: [{action: Allow, protocol: TCP, source: {selector: role == "left"}, destination: {ports: [80]}}]
  egress: [{action: Allow, destination: {nets: [10.65.0.0/16]}}]
"""


def say(node: Node, *words: str, code: int = 0) -> str:
    """What slash32-hostd prints; its complaint where it ends with another code than 0."""
    done = node.run(["slash32-hostd", *words], check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


@pytest.fixture(scope="module")
def guests(site: Site) -> Iterator[tuple[Guest, Guest]]:
    with site.scope():
        left, right = site.guest(site.h1, "left"), site.guest(site.h1, "right")
        site.apply(POLICY)
        site.start(left, right)
        yield left, right


@pytest.fixture
def stopped(site: Site) -> Iterator[Node]:
    site.h1.sh("systemctl stop slash32-hostd")
    yield site.h1
    site.h1.sh("systemctl start slash32-hostd")
    product.wait_in_sync(site.rack, [site.h1])


def test_status(site: Site, guests: tuple[Guest, Guest]) -> None:
    left, _ = guests
    lines = say(site.h1, "status").splitlines()
    assert lines[0] == "host h1: running"
    assert re.fullmatch(r"dispatcher: connected to tcp://\S+, in sync at revision \d+", lines[1])
    assert lines[2].split() == ["DOMAIN", "TAP", "STATE", "ADDRESSES"]
    row = next(line.split() for line in lines if line.startswith(left.name))
    assert row == [left.name, left.tap, "connected", f"{left.address4},{left.address6}"]
    wide = say(site.h1, "status", "-o", "wide")
    assert "role=left" in wide and left.mac in wide
    whole = json.loads(say(site.h1, "status", "-o", "json"))
    assert whole == yaml.safe_load(say(site.h1, "status", "-o", "yaml"))
    assert whole["running"] and left.name in [each["domain"] for each in whole["endpoints"]]


def test_status_is_of_now(site: Site, guests: tuple[Guest, Guest]) -> None:
    """What virsh start has returned from is connected, also in the next moment's status."""
    for _ in range(3):
        third = site.guest(site.h1, "third")
        site.keep(third)
        product.define(site.h1, third.xml)
        said = site.h1.sh(f"virsh -q -c lxc:/// start {third.name} && slash32-hostd status")
        assert re.search(rf"^{third.name} +\S+ +connected ", said, re.M), said
        site.stop(third)
        assert third.name not in say(site.h1, "status")


def test_compile_loads(site: Site, guests: tuple[Guest, Guest]) -> None:
    left, _ = guests
    text = say(site.h1, "compile")
    again = "unshare -n sh -c 'nft -f - && nft list ruleset | nft -c -f -'"
    for check in ("nft -c -f -", "unshare -n nft -c -f -", again):
        site.h1.run(["sh", "-c", check], input=text)
    assert re.search(rf"^# ip route replace {left.address4}/32 dev {left.tap} proto 132$", text, re.M)
    assert "table inet slash32 {" in text and "table arp slash32 {" in text and left.address4 in text
    spoiled = text.replace("policy", "polcy", 1)  # the control
    assert site.h1.run(["nft", "-c", "-f", "-"], input=spoiled, check=False).returncode


def test_diff(site: Site, guests: tuple[Guest, Guest], stopped: Node) -> None:
    left, _ = guests
    assert say(stopped, "diff") == ""
    stopped.sh(f"ip route del {left.address4}/32; nft flush chain inet slash32 forward-to")
    lines = say(stopped, "diff", code=1).splitlines()
    assert any(left.address4 in line for line in lines) and 1 < len(lines) < 50
    assert say(stopped, "diff", code=1).splitlines() == lines, "it has changed nothing"
    stopped.sh("systemctl start slash32-hostd")
    product.wait_in_sync(site.rack, [stopped])
    assert say(stopped, "diff") == ""


def test_hostd_is_dead(guests: tuple[Guest, Guest], stopped: Node) -> None:
    said = say(stopped, "status", code=1)
    assert said.startswith("host h1: NOT RUNNING: the kernel stays as it is, new guests are isolated;")
    assert guests[0].name in said and guests[0].address4 in say(stopped, "compile")
    assert json.loads(say(stopped, "status", "-o", "json", code=1))["running"] is False


def test_hostd_has_never_run(site: Site, stopped: Node) -> None:
    stopped.sh("rm /run/slash32/hostd.status")
    said = say(stopped, "status", code=1)
    assert len(said.splitlines()) == 1 and "has not run since this host was booted; see systemctl status" in said
    state = "/tmp/none/state"
    stopped.write("/tmp/none.toml", f'state_dir = "{state}"\nrun_dir = "/tmp/none"\n')
    assert "table inet slash32 {" in say(stopped, "compile", "--config", "/tmp/none.toml")
    assert stopped.run(["test", "-e", state], check=False).returncode, "to ask leaves nothing behind"


def test_hostd_is_silent(site: Site) -> None:
    site.h1.sh("kill -STOP $(systemctl show -P MainPID slash32-hostd)")
    try:
        assert say(site.h1, "status", code=1).startswith("host h1: NOT ANSWERING: ")
    finally:
        site.h1.sh("kill -CONT $(systemctl show -P MainPID slash32-hostd)")
    assert say(site.h1, "status").startswith("host h1: running")


def test_others_than_root(site: Site) -> None:
    for verb in ("status", "diff", "compile", "key"):
        done = site.h1.run(["runuser", "-u", "nobody", "--", "slash32-hostd", verb], check=False)
        assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done
        assert "run this as root" in done.stderr
    done = site.d1.run(["runuser", "-u", "nobody", "--", "slash32", "status"], check=False)
    assert (done.returncode, done.stdout) == (1, "") and "run this as root, or join group slash32\n" in done.stderr


@pytest.mark.parametrize(("name", "unit"), [("h1", "slash32-hostd"), ("d1", "slash32-dispatcher")])
def test_a_broken_configuration_is_seen_in_systemctl_status(site: Site, name: str, unit: str) -> None:
    node, file = site.rack.node(name), f"/etc/slash32/{unit.removeprefix('slash32-')}.toml"
    good = node.read(file)
    node.write(file, f"{good}\nhots = 1\n")
    try:
        assert node.run(["systemctl", "restart", unit], check=False).returncode
        said = node.run(["systemctl", "status", "--no-pager", "-l", unit], check=False).stdout
        assert "Active: failed" in said and f"{unit}: {file}: hots: no such setting" in said and "Traceback" not in said
        assert unit in node.sh("systemctl --failed --no-legend")
    finally:
        node.write(file, good)
        product.restart(node, unit)
    product.wait_in_sync(site.rack)


def test_the_installed_completion(site: Site, guests: tuple[Guest, Guest]) -> None:
    def complete(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in words)
        script = f"""
            . /usr/share/bash-completion/completions/slash32
            COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
            _slash32_completion slash32; printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        return site.d1.sh(script).split()

    assert complete("slash32", "val") == ["validate"]
    assert "globalnetworkpolicies" in complete("slash32", "get", "g")
    assert complete("slash32", "describe", "ep", "left") == [guests[0].name]
    assert complete("slash32", "adopt", "h") == ["h1", "h2"]
