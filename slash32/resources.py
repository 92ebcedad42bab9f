# Owns: the kinds of resources, both ways: documents (plain data from YAML or JSON) <-> the typed model. Pure.
# Reading YAML text is slash32.documents; a single rule is slash32.rules.
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from slash32.decode import Field, shown
from slash32.errors import quoted
from slash32.model import Host
from slash32.net import Address, format_address, parse_address, parse_prefix, version
from slash32.policy import Direction, Policy, Profile, Rule
from slash32.rules import NETS_LIMIT, SELECTOR_LIMIT, decode_rule, decode_selector, encode_rule
from slash32.selector import MAX_LENGTH

if TYPE_CHECKING:
    from slash32.documents import Document

API_VERSION = "slash32/v1"
ALIAS = "projectcalico.org/v3"
RULES_LIMIT = 1024  # of one direction
LABELS_LIMIT = 128

Resource = Policy | Profile | Host
T = TypeVar("T")


class Kind(NamedTuple):
    name: str  # as documents spell it
    plural: str  # as URLs and tables spell it
    short: tuple[str, ...]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("GlobalNetworkPolicy", "globalnetworkpolicies", ("gnp", "policy", "policies")),
        Kind("Profile", "profiles", ("prof",)),
        Kind("Host", "hosts", ()),
    )
}
LATER = (
    "Tier", "GlobalNetworkSet", "NetworkSet", "NetworkPolicy", "HostEndpoint", "IPPool", "StagedGlobalNetworkPolicy",
    "StagedNetworkPolicy", "StagedKubernetesNetworkPolicy",
)  # fmt: skip

_DNS = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LABEL = re.compile(r"[A-Za-z0-9_./-]{1,512}")
_Z85 = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_Z85_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
# What an API server adds to an exported document: it says nothing about policy, so it may stay.
_BOOKKEEPING = ("uid", "resourceVersion", "creationTimestamp", "generation")
_METADATA_LATER = (
    "labels", "annotations", "namespace", "generateName", "finalizers", "ownerReferences", "managedFields",
)  # fmt: skip
_POLICY = ("order", "selector", "types", "ingress", "egress")
_POLICY_LATER = (
    "tier", "namespaceSelector", "serviceAccountSelector", "applyOnForward", "doNotTrack", "preDNAT",
    "performanceHints", "stagedAction",
)  # fmt: skip


def load_yaml(text: str, source: str) -> list[Document]:
    """All documents of a YAML (or JSON) file, not yet decoded. Raises ResourceError naming file and line."""
    from slash32.documents import load_yaml as load  # PyYAML only where YAML is read

    return load(text, source)


def find_kind(word: str) -> Kind | None:
    """By name, plural or short name, in any case."""
    wanted = word.lower()
    for kind in KINDS.values():
        if wanted in (kind.name.lower(), kind.plural, *kind.short):
            return kind
    return None


def kind_of(resource: Resource) -> str:
    if isinstance(resource, Policy):
        return "GlobalNetworkPolicy"
    return "Profile" if isinstance(resource, Profile) else "Host"


def decode(document: Document | Mapping[str, object], *, stored: bool = False) -> Resource:
    """Checks everything; raises ResourceError for the first thing wrong. `stored`: `encode` wrote it, so selectors
    are canonical and may be longer than what a user may write."""
    value = document if isinstance(document, Mapping) else document.value
    prefix = "" if isinstance(document, Mapping) or not document.source else f"{document.source}:{document.line}: "
    subject = prefix + _subject(value)
    root = Field(dict(value), subject)
    entries = root.entries()
    for key in ("apiVersion", "kind"):
        if key not in entries:
            root.fail(f"{key} is missing")
    entries["apiVersion"].one_of((API_VERSION, ALIAS))
    kind = entries["kind"].one_of(tuple(KINDS), LATER)
    given = root.fields(("apiVersion", "kind", "metadata", "spec"), ("status",))
    for key in ("metadata", "spec"):
        if key not in given:
            root.fail(f"{key} is missing")
    name = _name(given["metadata"], 64 if kind == "Host" else 253)
    if kind == "Host":
        return _host(name, given["spec"])
    limit = MAX_LENGTH if stored else SELECTOR_LIMIT
    if kind == "Profile":
        return _profile(name, given["spec"], limit)
    return _policy(name, given["spec"], limit)


def encode(resource: Resource) -> dict[str, object]:
    """The canonical document, JSON-able. decode(encode(r), stored=True) == r."""
    if isinstance(resource, Policy):
        spec = _encode_policy(resource)
    elif isinstance(resource, Profile):
        spec = _encode_profile(resource)
    else:
        spec = _encode_host(resource)
    kind = kind_of(resource)
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": resource.name}, "spec": spec}


def _subject(value: Mapping[str, object]) -> str:
    """`Kind name`, as far as the document says it."""
    kind, metadata = value.get("kind"), value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    known = kind if isinstance(kind, str) and (kind in KINDS or kind in LATER) else "document"
    if not isinstance(name, str):
        return known
    return f"{known} {name if _DNS.fullmatch(name) and len(name) <= 253 else quoted(name, 64)}"


def _name(metadata: Field, at_most: int) -> str:
    if isinstance(metadata.value, dict):
        metadata = replace(metadata, value={k: v for k, v in metadata.value.items() if k not in _BOOKKEEPING})
    given = metadata.fields(("name",), _METADATA_LATER)
    if "name" not in given:
        metadata.fail("name is missing")
    name = given["name"].line(at_most)
    if not _DNS.fullmatch(name) or any(len(part) > 63 for part in name.split(".")):
        given["name"].fail(f"{quoted(name)} is not a name: use a-z, 0-9, '-' and '.', as in web-1.rack2")
    return name


def _policy(name: str, spec: Field, limit: int) -> Policy:
    given = spec.fields(_POLICY, _POLICY_LATER)
    ingress, egress = _rules(given, "ingress", limit), _rules(given, "egress", limit)
    if "types" in given:
        types = _types(given["types"])
    else:  # Calico's default: what there are rules for, else Ingress
        types = tuple(d for d, rules in ((Direction.INGRESS, ingress), (Direction.EGRESS, egress)) if rules)
        types = types or (Direction.INGRESS,)
    for direction, rules in ((Direction.INGRESS, ingress), (Direction.EGRESS, egress)):
        if rules and direction not in types:
            given[direction.value.lower()].fail(f"has rules, but spec.types lacks {direction.value}: add it there")
    selector = decode_selector(given["selector"], limit) if "selector" in given else "all()"
    order = given["order"].number() if "order" in given else None
    return Policy(name, selector, types, order, ingress, egress)


def _types(field: Field) -> tuple[Direction, ...]:
    found: list[Direction] = []
    for item in field.items(2, at_least=1):
        direction = Direction(item.one_of([d.value for d in Direction]))
        if direction in found:
            item.fail(f"{direction.value} is given twice")
        found.append(direction)
    return tuple(d for d in Direction if d in found)


def _rules(given: dict[str, Field], key: str, limit: int) -> tuple[Rule, ...]:
    return tuple(decode_rule(item, limit) for item in given[key].items(RULES_LIMIT)) if key in given else ()


def _profile(name: str, spec: Field, limit: int) -> Profile:
    given = spec.fields(("ingress", "egress", "labelsToApply"))
    labels: dict[str, str] = {}
    if "labelsToApply" in given:
        labels = {key: _label_value(field) for key, field in _label_entries(given["labelsToApply"]).items()}
    return Profile(name, _rules(given, "ingress", limit), _rules(given, "egress", limit), labels)


def _label_entries(field: Field) -> dict[str, Field]:
    entries = field.entries()
    if len(entries) > LABELS_LIMIT:
        field.fail(f"has {len(entries)} labels; at most {LABELS_LIMIT} are allowed")
    for key, child in entries.items():
        if not _LABEL.fullmatch(key):
            child.fail("is not a label name: use 1 to 512 letters, digits and _ . / -")
    return entries


def _label_value(field: Field) -> str:
    return field.line(512)


def _host(name: str, spec: Field) -> Host:
    given = spec.fields(("publicKey", "addresses", "nets", "labels"))
    key = _public_key(given["publicKey"]) if "publicKey" in given else ""
    addresses: dict[int, Address] = {}
    for item in given["addresses"].items(2) if "addresses" in given else ():
        address = _address(item)
        if version(address) in addresses:
            item.fail(f"a second IPv{version(address)} address: give one next hop for each IP version")
        addresses[version(address)] = address
    nets = []
    for item in given["nets"].items(NETS_LIMIT, at_least=1) if "nets" in given else ():
        text = item.line(64)
        nets.append(_parsed(item, parse_prefix, text, "a prefix like 10.65.0.0/24"))
    labels: dict[str, tuple[str, ...]] = {}
    if "labels" in given:
        for label, values in _label_entries(given["labels"]).items():
            labels[label] = tuple(_label_value(value) for value in values.items(1024))
    return Host(name, key, tuple(addresses.values()), tuple(nets), labels)


def _address(field: Field) -> Address:
    text = field.line(64)
    return _parsed(field, parse_address, text, "an IP address like 192.0.2.1 or fd00::1, without a mask")


def _parsed(field: Field, parse: Callable[[str], T], text: str, wanted: str) -> T:
    try:
        return parse(text)
    except ValueError:
        field.fail(f"{quoted(text)} is not {wanted}")


def _public_key(field: Field) -> str:
    text = field.string(256)
    chunks = [text[at : at + 5] for at in range(0, len(text), 5)]
    if not _Z85.fullmatch(text) or any(_z85_number(chunk) >= 1 << 32 for chunk in chunks):
        field.fail(f"{shown(text)} is not a CURVE public key: 40 characters of Z85, as the host's key file holds them")
    return text


def _z85_number(chunk: str) -> int:
    number = 0
    for character in chunk:
        number = number * 85 + _Z85_DIGITS.index(character)
    return number


def _encode_policy(policy: Policy) -> dict[str, object]:
    spec: dict[str, object] = {}
    if policy.order is not None:
        spec["order"] = int(policy.order) if policy.order.is_integer() else policy.order
    spec["selector"] = policy.selector
    spec["types"] = [direction.value for direction in policy.types]
    for direction in policy.types:
        spec[direction.value.lower()] = [encode_rule(rule) for rule in policy.rules(direction)]
    return spec


def _encode_profile(profile: Profile) -> dict[str, object]:
    spec: dict[str, object] = {"labelsToApply": dict(sorted(profile.labels.items()))} if profile.labels else {}
    for key, rules in (("ingress", profile.ingress), ("egress", profile.egress)):
        if rules:
            spec[key] = [encode_rule(rule) for rule in rules]
    return spec


def _encode_host(host: Host) -> dict[str, object]:
    spec: dict[str, object] = {
        "publicKey": host.public_key,
        "addresses": [format_address(address) for address in host.addresses],
        "nets": [str(net) for net in host.nets],
        "labels": {key: list(values) for key, values in sorted(host.labels.items())},
    }
    return {key: value for key, value in spec.items() if value}
