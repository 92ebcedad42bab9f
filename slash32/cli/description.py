# Owns: `describe`: everything about one resource or endpoint, asked from the dispatcher and laid out for people.
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from slash32 import selector as selectors
from slash32.documents import dump_yaml
from slash32.model import Endpoint, EndpointKey
from slash32.net import format_address
from slash32.policy import DEFAULT_TIER, Direction, HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.verdict import effective_labels, steps

from . import staged, text
from .client import Client, Json
from .tables import cell, decoded, failures, join, order, shared

Pairs = list[tuple[str, object]]


def describe_resource(client: Client, kind: str, name: str) -> str:
    document = client.get("resources", kind, name)
    body = dump_yaml(document.get("spec"))
    about: Pairs = [("kind", kind)]
    if kind == "Host":
        state = [item for item in client.items("hosts") if item.get("name") == name]
        plain = [(k.replace("_", "-"), v) for k, v in (state[0] if state else {}).items() if _plain(v)]
        about += [(key, cell(value)) for key, value in plain]
        about.append(("failures", failures(state[0]) if state else ""))
    else:
        about.append(("name", name))
        about += _about(_Model(client), decoded(document))
    return f"{text.fields(about)}\n\n{body}"


def describe_endpoint(client: Client, item: Json) -> str:
    model, endpoint = _Model(client), _endpoint(item)
    about: Pairs = [("kind", "Endpoint")]
    about += [(key, cell(item.get(key))) for key in ("domain", "host", "uuid", "mac")]
    about += [(key, join(item, key)) for key in ("addresses", "prefixes", "profiles")]
    about += [("shared", shared(item)), ("labels", text.labels(model.labels(endpoint)))]
    return text.fields([*about, *model.who_decides(endpoint)])


@dataclass(frozen=True, slots=True)
class _Model:
    """What the dispatcher has, asked when it is needed."""

    client: Client

    def all(self, kind: str) -> list[Json]:
        return self.client.items("resources", kind)

    def policies(self) -> list[Policy]:
        return [*map(decoded, self.all("GlobalNetworkPolicy")), *map(decoded, self.all("StagedGlobalNetworkPolicy"))]

    def profiles(self) -> dict[str, Profile]:
        return {p.name: p for p in map(decoded, self.all("Profile"))}

    def labels(self, found: Endpoint | HostEndpoint) -> Mapping[str, str]:
        return effective_labels(found, self.profiles())

    def who_decides(self, found: Endpoint | HostEndpoint) -> Iterator[tuple[str, object]]:
        policies, profiles = self.policies(), self.profiles()
        tiers: list[Tier] = [decoded(document) for document in self.all("Tier")]
        labels, known = self.labels(found), [name for name in found.profiles if name in profiles]
        otherwise = f"profiles {text.names(known)}" if known else "nothing applies: all is dropped"
        for direction in Direction:
            asked = [p for _, listed in steps(policies, tiers, labels, direction, staged=True) for p in listed]
            enforced, trial = ([_placed(p) for p in asked if p.staged is is_staged] for is_staged in (False, True))
            yield direction.value.lower(), text.names(enforced) or otherwise
            if trial:
                yield f"staged {direction.value.lower()}", text.names(trial)
            forwarding = [_placed(p) for p in asked if p.apply_on_forward and not p.staged]
            if isinstance(found, HostEndpoint):
                yield f"forwarded {direction.value.lower()}", text.names(forwarding) or "nothing is asked"


def _placed(policy: Policy) -> str:
    return policy.name if policy.tier == DEFAULT_TIER else f"{policy.tier}/{policy.name}"


def _about(model: _Model, found: object) -> Pairs:
    match found:
        case Policy():
            return _about_policy(model, found)
        case Profile(name):
            return _users([e for e in _endpoints(model) if name in e.profiles])
        case Tier():
            return _about_tier(model, found)
        case NetworkSet():
            owners: list[Policy | Profile] = [*model.policies(), *model.profiles().values()]
            named = sorted(owner.name for owner in owners if _names(owner, found))
            return [("labels", text.labels(found.labels)), ("named by rules of", text.names(named, 50))]
        case HostEndpoint():
            about: Pairs = [("node", found.node), ("interface", found.interface)]
            about.append(("addresses", ",".join(map(format_address, found.addresses))))
            about.append(("labels", text.labels(model.labels(found))))
            return [*about, *model.who_decides(found)]
    return []


def _about_policy(model: _Model, policy: Policy) -> Pairs:
    profiles, chosen = model.profiles(), selectors.parse(policy.selector)
    about: Pairs = [("tier", policy.tier)]
    about += [("enforced", "no: it is staged, and counts what it would have dropped")] if policy.staged else []
    selected = [e for e in _endpoints(model) if chosen.matches(effective_labels(e, profiles))]
    about += staged.counted(model.client, policy.name, policy.tier) if policy.staged else []
    return about + _users(selected)


def _users(users: list[Endpoint | HostEndpoint]) -> Pairs:
    guests = sorted(e.domain for e in users if isinstance(e, Endpoint))
    cards = sorted(h.name for h in users if isinstance(h, HostEndpoint))
    about: Pairs = [("applies to", text.count(len(guests), "endpoint")), ("endpoints", text.names(guests, 50))]
    return [*about, ("host endpoints", text.names(cards, 50))] if cards else about


def _about_tier(model: _Model, tier: Tier) -> Pairs:
    mine = sorted((p for p in model.policies() if p.tier == tier.name), key=Policy.sort_key)
    listed = [f"{p.name} (staged)" if p.staged else p.name for p in mine]
    about: Pairs = [("order", order(tier)), ("default action", tier.default_action.value)]
    about.append(("policies", text.names(listed, 50)))
    return about + staged.counted(model.client, "", tier.name) if any(p.staged for p in mine) else about


def _names(found: Policy | Profile, network_set: NetworkSet) -> bool:
    peers = [peer for rule in found.ingress + found.egress for peer in (rule.source, rule.destination)]
    texts = {t for peer in peers for t in (peer.selector, peer.not_selector) if t is not None}
    return any(selectors.parse(t).matches(network_set.labels) for t in texts)


def _endpoints(model: _Model) -> list[Endpoint | HostEndpoint]:
    return [*map(_endpoint, model.client.items("endpoints")), *map(decoded, model.all("HostEndpoint"))]


def _endpoint(item: Json) -> Endpoint:
    key = EndpointKey(str(item.get("uuid")), str(item.get("mac")))
    return Endpoint(key, str(item.get("domain")), item.get("labels") or {}, tuple(item.get("profiles") or ()))


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))
