# Addresses as text: what is read and written the short way is what ipaddress reads and writes.
from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slash32.net import Prefix, format_address, parse_prefix

NEAR = st.from_regex(r"[0-9]{1,4}(\.[0-9]{1,4}){3}(/[0-9]{0,3})?", fullmatch=True)
BYTES = st.lists(st.integers(0, 300).map(str), min_size=3, max_size=5).map(".".join)


@given(st.one_of(NEAR, BYTES, st.text(max_size=20), st.ip_addresses().map(str)))
@example("10.65.0.2")
@example("10.65.0.2/32")
@example("10.65.0.02")
@example("10.65.0.2\n")
@example("10.65.0.256")
@example("10.65.0.\u0662")
@example("10.65.0.2/032")
def test_a_prefix_is_what_ipaddress_says(text: str) -> None:
    try:
        expected = ipaddress.ip_network(text)
    except ValueError:
        with pytest.raises(ValueError, match="is not a prefix"):
            parse_prefix(text)
    else:
        assert parse_prefix(text) == Prefix(expected.network_address.packed, expected.prefixlen)


@given(st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)))
def test_an_address_is_written_as_ipaddress_does(address: bytes) -> None:
    assert format_address(address) == str(ipaddress.ip_address(address))
