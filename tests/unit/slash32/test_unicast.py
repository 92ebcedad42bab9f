# Addresses that nobody can have: the quick look says what the long one says.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slash32 import unicast
from slash32.net import Prefix, parse_prefix


@pytest.mark.parametrize("good", ["10.65.0.2/32", "10.0.0.0/8", "168.0.0.0/8", "223.0.0.0/8", "fd00::/8", "fc00::/7"])
def test_usable(good: str) -> None:
    assert unicast.unusable(parse_prefix(good)) is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("0.0.0.0/0", "unspecified"),
        ("128.0.0.0/1", "link-local"),
        ("126.0.0.0/7", "loopback"),
        ("169.254.1.1/32", "gateway"),
        ("169.0.0.0/8", "link-local"),
        ("255.255.255.255/32", "broadcast"),
        ("::1/128", "loopback"),
        ("::ffff:10.65.0.2/128", "mapped"),
        ("fe80::/9", "link-local"),
        ("8000::/1", "link-local"),
        ("ff02::1/128", "multicast"),
    ],
)
def test_unusable(bad: str, why: str) -> None:
    assert why in (unicast.unusable(parse_prefix(bad)) or "usable")


@given(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), st.integers(0, 128))
def test_the_quick_look_is_right(address: bytes, bits: int) -> None:
    length = bits % (8 * len(address) + 1)
    shift = 8 * len(address) - length
    prefix = Prefix((int.from_bytes(address, "big") >> shift << shift).to_bytes(len(address), "big"), length)
    overlaps = any(
        each.contains(prefix.network) or prefix.contains(each.network) for each, _ in unicast._NOBODYS
    )
    assert (unicast.unusable(prefix) is not None) == overlaps
