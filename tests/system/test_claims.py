# Claims: an address has one owner in the fleet; who may not have it is told so in one line by `virsh start`, runs
# nowhere and leaves nothing behind. Tags that are wrong or hostile are refused the same way.
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deployed import FULL, Guest, Site

from lab import demo, domains, product
from lab.matrix import at_once
from lab.node import Node
from lab.process import CommandError

CORPUS = Path(__file__).resolve().parents[1] / "corpus/domains"
HOSTILE = """
address-and-shared address-attribute address-broadcast address-empty address-garbage address-leading-zero address-long
address-loopback address-mask address-multicast address-twice address-v6-link-local address-v6-mapped address-zone
addresses-too-many child-in-address empty-tag foreign-child interfaces-too-many label-key-blank label-key-long
label-newline label-no-key label-text label-twice label-value-long labels-too-many mac-absent mac-garbage
mac-twice-in-tag no-address no-interface no-namespace-child prefix-default prefix-host-bits profile-name shared-empty
stray-text
"""
RACES = 10 if FULL else 3


def refused(site: Site, guest: Guest) -> str:
    """`virsh start` fails with exit code 1, the guest does not run; our one line."""
    site.keep(guest)
    product.define(guest.node, guest.xml)
    with pytest.raises(CommandError) as caught:
        guest.virsh("start", guest.name)
    assert caught.value.result.returncode == 1
    assert not guest.running
    lines = [line for line in caught.value.result.stderr.splitlines() if "slash32:" in line]
    assert len(lines) == 1, caught.value.result.stderr
    assert len(lines[0]) < 800
    return lines[0]


ELEMENTS = {
    "nftables": "for name in source4 source6 macs; do nft list set inet slash32 $name; done",
    "iptables": "for name in source4 source6; do ipset save s32-$name | sort; done; iptables-legacy-save -t raw",
}


def left(node: Node) -> tuple[list[str], list[str], str]:
    """Whatever a guest would leave: taps, endpoints, elements."""
    taps = re.findall(r"vnet\d+", node.sh("ip -br link"))
    elements = re.sub(r"^[#:].*\n", "", node.sh(ELEMENTS[product.host_status(node)["packet_filter"]]), flags=re.M)
    return taps, [each["domain"] for each in product.host_status(node)["endpoints"]], elements


# -- one owner ---------------------------------------------------------------------------------------------------------


def test_an_address_in_use_is_refused_everywhere(site: Site) -> None:
    owner = site.guest(site.h1, "web")
    site.start(owner)
    before = [left(host) for host in site.rack.hosts]
    tag = domains.tag_xml("52:54:00:66:ff:01", [], {"role": "web"})
    behind = tag.replace("</slash32:interface>", f"<slash32:address>10.65.99.1</slash32:address>"
                         f"<slash32:prefix>{owner.address4}/32</slash32:prefix></slash32:interface>")  # fmt: skip
    cases = [
        (site.guest(site.h1, "web", addr4=owner.address4), owner.address4),
        (site.guest(site.h2, "web", addr4=owner.address4), owner.address4),
        (site.guest(site.h1, "web", "qemu", addr6=owner.address6), owner.address6),
        (site.guest(site.h2, "web", "qemu", addr6=owner.address6), owner.address6),
        (site.guest(site.h2, "web", like=owner), owner.address4),
        (site.guest(site.h2, "web", mac="52:54:00:66:ff:01", tag=behind), owner.address4),
    ]
    for guest, address in cases:
        line = refused(site, guest)
        for word in (
            guest.name,
            address,
            owner.name,
            "on h1" if guest.node is site.h2 else "on this host",
            "in use",
        ):
            assert word in line, f"{word}: {line}"
    assert [left(host) for host in site.rack.hosts] == before
    assert owner.running and (owner.status() or {})["connected"]


def test_the_same_domain_does_not_run_twice(site: Site) -> None:
    """Its image copied to another host, uuid and all."""
    owner = site.guest(site.h1, "web")
    site.start(owner)
    twin = site.guest(site.h2, "web", like=owner, name=owner.name)
    line = refused(site, twin)
    assert owner.address4 in line and "h1" in line
    assert (owner.status() or {})["connected"]


def test_an_address_is_free_once_its_owner_stopped(site: Site) -> None:
    first = site.guest(site.h1, "web")
    second = site.guest(site.h2, "web", "qemu", like=first)
    site.start(first)
    assert first.address4 in refused(site, second)
    first.virsh("destroy", first.name)
    eventually_starts(second)
    product.wait_connected(site.h2, second.name, seconds=40)
    with pytest.raises(CommandError, match=f"{first.address4}.*in use.*{second.name}.*h2"):
        first.virsh("start", first.name)
    second.virsh("destroy", second.name)
    eventually_starts(first)
    product.wait_connected(site.h1, first.name)


def eventually_starts(guest: Guest) -> None:
    """The release is on its way when `virsh destroy` returns; it may take a moment, never more."""

    def problem() -> str | None:
        try:
            guest.virsh("start", guest.name)
        except CommandError as error:
            return str(error)
        return None

    said = product.poll(problem, 10)
    assert said is None, said


def test_two_hosts_that_claim_at_once(site: Site) -> None:
    for number in range(RACES):
        first = site.guest(site.h1, "web", name=f"race{number}a")
        rivals = [first, site.guest(site.h2, "web", like=first, name=f"race{number}b")]
        site.keep(*rivals)
        at_once(lambda guest: product.define(guest.node, guest.xml), rivals)

        def begin(guest: Guest) -> str:
            try:
                guest.virsh("start", guest.name)
            except CommandError as error:
                return str(error.result.stderr)
            return ""

        said = at_once(begin, rivals)
        tails = [product.journal_tail(guest.node, lines=12) for guest in rivals]
        assert sorted(guest.running for guest in rivals) == [False, True], (said, tails)
        assert "in use" in "".join(said)


def test_the_owner_keeps_its_address_while_its_hostd_is_dead(site: Site) -> None:
    owner = site.guest(site.h1, "web")
    site.start(owner)
    thief = site.guest(site.h2, "web", like=owner)
    demo.kill(site.h1, "slash32-hostd")
    try:
        assert owner.address4 in refused(site, thief)
    finally:
        demo.revive(site.h1, "slash32-hostd")
    product.wait_connected(site.h1, owner.name, seconds=30)
    assert owner.address4 in refused(site, thief)


def test_without_a_dispatcher_what_is_known_is_refused_too(site: Site) -> None:
    owner, local = site.guest(site.h1, "web"), site.guest(site.h2, "web")
    site.start(owner, local)
    site.settled()
    demo.kill(site.d1, "slash32-dispatcher")
    try:
        for taken, host in ((owner, "h1"), (local, "h2")):
            line = refused(site, site.guest(site.h2, "web", like=taken))
            assert taken.address4 in line and (host in line or taken.name in line), line
    finally:
        demo.revive(site.d1, "slash32-dispatcher")
        product.wait_in_sync(site.rack, seconds=40)


# -- what a host may claim ---------------------------------------------------------------------------------------------


@contextmanager
def bounded(site: Site, node: Node, **bounds: object) -> Iterator[None]:
    """Its Host resource with bounds; the old one again at the end."""
    key = product.public_key(node)
    plain = product.host_resource(node, key)
    product.apply(site.rack, json.dumps({**plain, "spec": {**plain["spec"], **bounds}}))
    try:
        yield
    finally:
        product.apply(site.rack, json.dumps(plain))


def test_a_host_claims_within_its_bounds_only(site: Site) -> None:
    with bounded(site, site.h2, nets=["10.65.0.0/16", "fd00:65::/64"], labels={"role": ["web"], "zone": []}):
        outside4 = site.guest(site.h2, "web", addr4="10.66.0.1")
        outside6 = site.guest(site.h2, "web", addr6="fd00:66::1")
        label = site.guest(site.h2, "db")
        zone = site.guest(site.h2, "web", labels={"zone": "dmz"})
        fine = site.guest(site.h2, "web", labels={"tier": "front"})
        elsewhere = site.guest(site.h1, "db", addr4="10.66.0.1")
        rejected = [(outside4, "10.66.0.1"), (outside6, "fd00:66::1"), (label, "db"), (zone, "zone")]
        said = at_once(lambda pair: refused(site, pair[0]), rejected)
        for (guest, word), line in zip(rejected, said, strict=True):
            assert word in line and guest.name in line and "h2" in line, line
        site.start(fine, elsewhere)
    site.stop(elsewhere)
    eventually_starts(outside4)
    product.wait_connected(site.h2, outside4.name, seconds=40)


# -- hostile tags ------------------------------------------------------------------------------------------------------


def hostile(site: Site, name: str, driver: str) -> tuple[Guest, str]:
    """A guest of the lab with a tag of the corpus, and what the corpus says its line says."""
    text = (CORPUS / f"bad-{name}.xml").read_text()
    expect, tag = re.search(r"<!-- expect: (.*?) -->", text), re.search(r"(?s)<metadata>(.*?)</metadata>", text)
    assert expect and tag, name
    guest = site.guest(site.h1, "web", driver, name=f"bad-{name}", mac="52:54:00:00:00:02", tag=tag[1])
    return guest, expect[1]


def test_hostile_tags_are_one_line_and_leave_nothing(site: Site) -> None:
    before = left(site.h1)
    names = HOSTILE.split()
    cases = [(name, *hostile(site, name, "qemu" if number % 8 == 0 else "lxc")) for number, name in enumerate(names)]
    said = at_once(lambda case: refused(site, case[1]), cases)
    wrong = [f"{name}: {line}" for (name, _, expect), line in zip(cases, said, strict=True) if expect not in line]
    assert not wrong, "\n".join(wrong)
    assert left(site.h1) == before
    fine = site.guest(site.h1, "web", mac="52:54:00:00:00:02", addr4="10.65.0.2")
    site.start(fine)  # the control: the same MAC and address in a good tag


def test_a_bad_tag_on_a_running_guest_leaves_the_last_good_one(site: Site) -> None:
    guest = site.guest(site.h1, "web")
    site.start(guest)
    bad = "<endpoint><interface><address>10.65.0.300</address></interface></endpoint>"
    words = ["--uri", domains.NAMESPACE, "--key", "slash32", "--live", "--set", bad]
    guest.virsh("metadata", guest.name, *words)

    def unseen() -> str | None:
        status = guest.status()
        return None if status and "10.65.0.300" in status["problem"] else str(status)

    said = product.poll(unseen, 10)
    assert said is None, said
    status = guest.status() or {}
    assert status["connected"] and guest.address4 in status["addresses"] and status["labels"]["role"] == "web"
