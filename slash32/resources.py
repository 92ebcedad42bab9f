# Owns: the kinds of resources and the frame of their documents, both ways: plain data from YAML or JSON <-> the typed
# model. Pure. What a kind's spec holds: slash32.policies, slash32.hosts, slash32.networksets; YAML: slash32.documents.
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from slash32.decode import NAME, NAME_LIMIT, Field, short
from slash32.hosts import decode_host, decode_host_endpoint, encode_host, encode_host_endpoint
from slash32.model import Host
from slash32.networksets import decode_network_set, encode_network_set
from slash32.policies import (
    decode_policy,
    decode_profile,
    decode_staged,
    decode_tier,
    encode_policy,
    encode_profile,
    encode_tier,
)
from slash32.policy import HostEndpoint, NetworkSet, Policy, Profile, Tier

if TYPE_CHECKING:
    from slash32.documents import Document

API_VERSION = "slash32/v1"
ALIAS = "projectcalico.org/v3"
LIST_API_VERSIONS = ("v1", API_VERSION, ALIAS)

Resource = Policy | Tier | NetworkSet | HostEndpoint | Profile | Host


class Kind(NamedTuple):
    name: str  # as documents spell it
    plural: str  # as URLs and tables spell it
    short: tuple[str, ...]


class _Codec(NamedTuple):
    decode: Callable[[Field, Field, bool], Resource]  # of metadata, spec; was it stored?
    encode: Callable[[Any], dict[str, object]]
    labels: bool = False  # metadata.labels may be there


KINDS = {
    kind.name: kind
    for kind in (
        Kind("GlobalNetworkPolicy", "globalnetworkpolicies", ("gnp", "policy", "policies")),
        Kind("StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", ("sgnp",)),
        Kind("Tier", "tiers", ()),
        Kind("GlobalNetworkSet", "globalnetworksets", ("gns",)),
        Kind("HostEndpoint", "hostendpoints", ("hep",)),
        Kind("Profile", "profiles", ("prof",)),
        Kind("Host", "hosts", ()),
    )
}
_CODECS = {
    "GlobalNetworkPolicy": _Codec(decode_policy, encode_policy, labels=True),
    "StagedGlobalNetworkPolicy": _Codec(decode_staged, encode_policy, labels=True),
    "Tier": _Codec(decode_tier, encode_tier),
    "GlobalNetworkSet": _Codec(decode_network_set, encode_network_set, labels=True),
    "HostEndpoint": _Codec(decode_host_endpoint, encode_host_endpoint, labels=True),
    "Profile": _Codec(decode_profile, encode_profile),
    "Host": _Codec(decode_host, encode_host),
}
_BY_TYPE = {Tier: "Tier", NetworkSet: "GlobalNetworkSet", HostEndpoint: "HostEndpoint", Profile: "Profile"}
_GLOBAL = "there are no namespaces here: make it a"
LATER = {
    "NetworkPolicy": f"{_GLOBAL} GlobalNetworkPolicy",
    "StagedNetworkPolicy": f"{_GLOBAL} StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy": f"{_GLOBAL} StagedGlobalNetworkPolicy",
    "AdminNetworkPolicy": "make it a GlobalNetworkPolicy in a Tier of its own",
    "BaselineAdminNetworkPolicy": "make it a GlobalNetworkPolicy in a Tier of its own",
    "ClusterNetworkPolicy": "make it a GlobalNetworkPolicy in a Tier of its own",
    "NetworkSet": f"{_GLOBAL} GlobalNetworkSet",
    "WorkloadEndpoint": "remove the document: endpoints come from the tags of libvirt's domains",
    "Endpoint": "remove the document: endpoints come from the tags of libvirt's domains",
    "Node": "remove the document, and make a Host",
    **dict.fromkeys(
        (
            "BGPConfiguration", "BGPFilter", "BGPPeer", "BlockAffinity", "CalicoNodeStatus", "ClusterInformation",
            "FelixConfiguration", "IPAMConfiguration", "IPPool", "IPReservation", "KubeControllersConfiguration",
        ),
        "remove the document",
    ),
}  # fmt: skip

FRAME = ("apiVersion", "kind", "metadata", "spec")
HOST_FRAME = (*FRAME, "status")  # how it is, as `slash32 get hosts -o yaml` tells it; applied again it says nothing
FRAME_LATER = {"status": "it says nothing about policy: remove it"}
# What an API server adds to an exported document, and notes of people: it says nothing about policy, so it may stay.
BOOKKEEPING = (
    "uid", "resourceVersion", "creationTimestamp", "generation", "selfLink", "annotations", "managedFields",
    "finalizers",
)  # fmt: skip
METADATA_LATER = {
    "labels": "nothing selects by them: remove the field, or use annotations",
    "namespace": "there are no namespaces here: remove the field",
    "generateName": "give a name",
    "ownerReferences": "remove the field",
}


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
        return "StagedGlobalNetworkPolicy" if resource.staged else "GlobalNetworkPolicy"
    return _BY_TYPE.get(type(resource), "Host")


def decode(document: Document | Mapping[str, object], *, stored: bool = False) -> Resource:
    """Checks everything; raises ResourceError for the first thing wrong. `stored`: `encode` wrote it, so selectors
    are canonical and may be longer than what a user may write."""
    root = _root(document)
    entries = root.entries()
    for key, hint in (("apiVersion", f"give {API_VERSION}"), ("kind", f"give one of {', '.join(KINDS)}")):
        if key not in entries:
            root.fail(f"{key} is missing; {hint}")
    entries["apiVersion"].one_of((API_VERSION, ALIAS))
    kind = entries["kind"].one_of(tuple(KINDS), LATER)
    frame, later = (HOST_FRAME, {}) if kind == "Host" else (FRAME, FRAME_LATER)
    given = root.fields(frame, later, required=("metadata", "spec"))
    if "status" in given:
        given["status"].entries()
    codec = _CODECS[kind]
    return codec.decode(_metadata(given["metadata"], codec.labels), given["spec"], stored)


def encode(resource: Resource) -> dict[str, object]:
    """The canonical document, JSON-able. decode(encode(r), stored=True) == r."""
    kind = kind_of(resource)
    metadata: dict[str, object] = {"name": resource.name}
    if isinstance(resource, NetworkSet | HostEndpoint) and resource.labels:
        metadata["labels"] = dict(sorted(resource.labels.items()))
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": _CODECS[kind].encode(resource)}


def _root(document: Document | Mapping[str, object]) -> Field:
    if isinstance(document, Mapping):
        return Field(dict(document), _subject(document))
    prefix = f"{document.source}:{document.line}: " if document.source else ""
    return Field(dict(document.value), prefix + _subject(document.value), document.path)


def _subject(value: Mapping[str, object]) -> str:
    """`Kind name`, as far as the document says it."""
    kind, metadata = value.get("kind"), value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    known = kind if isinstance(kind, str) and (kind in KINDS or kind in LATER) else "document"
    if not isinstance(name, str):
        return known
    return f"{known} {name if len(name) <= NAME_LIMIT and NAME.fullmatch(name) else short(name, 64)}"


def _metadata(metadata: Field, labels: bool) -> Field:
    """With `name` and, where the kind has them, `labels`; the bookkeeping is gone."""
    if isinstance(metadata.value, dict):
        metadata = replace(metadata, value={k: v for k, v in metadata.value.items() if k not in BOOKKEEPING})
    known = ("name", "labels", "annotations") if labels else ("name", "annotations")
    metadata.fields(known, METADATA_LATER, required=("name",))
    return metadata
