# Owns: the documents of the machines, both ways: Host and HostEndpoint <-> slash32.model.Host, slash32.policy. Pure.
from __future__ import annotations

import re

from slash32.decode import LABEL_VALUE_LIMIT, Field, short, shown
from slash32.model import Host
from slash32.net import Address, format_address, version
from slash32.policy import ANY_INTERFACE, HostEndpoint
from slash32.rules import NETS_LIMIT

HOST_NAME_LIMIT = 64
ADDRESSES_LIMIT = 64  # of one host endpoint
PROFILES_LIMIT = 16
VALUES_LIMIT = 1024  # that one label may have

HOST = ("publicKey", "addresses", "nets", "labels")
HOST_ENDPOINT = ("node", "interfaceName", "expectedIPs", "profiles")
HOST_ENDPOINT_LATER = {"ports": "named ports are not: remove it, and give numbers in the rules"}

Z85 = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_Z85_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
INTERFACE = re.compile(r"\*|[A-Za-z0-9_.@-]{1,15}")  # the kernel takes more, but iptables reads eth+ as a pattern


def decode_host(metadata: Field, spec: Field, stored: bool) -> Host:
    given = spec.fields(HOST)
    key = _public_key(given["publicKey"]) if "publicKey" in given else ""
    addresses: dict[int, Address] = {}
    for item in given["addresses"].items(2) if "addresses" in given else ():
        address = item.address()
        if version(address) in addresses:
            item.fail(f"a second IPv{version(address)} address: give one next hop for each IP version")
        addresses[version(address)] = address
    nets = [item.prefix() for item in given["nets"].items(NETS_LIMIT, at_least=1)] if "nets" in given else []
    labels: dict[str, tuple[str, ...]] = {}
    for label, values in given["labels"].label_entries().items() if "labels" in given else ():
        labels[label] = tuple(value.line(LABEL_VALUE_LIMIT) for value in values.items(VALUES_LIMIT))
    name = metadata.entries()["name"].name(HOST_NAME_LIMIT)
    return Host(name, key, tuple(addresses.values()), tuple(nets), labels)


def _public_key(field: Field) -> str:
    text = field.string(256)
    try:
        return public_key(text)
    except ValueError as e:
        field.fail(str(e))


def public_key(text: str) -> str:
    """A CURVE key in Z85 (ZeroMQ RFC 32). Raises ValueError, one line."""
    chunks = [text[at : at + 5] for at in range(0, len(text), 5)]
    if not Z85.fullmatch(text) or any(_z85_number(chunk) >= 1 << 32 for chunk in chunks):
        what = "is not a CURVE public key: give the 40 characters that slash32-hostd key prints"
        raise ValueError(f"{shown(text)} {what}")
    return text


def _z85_number(chunk: str) -> int:
    number = 0
    for character in chunk:
        number = number * 85 + _Z85_DIGITS.index(character)
    return number


def encode_host(host: Host) -> dict[str, object]:
    spec: dict[str, object] = {
        "publicKey": host.public_key,
        "addresses": [format_address(address) for address in host.addresses],
        "nets": [str(net) for net in host.nets],
        "labels": {key: list(values) for key, values in sorted(host.labels.items())},
    }
    return {key: value for key, value in spec.items() if value}


def decode_host_endpoint(metadata: Field, spec: Field, stored: bool) -> HostEndpoint:
    given, about = spec.fields(HOST_ENDPOINT, HOST_ENDPOINT_LATER), metadata.entries()
    if "node" not in given:
        spec.fail("node is missing; give the name of its Host")
    if "interfaceName" not in given:
        spec.fail('interfaceName is missing; give one, or "*" for every interface of the host')
    addresses = given["expectedIPs"].items(ADDRESSES_LIMIT) if "expectedIPs" in given else []
    profiles = given["profiles"].items(PROFILES_LIMIT) if "profiles" in given else []
    return HostEndpoint(
        about["name"].name(),
        given["node"].name(HOST_NAME_LIMIT),
        _interface(given["interfaceName"]),
        about["labels"].labels() if "labels" in about else {},
        tuple(dict.fromkeys(item.address() for item in addresses)),
        tuple(dict.fromkeys(item.name() for item in profiles)),
    )


def _interface(field: Field) -> str:
    text = field.line(64)
    if text == "lo":
        field.fail('"lo" is always open: give another interface, or remove the document')
    if "*" in text and text != ANY_INTERFACE:
        field.fail(f'{short(text)}: give one interface, or "*" alone for all of them')
    if not INTERFACE.fullmatch(text) or text in (".", ".."):
        field.fail(f'{short(text)} is not an interface\'s name: use 1 to 15 letters, digits and _ . @ -, or "*"')
    return text


def encode_host_endpoint(endpoint: HostEndpoint) -> dict[str, object]:
    spec: dict[str, object] = {
        "node": endpoint.node,
        "interfaceName": endpoint.interface,
        "expectedIPs": [format_address(address) for address in endpoint.addresses],
        "profiles": list(endpoint.profiles),
    }
    return {key: value for key, value in spec.items() if value}
