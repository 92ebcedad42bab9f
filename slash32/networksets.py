# Owns: the documents of network sets, both ways: GlobalNetworkSet <-> slash32.policy.NetworkSet. Pure.
from __future__ import annotations

from slash32.decode import Field
from slash32.net import format_address
from slash32.policy import NetworkSet

NETWORK_SET = ("nets",)
MEMBERS_LIMIT = 100_000


def decode_network_set(metadata: Field, spec: Field, stored: bool) -> NetworkSet:
    """An empty set is one: it will be filled."""
    given, about = spec.fields(NETWORK_SET), metadata.entries()
    nets = dict.fromkeys(item.prefix() for item in given["nets"].items(MEMBERS_LIMIT)) if "nets" in given else ()
    return NetworkSet(about["name"].name(), about["labels"].labels() if "labels" in about else {}, tuple(nets))


def encode_network_set(found: NetworkSet) -> dict[str, object]:
    """Addresses without a mask, as Calico writes them."""
    whole = {4: 32, 6: 128}
    nets = [format_address(n.network) if n.length == whole[n.version] else str(n) for n in found.nets]
    return {"nets": nets} if nets else {}
