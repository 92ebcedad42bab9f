# Owns: the documents of what decides about packets, both ways: GlobalNetworkPolicy, StagedGlobalNetworkPolicy, Tier,
# Profile <-> slash32.policy. Pure. A single rule is slash32.rules, the frame of a document slash32.resources.
from __future__ import annotations

from slash32.decode import Field
from slash32.policy import (
    DEFAULT_TIER,
    DEFAULT_TIER_ORDER,
    THE_DEFAULT_TIER,
    Action,
    Direction,
    Policy,
    Profile,
    Rule,
    Tier,
)
from slash32.rules import decode_rules, decode_selector, encode_rule

TYPES = tuple(direction.value for direction in Direction)
POLICY = ("tier", "order", "selector", "types", "ingress", "egress", "applyOnForward", "keepEstablished")
STAGED = (*POLICY, "stagedAction")
POLICY_LATER = {
    "namespaceSelector": "there are no namespaces here: remove it, and use selector",
    "serviceAccountSelector": "there are no service accounts here: remove it, and use selector",
    "doNotTrack": "every flow is tracked here: remove it",
    "preDNAT": "policy sees addresses as they are after any DNAT: remove it",
    "performanceHints": "remove it: it changes no verdict",
    "stagedAction": "remove it, or make the kind StagedGlobalNetworkPolicy",
}
STAGED_LATER = {key: instead for key, instead in POLICY_LATER.items() if key != "stagedAction"}
STAGED_ACTIONS = ("Set",)
_STAGED_ACTIONS_LATER = {
    "Delete": "remove the document; slash32 diff says what a deletion would change",
    "Learn": "give Set",
    "Ignore": "give Set, or remove the document",
}
TIER = ("order", "defaultAction")
DEFAULT_ACTIONS = (Action.DENY.value, Action.PASS.value)
PROFILE = ("ingress", "egress", "labelsToApply")
TIER_LABEL = "projectcalico.org/tier"  # Calico's API server puts it on every policy


def decode_policy(metadata: Field, spec: Field, stored: bool) -> Policy:
    return _policy(metadata, spec, stored)


def decode_staged(metadata: Field, spec: Field, stored: bool) -> Policy:
    return _policy(metadata, spec, stored, staged=True)


def _policy(metadata: Field, spec: Field, stored: bool, staged: bool = False) -> Policy:
    given = spec.fields(STAGED, STAGED_LATER) if staged else spec.fields(POLICY, POLICY_LATER)
    if "stagedAction" in given:
        given["stagedAction"].one_of(STAGED_ACTIONS, _STAGED_ACTIONS_LATER)
    ingress, egress = decode_rules(given, "ingress", stored), decode_rules(given, "egress", stored)
    policy = Policy(
        metadata.entries()["name"].name(),
        decode_selector(given["selector"], stored) if "selector" in given else "all()",
        _types(given, ingress, egress),
        given["order"].number() if "order" in given else None,
        ingress,
        egress,
        given["tier"].name() if "tier" in given else DEFAULT_TIER,
        "applyOnForward" in given and given["applyOnForward"].boolean(),
        "keepEstablished" in given and given["keepEstablished"].boolean(),
        staged,
    )
    _check_labels(metadata, policy.tier)
    return policy


def _types(given: dict[str, Field], ingress: tuple[Rule, ...], egress: tuple[Rule, ...]) -> tuple[Direction, ...]:
    both = ((Direction.INGRESS, ingress), (Direction.EGRESS, egress))
    if "types" not in given:  # Calico's default: what there are rules for, else Ingress
        return tuple(direction for direction, rules in both if rules) or (Direction.INGRESS,)
    found: list[Direction] = []
    for item in given["types"].items(2, at_least=1):
        direction = Direction(item.one_of(TYPES))
        if direction in found:
            item.fail(f"{direction.value} is given twice; remove one")
        found.append(direction)
    for direction, rules in both:
        if rules and direction not in found:
            given[direction.value.lower()].fail(f"has rules, but spec.types lacks {direction.value}: add it there")
    return tuple(d for d in Direction if d in found)


def _check_labels(metadata: Field, tier: str) -> None:
    """Nothing selects a policy by labels; the one that Calico writes must not contradict."""
    labels = metadata.entries().get("labels")
    if labels is None:
        return
    entries = labels.entries()
    for key, label in entries.items():
        if key != TIER_LABEL:
            label.fail("is not supported by this version: policies have no labels; use metadata.annotations")
        if label.value != tier:
            label.fail(f'contradicts spec.tier, which is "{tier}"; remove the label')
    if not entries:
        labels.fail("is not supported by this version: policies have no labels; remove the field")


def decode_tier(metadata: Field, spec: Field, stored: bool) -> Tier:
    given = spec.fields(TIER)
    order = given["order"].number() if "order" in given else None
    action = given["defaultAction"].one_of(DEFAULT_ACTIONS) if "defaultAction" in given else Action.DENY.value
    name = metadata.entries()["name"]
    tier = Tier(name.name(), order, Action(action))
    if tier.name == DEFAULT_TIER and tier != THE_DEFAULT_TIER:  # as exported it says what holds anyway
        fixed = f"order {DEFAULT_TIER_ORDER:.0f} and defaultAction {THE_DEFAULT_TIER.default_action.value}"
        name.fail(f'the tier "{DEFAULT_TIER}" always has {fixed}: remove this document, or give the tier another name')
    return tier


def decode_profile(metadata: Field, spec: Field, stored: bool) -> Profile:
    given = spec.fields(PROFILE)
    return Profile(
        metadata.entries()["name"].name(),
        decode_rules(given, "ingress", stored),
        decode_rules(given, "egress", stored),
        given["labelsToApply"].labels() if "labelsToApply" in given else {},
    )


def encode_policy(policy: Policy) -> dict[str, object]:
    spec: dict[str, object] = {} if policy.tier == DEFAULT_TIER else {"tier": policy.tier}
    spec |= _encode_order(policy.order)
    spec["selector"] = policy.selector
    spec["types"] = [direction.value for direction in policy.types]
    for direction in policy.types:
        spec[direction.value.lower()] = [encode_rule(rule) for rule in policy.rules(direction)]
    if policy.apply_on_forward:
        spec["applyOnForward"] = True
    if policy.keep_established:
        spec["keepEstablished"] = True
    return spec


def encode_tier(tier: Tier) -> dict[str, object]:
    return {**_encode_order(tier.order), "defaultAction": tier.default_action.value}


def encode_profile(profile: Profile) -> dict[str, object]:
    spec: dict[str, object] = {"labelsToApply": dict(sorted(profile.labels.items()))} if profile.labels else {}
    for key, rules in (("ingress", profile.ingress), ("egress", profile.egress)):
        if rules:
            spec[key] = [encode_rule(rule) for rule in rules]
    return spec


def _encode_order(order: float | None) -> dict[str, object]:
    if order is None:
        return {}
    return {"order": int(order) if order.is_integer() and abs(order) < 1 << 53 else order}
