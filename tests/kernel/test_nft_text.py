# The two ways into the kernel are one: netlink and text make the same tables, and what nft lists loads again.
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from netns import Namespace, run
from nft_samples import GUARD, contents, fixed, write

from hostd.compiler.ruleset import Guard
from hostd.dataplane.nft import Content, NftTable, render

COUNT = 300 if os.environ.get("SLASH32_COUNTS") == "full" else 25
GOLDEN = Path(__file__).parent.parent / "golden"


def _listing() -> str:
    return run("nft", "list", "ruleset")


def _bytecode_in_kernel() -> str:
    """Without what differs by nature: handles, names of anonymous sets, our digests, the order of hashed elements."""
    shown = re.sub(r"__set\d+", "__set", run("nft", "--debug=netlink", "list", "ruleset"))
    shown = re.sub(r"(?m)^(\w+ slash32 [\w-]+)[ 0-9]*$", r"\1", shown)
    shown = re.sub(r"(?m)^  userdata = .*\n|^\n", "", shown)
    return re.sub(r"(?:\telement .*\n)+", lambda found: "".join(sorted(found[0].splitlines(keepends=True))), shown)


def _both(content: Content, peer: Namespace, guard: Guard = GUARD) -> tuple[str, str]:
    """The listing after our netlink, and after the text in the other namespace; both namespaces empty again."""
    table = NftTable(guard)
    try:
        table.load()
        write(table, content)
        by_netlink = _listing()
        run("nft", "-c", "-f", "-", stdin=by_netlink)
    finally:
        table.close()
        run("nft", "flush", "ruleset")
    with peer.entered():
        run("nft", "-f", "-", stdin=render(guard, content))
        by_text = _listing()
        run("nft", "flush", "ruleset")
    return by_netlink, by_text


@pytest.mark.parametrize("guard", [Guard(), GUARD])
def test_skeleton_is_the_same_bytecode_in_the_kernel(netns: Namespace, peer: Namespace, guard: Guard) -> None:
    table = NftTable(guard)
    table.load()
    ours = _listing(), _bytecode_in_kernel()
    with peer.entered():
        run("nft", "-f", "-", stdin=render(guard))
        assert (_listing(), _bytecode_in_kernel()) == ours
    table.close()


@pytest.mark.parametrize("guard", [Guard(), GUARD])
def test_listing_loads_again_as_the_same_bytecode(netns: Namespace, guard: Guard) -> None:
    table = NftTable(guard)
    table.load()
    before = _bytecode_in_kernel()
    listing = _listing()
    table.close()
    run("nft", "flush", "ruleset")
    run("nft", "-f", "-", stdin=listing)
    assert _bytecode_in_kernel() == before
    assert _listing() == listing


def test_every_kind_of_match(netns: Namespace, peer: Namespace) -> None:
    by_netlink, by_text = _both(fixed(), peer)
    assert by_netlink == by_text
    assert "p-web-in" in by_netlink
    golden = GOLDEN / "nft-every-kind.nft"
    rendered = render(GUARD, fixed())
    if os.environ.get("SLASH32_GOLDEN"):
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "SLASH32_GOLDEN=1 writes it anew"


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=contents())
def test_any_filter(netns: Namespace, peer: Namespace, content: Content) -> None:
    by_netlink, by_text = _both(content, peer)
    assert by_netlink == by_text
