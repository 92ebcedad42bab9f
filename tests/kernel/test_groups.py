from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from netns import Namespace

from bench.rig import sysfs
from hostd.compiler.forwarding import Failure, SetGroup
from hostd.dataplane.groups import Groups
from hostd.dataplane.rtnl import Rtnl

BASE = 0x53320000


class Scene:
    def __init__(self, links: str | None = None) -> None:
        self.rtnl = Rtnl()
        self.netlink: list[SetGroup] = []  # what went that way
        self.links = links or f"{sysfs()}/class/net"
        self.groups = Groups(self.by_netlink, self.links)

    def by_netlink(self, op: SetGroup) -> list[Failure]:
        self.netlink.append(op)
        return self.rtnl.change([op])

    def set(self, name: str, group: int) -> int:
        """What it is in then."""
        link = self.rtnl.link(name)
        assert link is not None
        assert self.groups.set(SetGroup(link.ifindex, group)) == []
        now = self.rtnl.link(name)
        assert now is not None
        return now.group


@pytest.fixture
def scene(netns: Namespace) -> Iterator[Scene]:
    for name in ("vnet0", "vnet1"):
        netns.ip(f"link add {name} type bridge")
        netns.ip(f"link set {name} up")
    scene = Scene()
    yield scene
    scene.rtnl.close()


def test_the_first_goes_by_netlink_the_others_by_sys(scene: Scene) -> None:
    for n in (1, 2, 3, 0):
        assert scene.set("vnet0", BASE + n if n else 0) == (BASE + n if n else 0)
        assert scene.set("vnet1", BASE + 9) == BASE + 9
    assert len(scene.netlink) == 1


def test_what_changes_nothing_proves_nothing(scene: Scene) -> None:
    scene.set("vnet0", 0)
    scene.set("vnet0", BASE + 1)
    assert len(scene.netlink) == 2
    scene.set("vnet0", BASE + 2)
    assert len(scene.netlink) == 2


def test_the_links_of_another_namespace_are_let_be(scene: Scene, peer: Namespace, netns: Namespace) -> None:
    """With the same names and indexes."""
    with peer.entered():
        for name in ("vnet0", "vnet1"):
            link = scene.rtnl.link(name)
            assert link is not None
            peer.ip(f"link add {name} index {link.ifindex} type bridge")
        theirs = Scene()
    mistaken = Scene(theirs.links)
    for n in (1, 2, 3):
        assert mistaken.set("vnet0", BASE + n) == BASE + n
    assert len(mistaken.netlink) == 3
    with peer.entered():
        there = Rtnl()
        assert {link.group for link in there.links().values()} == {0}
        there.close()


def test_a_name_that_went_to_another_link(scene: Scene, netns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.set("vnet1", BASE + 1)
    first, second = scene.rtnl.link("vnet0"), scene.rtnl.link("vnet1")
    assert first and second
    monkeypatch.setattr("socket.if_indextoname", lambda _: "vnet1")  # as if renamed just after
    assert scene.groups.set(SetGroup(first.ifindex, BASE + 7)) == []
    found = {link.name: link.group for link in scene.rtnl.links().values()}
    assert (found["vnet0"], found["vnet1"]) == (BASE + 7, BASE + 1) and len(scene.netlink) == 2


def test_a_link_that_is_gone_is_said_by_netlink(scene: Scene, netns: Namespace) -> None:
    scene.set("vnet1", BASE + 1)
    link = scene.rtnl.link("vnet0")
    assert link is not None
    netns.ip("link del vnet0")
    (failure,) = scene.groups.set(SetGroup(link.ifindex, BASE + 1))
    assert "group" in failure.message
    assert scene.groups.set(SetGroup(link.ifindex, 0)) == [], "nothing to close"


def test_no_sys_at_all(netns: Namespace) -> None:
    netns.ip("link add vnet0 type bridge")
    scene = Scene("/nowhere")
    assert scene.set("vnet0", BASE + 1) == BASE + 1 and scene.set("vnet0", BASE + 2) == BASE + 2
    assert not os.path.exists("/nowhere") and len(scene.netlink) == 2  # noqa: PTH110
