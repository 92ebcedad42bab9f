# Owns: JSON Schemas (2020-12) of the documents, for editors and checks in pipelines: structure only, from the decoders'
# own tables. What these let through, `slash32 validate` may still refuse: sense, and selectors' grammar. Pure.
from __future__ import annotations

from collections.abc import Mapping, Sequence

from slash32 import hosts, networksets, policies, resources, rules
from slash32.decode import LABEL, LABEL_VALUE_LIMIT, LABELS_LIMIT, NAME, NAME_LIMIT, PREFIX
from slash32.policy import DEFAULT_TIER

Schema = dict[str, object]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
LISTS = ("List", *(f"{kind}List" for kind in resources.KINDS))


def schema_of(kind: str | None = None) -> Schema:
    """Of one kind, or of any document, lists included. Stands by itself. `kind` as in KINDS."""
    kinds = resources.KINDS if kind is None else (kind,)
    shared: dict[str, Schema] = {**_SHARED, **{name: _document(name) for name in kinds}}
    if kind is not None:
        top: Schema = {"title": f"slash32 {kind}", "$ref": f"#/$defs/{kind}"}
    else:
        shared["List"] = _list()
        top = {"title": "a slash32 resource, or a list of them", "$ref": "#/$defs/Any"}
        shared["Any"] = _any(tuple(kinds))
    return {"$schema": DRAFT, **top, "$defs": shared}


def _any(kinds: Sequence[str]) -> Schema:
    """By `kind`, so that an error is about the kind that was meant."""
    cases: list[Schema] = [_where_kind({"const": kind}, kind) for kind in kinds]
    return {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": [*kinds, *LISTS]}},
        "allOf": [*cases, _where_kind({"enum": list(LISTS)}, "List")],
    }


def _where_kind(kind: Schema, then: str) -> Schema:
    return {"if": {"required": ["kind"], "properties": {"kind": kind}}, "then": {"$ref": f"#/$defs/{then}"}}


def _list() -> Schema:
    fields = {
        "apiVersion": {"enum": list(resources.LIST_API_VERSIONS)},
        "kind": {"enum": list(LISTS)},
        "metadata": {"type": "object"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/Any"}},
    }
    return _object(tuple(fields), fields, ("items",))


def _document(kind: str) -> Schema:
    fields: dict[str, Schema] = {
        "apiVersion": {"enum": [resources.API_VERSION, resources.ALIAS]},
        "kind": {"const": kind},
        "metadata": _metadata(kind),
        "spec": _SPECS[kind],
    }
    frame: tuple[str, ...] = resources.FRAME
    if kind == "Host":
        frame, fields["status"] = resources.HOST_FRAME, {"type": "object", "description": "how it is; not applied"}
    return {"title": kind, **_object(frame, fields, resources.FRAME), "description": _KINDS[kind]}


def _metadata(kind: str) -> Schema:
    at_most = hosts.HOST_NAME_LIMIT if kind == "Host" else NAME_LIMIT
    name: Schema = {**_text(NAME.pattern, at_most), "description": "unique among resources of this kind"}
    fields: dict[str, Schema] = {key: {"description": "bookkeeping"} for key in resources.BOOKKEEPING}
    fields["annotations"] = {"description": "notes; they say nothing about policy"}
    fields["name"] = name
    if kind in ("GlobalNetworkSet", "HostEndpoint"):
        fields["labels"] = _ref("labels", "what selectors see")
    if kind in ("GlobalNetworkPolicy", "StagedGlobalNetworkPolicy"):
        label: Schema = {"type": "string", "description": "written by Calico's API server; as spec.tier"}
        fields["labels"] = {**_object((policies.TIER_LABEL,), {policies.TIER_LABEL: label}), "minProperties": 1}
    return _object(tuple(fields), fields, ("name",))


def _object(keys: Sequence[str], fields: Mapping[str, object], required: Sequence[str] = ()) -> Schema:
    """`keys` are the decoder's: a field that one has and the other lacks does not pass."""
    if set(keys) != set(fields):
        raise ValueError(f"fields of the schema and of the decoder differ: {sorted(set(keys) ^ set(fields))}")
    result: Schema = {"type": "object", "additionalProperties": False, "properties": {key: fields[key] for key in keys}}
    return {**result, "required": list(required)} if required else result


def _text(pattern: str, at_most: int) -> Schema:
    return {"type": "string", "maxLength": at_most, "pattern": f"^({pattern})$"}


def _ref(name: str, description: str = "") -> Schema:
    reference: Schema = {"$ref": f"#/$defs/{name}"}
    return {**reference, "description": description} if description else reference


def _array(items: Schema, at_most: int, description: str, at_least: int = 0) -> Schema:
    result: Schema = {"type": "array", "maxItems": at_most, "items": items, "description": description}
    return {**result, "minItems": at_least} if at_least else result


def _any_case(word: str) -> str:
    return "".join(f"[{letter.upper()}{letter.lower()}]" if letter.isalpha() else letter for letter in word)


_PORT = "[1-9][0-9]{0,4}"
_BYTE = "[1-9][0-9]?|1[0-9][0-9]|2[0-4][0-9]|25[0-5]"
_FLAG: Schema = {"type": "boolean", "default": False}
_ORDER: Schema = {"type": "number", "description": "smaller is asked first; without one: last"}
_SELECTOR: Schema = {"type": "string", "maxLength": rules.SELECTOR_LIMIT}
_PEER_SELECTOR: Schema = {**_SELECTOR, "pattern": "[^ \\t]"}


def _rules(direction: str) -> Schema:
    return _array(_ref("rule"), rules.RULES_LIMIT, f"what endpoints may {direction}; the first that matches decides")


_SHARED: dict[str, Schema] = {
    "labels": {
        "type": "object",
        "maxProperties": LABELS_LIMIT,
        "propertyNames": {"pattern": f"^({LABEL.pattern})$"},
        "additionalProperties": {"type": "string", "maxLength": LABEL_VALUE_LIMIT},
    },
    "prefix": {**_text(PREFIX.pattern, 64), "description": "10.0.0.0/8, fd00::/8, or an address"},
    "address": {**_text("[0-9a-fA-F:.]+", 64), "description": "192.0.2.1 or fd00::1"},
    "port": {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, _text(f"{_PORT}(:{_PORT})?", 11)],
        "description": '443, or a range like "8000:8080"',
    },
    "protocol": {
        "anyOf": [
            {"enum": list(rules.PROTOCOLS)},
            _text("|".join(_any_case(name) for name in rules.PROTOCOLS) + f"|{_BYTE}", 8),
            {"type": "integer", "minimum": 1, "maximum": 255},
        ]
    },
    "icmp": _object(
        rules.ICMP,
        {
            "type": {"type": "integer", "minimum": 0, "maximum": 254},
            "code": {"type": "integer", "minimum": 0, "maximum": 255},
        },
        ("type",),
    ),
    "peer": _object(
        rules.PEER,
        {
            "nets": _array(_ref("prefix"), rules.NETS_LIMIT, "one of them holds the address", 1),
            "notNets": _array(_ref("prefix"), rules.NETS_LIMIT, "none of them holds the address", 1),
            "selector": {**_PEER_SELECTOR, "description": "an endpoint, network set or host endpoint with such labels"},
            "notSelector": {**_PEER_SELECTOR, "description": "none with such labels"},
            "ports": _array(_ref("port"), rules.PORTS_LIMIT, "one of them; protocol is needed", 1),
            "notPorts": _array(_ref("port"), rules.PORTS_LIMIT, "none of them; protocol is needed", 1),
        },
    ),
    "rule": {
        **_object(
            rules.RULE,
            {
                "action": {
                    "enum": list(rules.ACTIONS),
                    "description": "Log says so and goes on; Pass goes to the next tier",
                },
                "protocol": _ref("protocol"),
                "notProtocol": _ref("protocol", "any other protocol"),
                "icmp": _ref("icmp", "protocol ICMP or ICMPv6 is needed"),
                "notICMP": _ref("icmp", "any other; protocol ICMP or ICMPv6 is needed"),
                "ipVersion": {"enum": [4, 6]},
                "source": _ref("peer"),
                "destination": _ref("peer"),
                "metadata": _object(("annotations",), {"annotations": {"description": "notes"}}),
            },
            ("action",),
        ),
        "dependentRequired": {"icmp": ["protocol"], "notICMP": ["protocol"]},
    },
}

_POLICY: dict[str, Schema] = {
    "tier": {**_text(NAME.pattern, NAME_LIMIT), "default": DEFAULT_TIER},
    "order": _ORDER,
    "selector": {**_SELECTOR, "default": "all()", "description": "to which endpoints this applies, by their labels"},
    "types": {
        **_array({"enum": list(policies.TYPES)}, 2, "default: what there are rules for, else Ingress", 1),
        "uniqueItems": True,
    },
    "ingress": _rules("receive"),
    "egress": _rules("send"),
    "applyOnForward": {**_FLAG, "description": "at host endpoints: also for what the host forwards"},
    "keepEstablished": {**_FLAG, "description": "open flows stay open when this no longer allows them"},
}
_SPECS: dict[str, Schema] = {
    "GlobalNetworkPolicy": _object(policies.POLICY, _POLICY),
    "StagedGlobalNetworkPolicy": _object(
        policies.STAGED, {**_POLICY, "stagedAction": {"enum": list(policies.STAGED_ACTIONS)}}
    ),
    "Tier": _object(
        policies.TIER,
        {
            "order": _ORDER,
            "defaultAction": {
                "enum": list(policies.DEFAULT_ACTIONS),
                "default": policies.DEFAULT_ACTIONS[0],
                "description": "where a policy of the tier applies and none of its rules matches",
            },
        },
    ),
    "GlobalNetworkSet": _object(
        networksets.NETWORK_SET,
        {"nets": _array(_ref("prefix"), networksets.MEMBERS_LIMIT, "addresses and prefixes")},
    ),
    "HostEndpoint": _object(
        hosts.HOST_ENDPOINT,
        {
            "node": {**_text(NAME.pattern, hosts.HOST_NAME_LIMIT), "description": "the Host"},
            "interfaceName": {
                **_text(hosts.INTERFACE.pattern, 15),
                "not": {"enum": ["lo", ".", ".."]},
                "description": 'one of its links, or "*" for all that no other host endpoint names',
            },
            "expectedIPs": _array(_ref("address"), hosts.ADDRESSES_LIMIT, "by these selectors in rules find it"),
            "profiles": _array(_text(NAME.pattern, NAME_LIMIT), hosts.PROFILES_LIMIT, "asked where no policy applies"),
        },
        ("node", "interfaceName"),
    ),
    "Profile": _object(
        policies.PROFILE,
        {
            "ingress": _rules("receive"),
            "egress": _rules("send"),
            "labelsToApply": _ref("labels", "what endpoints with this profile have, too"),
        },
    ),
    "Host": _object(
        hosts.HOST,
        {
            "publicKey": {**_text(hosts.Z85.pattern, 40), "description": "what slash32-hostd key prints there"},
            "addresses": _array(_ref("address"), 2, "where other hosts reach its guests: one of each IP version"),
            "nets": _array(_ref("prefix"), rules.NETS_LIMIT, "what its guests may claim; without: anything", 1),
            "labels": {
                **_SHARED["labels"],
                "additionalProperties": _array(
                    {"type": "string", "maxLength": LABEL_VALUE_LIMIT}, hosts.VALUES_LIMIT, "values its guests may have"
                ),
            },
        },
    ),
}
_KINDS = {
    "GlobalNetworkPolicy": "What endpoints may send and receive.",
    "StagedGlobalNetworkPolicy": "A policy that counts what it would drop, and drops nothing.",
    "Tier": "Policies that are asked together, before or after those of other tiers.",
    "GlobalNetworkSet": "Addresses from outside with labels, so that selectors in rules find them.",
    "HostEndpoint": "A host's own interface, under policy.",
    "Profile": "Rules for endpoints to which no policy applies, and labels for its users.",
    "Host": "A hypervisor: its key, where it is reached, what its guests may claim.",
}
