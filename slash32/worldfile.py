# Owns: a world from documents: `Endpoint`s, which elsewhere come from the tags of guests, and resources of policy.
# Strict, but a field of an Endpoint may stand where its writer looked for it: in spec, in metadata (name, labels), or
# beside them, as `slash32 get endpoints -o yaml` has it. Pure.
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from slash32.decode import NAME, NAME_LIMIT, Field, short
from slash32.documents import Document
from slash32.hosts import HOST_NAME_LIMIT
from slash32.matching import World
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Address, Prefix, format_address, host_prefix
from slash32.policy import DEFAULT_TIER, HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.resources import ALIAS, API_VERSION, BOOKKEEPING, METADATA_LATER, Resource, decode, kind_of
from slash32.unicast import unusable

KIND = "Endpoint"
_FIELDS = ("name", "labels", "addresses", "prefixes", "shared", "host", "profiles")
_ALIASES = {"node": "host", "domain": "name"}
_KEYS = ("uuid", "mac")  # given by an export; else any that nobody else has
_DERIVED = ("effectiveLabels",)  # in an export: follows from the rest
_AT_MOST = 1024  # addresses, prefixes, profiles of one endpoint

T = TypeVar("T")


class _Claim(NamedTuple):
    number: int  # of the endpoint in the file
    of: str
    group: str | None  # of a shared address


def read_world(documents: Iterable[Document]) -> World:
    """Raises ResourceError for the first thing wrong, naming file, object and field. Names of endpoints are their
    `domain`. `Host`s are checked and say nothing: whoever may claim what, the claims are in the file."""
    reader = _Reader()
    for document in documents:
        reader.take(document)
    return reader.world()


@dataclass(slots=True)
class _Reader:
    endpoints: list[Endpoint] = field(default_factory=list)
    places: dict[EndpointKey, str] = field(default_factory=dict)
    resources: list[Resource] = field(default_factory=list)
    tiers_named: list[tuple[str, Field]] = field(default_factory=list)  # by policies
    hosts_have: list[tuple[Address, Field]] = field(default_factory=list)  # by host endpoints
    given: dict[tuple[str, str], str] = field(default_factory=dict)  # kind, name -> which document
    claims: dict[Prefix, _Claim] = field(default_factory=dict)

    def take(self, document: Document) -> None:
        value = document.value
        exported = "kind" not in value and {"domain", "mac"} <= value.keys()
        if exported or value.get("kind") == KIND:
            self.take_endpoint(document, exported)
            return
        resource = decode(document)
        kind = kind_of(resource)
        root = Field(None, _subject(document, kind, resource.name), document.path)
        self.once(kind, resource.name, root.child("metadata").child("name"))
        self.resources.append(resource)
        spec = root.child("spec")
        if isinstance(resource, Policy):
            self.tiers_named.append((resource.tier, spec.child("tier")))
        elif isinstance(resource, HostEndpoint):
            self.once("interface", f"{resource.node} {resource.interface}", spec.child("interfaceName"))
            self.hosts_have += [(address, spec.child("expectedIPs")) for address in resource.addresses]

    def once(self, kind: str, name: str, where: Field) -> None:
        if (kind, name) in self.given:
            where.fail(f"{kind} {short(name)} is given before, in {self.given[kind, name]}; keep one")
        self.given[kind, name] = where.subject

    def take_endpoint(self, document: Document, exported: bool) -> None:
        given = _fields_of(document, exported)
        found = {key: _only(fields) for key, fields in given.items() if fields and key != "labels"}
        name = found["name"].line(NAME_LIMIT)
        if not name:
            found["name"].fail("is empty; give the guest's name")
        self.once(KIND, f"{name} {found['mac'].value}" if exported else name, found["name"])
        endpoint = self.endpoint(name, _merged(given["labels"]), found)
        self.endpoints.append(endpoint)
        if "host" in found:
            self.places[endpoint.key] = found["host"].name(HOST_NAME_LIMIT)

    def endpoint(self, name: str, labels: dict[str, str], found: dict[str, Field]) -> Endpoint:
        def items(key: str) -> list[Field]:
            return found[key].items(_AT_MOST) if key in found else []

        addresses, prefixes, shared = [], [], []
        for item in items("addresses"):
            addresses.append(self.claimed(item, _address(item)).network)
        for item in items("prefixes"):
            prefixes.append(self.claimed(item, item.prefix()))
        for item in items("shared"):
            of = item.fields(("address", "group"), required=("address", "group"))
            group = of["group"].line(64)
            shared.append(SharedAddress(self.claimed(item, host_prefix(of["address"].address()), group).network, group))
        profiles = dict.fromkeys(item.name() for item in items("profiles"))
        key = self.key(found)
        return Endpoint(key, name, labels, tuple(profiles), tuple(addresses), tuple(shared), tuple(prefixes))

    def key(self, found: dict[str, Field]) -> EndpointKey:
        number = len(self.endpoints) + 1
        uuid = found["uuid"].line(64) if "uuid" in found else f"00000000-0000-4000-8000-{number:012x}"
        mac = found["mac"].line(64) if "mac" in found else f"52:54:{number.to_bytes(4, 'big').hex(':')}"
        return EndpointKey(uuid.lower(), mac.lower())

    def claimed(self, item: Field, prefix: Prefix, group: str | None = None) -> Prefix:
        why = unusable(prefix)
        if why is not None:
            item.fail(f"{_shown(prefix)} is {why}: no guest can have it; give another")
        number, holder = len(self.endpoints), self.claims.get(prefix)
        if holder is not None and (holder.number == number or holder.group is None or holder.group != group):
            who = "this endpoint" if holder.number == number else holder.of
            shared = f", shared in group {short(holder.group)}" if holder.group is not None else ""
            item.fail(f"{_shown(prefix)} is taken by {who}{shared}; give another, or let all share it in one group")
        self.claims[prefix] = _Claim(number, item.subject, group)
        return prefix

    def world(self) -> World:
        tiers = _of(Tier, self.resources)
        known = {DEFAULT_TIER, *(tier.name for tier in tiers)}
        for name, where in self.tiers_named:
            if name not in known:
                where.fail(f"there is no Tier {short(name)}; add its document, or remove the field")
        for address, where in self.hosts_have:
            if host_prefix(address) in self.claims:
                holder = self.claims[host_prefix(address)].of
                where.fail(f"{format_address(address)} is taken by {holder}; remove it from one of them")
        return World(
            self.endpoints,
            _of(Policy, self.resources),
            _of(Profile, self.resources),
            tiers,
            _of(NetworkSet, self.resources),
            _of(HostEndpoint, self.resources),
            self.places,
        )


def _fields_of(document: Document, exported: bool) -> dict[str, list[Field]]:
    """The endpoint's fields by name, each as often as it is given."""
    value = document.value
    root = Field(dict(value), _subject(document, KIND, _name_in(value)), document.path)
    found: dict[str, list[Field]] = {key: [] for key in (*_FIELDS, *_KEYS)}
    known = (*_FIELDS, *_ALIASES, *_KEYS)
    frame = _DERIVED if exported else ("apiVersion", "kind", "metadata", "spec")
    entries = root.fields((*frame, *known), {"status": "remove it"})
    places = [{key: each for key, each in entries.items() if key in known}]
    if not exported:
        if "apiVersion" not in entries:
            root.fail(f"apiVersion is missing; give {API_VERSION}")
        entries["apiVersion"].one_of((API_VERSION, ALIAS))
    if "metadata" in entries:
        later = {key: hint for key, hint in METADATA_LATER.items() if key != "labels"}
        about = entries["metadata"].fields(("name", "labels", *BOOKKEEPING), later)
        places.append({key: each for key, each in about.items() if key in known})
    if "spec" in entries:
        places.append(entries["spec"].fields(known))
    for place in places:
        for key, each in place.items():
            found[_ALIASES.get(key, key)].append(each)
    if not found["name"]:
        root.fail("metadata.name is missing; add it")
    return found


def _only(fields: list[Field]) -> Field:
    for other in fields[1:]:
        if other.value != fields[0].value:
            other.fail(f"says something else than {fields[0].path}; keep one")
    return fields[0]


def _merged(fields: list[Field]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for each in fields:
        for key, value in each.labels().items():
            if labels.setdefault(key, value) != value:
                each.child(key).fail(f"{short(value)}, but {short(labels[key])} in {fields[0].path}; keep one")
    return labels


def _name_in(value: Mapping[str, object]) -> object:
    """As far as the document says it."""
    for place in (value.get("metadata"), value, value.get("spec")):
        if isinstance(place, dict):
            name = place.get("name", place.get("domain"))
            if name is not None:
                return name
    return None


def _subject(document: Document, kind: str, name: object) -> str:
    where = f"{document.source}:{document.line}: " if document.source else ""
    if not isinstance(name, str):
        return f"{where}{kind}"
    return f"{where}{kind} {name if len(name) <= NAME_LIMIT and NAME.fullmatch(name) else short(name, 64)}"


def _address(item: Field) -> Prefix:
    """Also as a prefix that holds nothing else."""
    if isinstance(item.value, str) and item.value.endswith(("/32", "/128")):
        prefix = item.prefix()
        if prefix == host_prefix(prefix.network):
            return prefix
    return host_prefix(item.address())


def _shown(prefix: Prefix) -> str:
    return str(prefix) if prefix != host_prefix(prefix.network) else format_address(prefix.network)


def _of(kind: type[T], resources: Iterable[object]) -> tuple[T, ...]:
    return tuple(each for each in resources if isinstance(each, kind))
