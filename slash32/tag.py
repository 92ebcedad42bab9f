# Owns: reading a domain's XML: its NICs, and the one slash32 element in its metadata (the tag). Pure: bytes in, values
# or one TagError out. The XML may hold secrets (migration): nothing of it is kept but what is named here.
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from lxml import etree

from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Address, Prefix, host_prefix, parse_address, parse_mac, parse_prefix
from slash32.unicast import unusable

NAMESPACE = "urn:slash32:domain:1"
MAX_BYTES = 8 << 20  # libvirt itself carries no XML beyond 4 MiB
MAX_INTERFACES = 16
MAX_ADDRESSES = 64
MAX_PREFIXES = 64
MAX_LABELS = 128
MAX_PROFILES = 16
MAX_VALUE = 512

_OURS = f"{{{NAMESPACE}}}"
_ELEMENT = "metadata/slash32:endpoint"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LABEL = re.compile(r"[A-Za-z0-9_./-]{1,512}")  # the selector grammar's LABEL
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,253}")


class TagError(ValueError):
    """A domain that cannot be taken as it is. str() is one line: domain, path, what is wrong, what to do."""


class Nic(NamedTuple):
    """One <interface> of a domain. `mac` is canonical, None where it is missing or odd."""

    mac: str | None
    target: str | None  # tap or veth on the host; None before libvirt has named it
    type: str  # 'ethernet' is ours; 'bridge', 'network' and the others are left alone


@dataclass(frozen=True, slots=True)
class Domain:
    uuid: str
    name: str
    driver: str  # qemu or lxc
    nics: tuple[Nic, ...]
    tagged: bool = False
    endpoints: tuple[tuple[Endpoint, Nic], ...] = ()
    absent: tuple[str, ...] = ()  # MACs in the tag with no NIC (only with absent_ok: hotplug)

    def ethernet(self) -> tuple[Nic, ...]:
        return tuple(nic for nic in self.nics if nic.type == "ethernet")


def parse_domain(xml: bytes, driver: str, *, absent_ok: bool = False) -> Domain:
    """Raises TagError for what is not a domain's XML and for a wrong tag; an untagged domain may hold anything.
    `absent_ok`: of a running domain, a tag may name a NIC that is not plugged (yet, or any more)."""
    root = _root(xml)
    name = (root.findtext("name") or "").strip()
    uuid = (root.findtext("uuid") or "").strip().lower()
    nics = tuple(_nic(element) for element in root.iterfind("devices/interface"))
    tag = _find_tag(root, name)
    if tag is None:
        return Domain(uuid, name, driver, nics)
    if not _UUID.fullmatch(uuid):
        raise TagError(f"domain {quote(name)}: uuid: {quote(uuid)} is not a uuid; is this XML from libvirt?")
    reader = _TagReader(Domain(uuid, name, driver, nics, tagged=True), absent_ok)
    endpoints = tuple(reader.endpoints(tag))
    return Domain(uuid, name, driver, nics, True, endpoints, tuple(reader.absent))


def uuid_of(xml: bytes) -> str:
    """Of a domain whose tag may be wrong; "" where there is none."""
    try:
        uuid = (_root(xml).findtext("uuid") or "").strip().lower()
    except TagError:
        return ""
    return uuid if _UUID.fullmatch(uuid) else ""


def outside_guard(domain: Domain, prefixes: tuple[str, ...]) -> list[Nic]:
    """NICs of a tagged domain whose own <target dev> the guard does not match: such a guest would escape it."""
    if not domain.tagged:
        return []
    return [nic for nic in domain.ethernet() if nic.target and not nic.target.startswith(prefixes)]


def quote(text: str) -> str:
    """Hostile text as one bounded line: repr escapes control, format and separator characters."""
    return repr(text if len(text) <= 64 else text[:61] + "...")


def _root(xml: bytes) -> etree._Element:
    if len(xml) > MAX_BYTES:
        raise TagError(f"domain XML: {len(xml)} bytes; at most {MAX_BYTES} are read; make it smaller")
    if _has_doctype(xml):
        raise TagError("domain XML: it has a DOCTYPE, which libvirt never writes; remove it")
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False,
        huge_tree=False, remove_comments=True, remove_pis=True,
    )  # fmt: skip
    try:
        root = etree.fromstring(xml, parser)
    except (etree.XMLSyntaxError, ValueError) as why:
        raise TagError(
            f"domain XML: it cannot be parsed: {quote(str(why))[1:-1]}; check it with virsh dumpxml"
        ) from None
    if root.tag != "domain" or root.getroottree().docinfo.internalDTD is not None:
        raise TagError(f"domain XML: the root is {quote(str(root.tag))}; expected <domain> without a DTD")
    return root


def _has_doctype(xml: bytes) -> bool:
    """Looks only where a DOCTYPE may stand: before the root, between comments and processing instructions."""
    at = 3 if xml.startswith(b"\xef\xbb\xbf") else 0
    while (at := xml.find(b"<", at)) >= 0:
        if xml.startswith(b"<!--", at):
            at = xml.find(b"-->", at + 4)
        elif xml.startswith(b"<?", at):
            at = xml.find(b"?>", at)
        else:
            return xml.startswith(b"<!", at)
        if at < 0:
            return False
    return False


def _nic(element: etree._Element) -> Nic:
    mac, target = element.find("mac"), element.find("target")
    try:
        address = None if mac is None else parse_mac(mac.get("address", ""))
    except ValueError:
        address = None
    dev = None if target is None else target.get("dev") or None
    return Nic(address, dev, element.get("type", ""))


def _find_tag(root: etree._Element, name: str) -> etree._Element | None:
    """Our element, directly below <metadata>. In no namespace or in somebody else's it is not ours: untagged."""
    found = []
    for element in root.iterfind("metadata/*"):
        space = etree.QName(element).namespace or ""
        if space == NAMESPACE:
            found.append(element)
        elif space.startswith("urn:slash32:"):
            raise TagError(f"domain {quote(name)}: metadata: namespace {quote(space)} is unknown; use {NAMESPACE}")
    if len(found) > 1:
        raise TagError(f"domain {quote(name)}: metadata: {len(found)} slash32 elements; put all into one")
    if found and found[0].tag != f"{_OURS}endpoint":
        what = quote(etree.QName(found[0]).localname)
        raise TagError(f"domain {quote(name)}: metadata: slash32 element {what} is unknown; use slash32:endpoint")
    return found[0] if found else None


class _TagReader:
    """One tag into endpoints. Holds what must be unique in the whole tag."""

    def __init__(self, domain: Domain, absent_ok: bool) -> None:
        self.domain = domain
        self.absent_ok = absent_ok
        self.absent: list[str] = []
        self._claims: dict[Prefix, str | None] = {}  # -> share group
        self._macs: set[str] = set()

    def endpoints(self, tag: etree._Element) -> Iterator[tuple[Endpoint, Nic]]:
        self._check(tag, _ELEMENT, (), ("label", "profile", "interface"))
        labels = self._labels(tag, _ELEMENT)
        profiles = self._profiles(tag)
        interfaces = tag.findall(f"{_OURS}interface")
        if len(interfaces) > MAX_INTERFACES:
            self._fail(_ELEMENT, f"{len(interfaces)} interfaces; at most {MAX_INTERFACES}")
        if not interfaces and self.domain.ethernet():
            self._fail(_ELEMENT, "it gives no address; add <slash32:interface> with at least one <slash32:address>")
        for element in interfaces:
            nic = self._match(element, len(interfaces))
            if nic is not None and nic.mac is not None:
                yield self._endpoint(element, nic, nic.mac, labels, profiles), nic

    def _endpoint(
        self, element: etree._Element, nic: Nic, mac: str, labels: dict[str, str], profiles: tuple[str, ...]
    ) -> Endpoint:
        where = f"{_ELEMENT}/interface[{mac}]"
        own, shared = self._addresses(element, where)
        merged = labels | self._labels(element, where)
        if len(merged) > MAX_LABELS:
            self._fail(where, f"{len(merged)} labels with the domain's own; at most {MAX_LABELS}")
        return Endpoint(
            key=EndpointKey(self.domain.uuid, mac),
            domain=self.domain.name,
            labels=merged,
            profiles=profiles,
            addresses=own,
            shared=shared,
            prefixes=self._prefixes(element, where),
        )

    # Which NIC

    def _match(self, element: etree._Element, interfaces: int) -> Nic | None:
        """None: the tag names a NIC that is not plugged, and may."""
        self._check(element, f"{_ELEMENT}/interface", ("mac",), ("address", "prefix", "label"))
        text = element.get("mac")
        if text is None:
            return self._only_nic(interfaces)
        try:
            mac = parse_mac(text)
        except ValueError:
            self._fail(f"{_ELEMENT}/interface", f"mac {quote(text)} is not a unicast MAC like 52:54:00:00:00:01")
        where = f"{_ELEMENT}/interface[{mac}]"
        if mac in self._macs:
            self._fail(where, "this mac stands twice in the tag; join the two")
        self._macs.add(mac)
        found = [nic for nic in self.domain.nics if nic.mac == mac]
        if len(found) > 1:
            self._fail(where, "two NICs of the domain have this mac; give each its own")
        if not found:
            if not self.absent_ok:
                self._fail(where, "the domain has no NIC with this mac; correct the mac or add the NIC")
            self.absent.append(mac)
            return None
        if found[0].type != "ethernet":
            self._fail(where, f"only type='ethernet' is managed, this NIC is {quote(found[0].type)}; take it out")
        return found[0]

    def _only_nic(self, interfaces: int) -> Nic | None:
        where = f"{_ELEMENT}/interface"
        nics = self.domain.ethernet()
        if not nics and self.absent_ok:
            return None
        if len(nics) != 1 or interfaces != 1:
            self._fail(where, f"mac is missing, and the domain has {len(nics)} ethernet NICs; add mac='...'")
        mac = nics[0].mac
        if mac is None:
            self._fail(where, "the domain's ethernet NIC has no valid MAC address; give it one")
        if sum(nic.mac == mac for nic in self.domain.nics) > 1:
            self._fail(where, f"two NICs of the domain have the mac {mac}; give each its own")
        return nics[0]

    # What it says

    def _labels(self, parent: etree._Element, where: str) -> dict[str, str]:
        labels: dict[str, str] = {}
        for element in parent.iterfind(f"{_OURS}label"):
            self._check(element, f"{where}/label", ("key", "value"), ())
            key, value = self._attribute(element, "key", where), self._attribute(element, "value", where)
            if not _LABEL.fullmatch(key):
                self._fail(f"{where}/label", f"key {quote(key)}: use 1 to 512 of A-Z a-z 0-9 _ . / -")
            if len(value) > MAX_VALUE or not value.isprintable():
                self._fail(
                    f"{where}/label[{key[:64]}]", f"value {quote(value)}: at most {MAX_VALUE} printable characters"
                )
            if key in labels:
                self._fail(f"{where}/label[{key[:64]}]", "this key stands twice; keep one")
            labels[key] = value
        if len(labels) > MAX_LABELS:
            self._fail(where, f"{len(labels)} labels; at most {MAX_LABELS}")
        return labels

    def _profiles(self, tag: etree._Element) -> tuple[str, ...]:
        names: list[str] = []
        for element in tag.iterfind(f"{_OURS}profile"):
            where = f"{_ELEMENT}/profile"
            self._check(element, where, ("name",), ())
            name = self._attribute(element, "name", _ELEMENT)
            if not _NAME.fullmatch(name):
                self._fail(where, f"name {quote(name)}: use 1 to 253 of A-Z a-z 0-9 _ . -")
            if name in names:
                self._fail(where, f"{quote(name)} stands twice; keep one")
            names.append(name)
        if len(names) > MAX_PROFILES:
            self._fail(_ELEMENT, f"{len(names)} profiles; at most {MAX_PROFILES}")
        return tuple(names)

    def _addresses(
        self, interface: etree._Element, where: str
    ) -> tuple[tuple[Address, ...], tuple[SharedAddress, ...]]:
        own: list[Address] = []
        shared: list[SharedAddress] = []
        path = f"{where}/address"
        for element in interface.iterfind(f"{_OURS}address"):
            self._check(element, path, ("shared",), ())
            prefix = self._net(element, path, host=True)
            group = element.get("shared")
            if group is None:
                self._claim(prefix, path)
                own.append(prefix.network)
                continue
            if not _NAME.fullmatch(group):
                self._fail(path, f"shared {quote(group)}: use 1 to 253 of A-Z a-z 0-9 _ . -")
            if any(s.address == prefix.network for s in shared):
                self._fail(path, f"{prefix} stands twice; keep one")
            self._claim(prefix, path, group)
            shared.append(SharedAddress(prefix.network, group))
        if not 1 <= len(own) + len(shared) <= MAX_ADDRESSES:
            self._fail(where, f"{len(own) + len(shared)} addresses; give 1 to {MAX_ADDRESSES} <slash32:address>")
        return tuple(own), tuple(shared)

    def _prefixes(self, interface: etree._Element, where: str) -> tuple[Prefix, ...]:
        prefixes: list[Prefix] = []
        for element in interface.iterfind(f"{_OURS}prefix"):
            self._check(element, f"{where}/prefix", (), ())
            prefix = self._net(element, f"{where}/prefix", host=False)
            self._claim(prefix, f"{where}/prefix")
            prefixes.append(prefix)
        if len(prefixes) > MAX_PREFIXES:
            self._fail(where, f"{len(prefixes)} prefixes; at most {MAX_PREFIXES}")
        return tuple(prefixes)

    def _net(self, element: etree._Element, where: str, *, host: bool) -> Prefix:
        text = (element.text or "").strip()
        try:
            if len(text) > 64 or "%" in text:
                raise ValueError
            prefix = host_prefix(parse_address(text)) if host else parse_prefix(text)
        except ValueError:
            example = (
                "an address like 10.65.0.2 or fd00:65::2" if host else "a prefix like 10.66.0.0/26, no bit set behind"
            )
            self._fail(where, f"{quote(text)} is not {example}")
        why = unusable(prefix)
        if why is not None:
            self._fail(where, f"{text} is or holds {why}; use a unicast {'address' if host else 'prefix'}")
        return prefix

    def _claim(self, prefix: Prefix, where: str, group: str | None = None) -> None:
        """An address stands once in a tag; a shared one may stand at several NICs, in one group."""
        if prefix in self._claims and (group is None or self._claims[prefix] != group):
            self._fail(where, f"{prefix} stands twice in the tag; keep one")
        self._claims[prefix] = group

    # Strictness

    def _check(
        self, element: etree._Element, where: str, attributes: tuple[str, ...], children: tuple[str, ...]
    ) -> None:
        for name in element.attrib:
            if name not in attributes:
                known = ", ".join(attributes) or "none"
                self._fail(where, f"attribute {quote(str(name))} is unknown (known: {known}); remove it")
        for child in element:
            if child.tag not in {f"{_OURS}{name}" for name in children}:
                known = ", ".join(f"slash32:{name}" for name in children) or "none"
                self._fail(where, f"element {quote(str(child.tag))} is unknown (known: {known}); remove it")
            if (child.tail or "").strip():
                self._fail(where, f"text {quote((child.tail or '').strip())} does not belong here; remove it")
        leaf = element.tag in (f"{_OURS}address", f"{_OURS}prefix")
        if not leaf and (element.text or "").strip():
            self._fail(where, f"text {quote((element.text or '').strip())} does not belong here; remove it")

    def _attribute(self, element: etree._Element, name: str, where: str) -> str:
        value = element.get(name)
        if value is None:
            self._fail(f"{where}/{etree.QName(element).localname}", f"attribute {name} is missing; add it")
        return value

    def _fail(self, where: str, what: str) -> NoReturn:
        raise TagError(f"domain {quote(self.domain.name)}: {where}: {what}")
