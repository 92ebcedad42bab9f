"""One deployed rack (h1, h2, d1; bookworm) for all system tests that ask for `site`.

    site.h1, site.h2, site.d1                   lab nodes; site.rack is the rack
    guest = site.guest(site.h1, "web")          a container, tagged role=web, with a name, MAC and addresses of its own;
                                                driver "qemu" for a virtual machine; like=GUEST for the same MAC and
                                                addresses; tag=, target=, words=, ... as in lab/domains.py
    site.start(guest, ...)                      define, start, wait until up and connected (all at once)
    site.start(guest, connected=False)          ... until up only: for guests that stay isolated
    site.stop(guest, ...); site.keep(guest)     destroy and undefine; leave that to the end of the scope
    site.apply(text or Path)                    slash32 apply --wait
    guest.run("ip", "a"), guest.probe(other), guest.reaches(other, "80"), guest.tap, guest.status(), guest.virsh(...)
    with site.scope(): ...                      guests and resources made inside are gone at the end

The fixture `site` is session-wide; each test runs in a scope of its own (autouse), and a module that wants to share
guests between its tests opens one in a module-scoped fixture:

    @pytest.fixture(scope="module")
    def pair(site):
        with site.scope(): ...; yield a, b

A test that kills, stops or reboots something puts it back. While developing, SLASH32_TEST_RACK=NAME keeps the rack NAME
up between runs (lab/rack --name NAME down removes it); install changed packages by taking it down first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from deployed import Site

from lab import product
from lab.paths import LabError
from lab.rack import Rack

NAME = "tsys"
LEGACY = ["h2"]  # both kinds of host


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("a rack needs root")
    kept = os.environ.get("SLASH32_TEST_RACK")
    if kept:
        yield Site(_kept(kept), _number=int.from_bytes(os.urandom(1)) * 4)
        return
    with product.new_rack(NAME, legacy=LEGACY) as rack:
        product.deploy(rack, seconds=90)
        yield Site(rack)


def _kept(name: str) -> Rack:
    try:
        return Rack.attach(name)
    except LabError:
        rack = product.new_rack(name, tied=False, legacy=LEGACY).up()
        product.deploy(rack, seconds=90)
        return rack


@pytest.fixture(autouse=True)
def scope(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of a module that uses the site leaves nothing on it."""
    if "site" not in request.fixturenames:
        yield
        return
    site: Site = request.getfixturevalue("site")
    with site.scope():
        yield
