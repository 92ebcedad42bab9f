# Owns: what the hook decides by itself about a tagged guest when hostd is dead or silent. Loaded only then; standard
# library only; reads hostd's configuration, writes nothing.
from __future__ import annotations

import tomllib
from pathlib import Path
from pyexpat import ParserCreate, error

NAMESPACE = "urn:slash32:domain:1"
CONFIG = Path("/etc/slash32/hostd.toml")
DEFAULT_PREFIXES = ("vnet",)
MAX_BYTES = 16 << 20
MAX_DEPTH = 256


class Refused(Exception):
    """The XML is not one that libvirt writes."""


class _Reader:
    """The tag's presence and the ethernet NICs of one domain XML. Expat keeps no tree; DTDs are refused."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.name = ""
        self.tagged = False
        self.nics: list[dict[str, str]] = []  # mac, dev: of type='ethernet' only
        self.ethernet = False

    def read(self, xml: bytes) -> None:
        parser = ParserCreate("utf-8", " ")  # names become "namespace local"
        parser.StartDoctypeDeclHandler = self.doctype
        parser.StartElementHandler = self.start
        parser.EndElementHandler = self.end
        parser.CharacterDataHandler = self.text
        try:
            parser.Parse(xml, True)
        except error as why:
            raise Refused(str(why)) from None

    def doctype(self, *_: object) -> None:
        raise Refused("it has a DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.path.append(tag)
        if len(self.path) > MAX_DEPTH:
            raise Refused(f"more than {MAX_DEPTH} elements deep")
        where = "/".join(self.path[:5])
        if where == f"domain/metadata/{NAMESPACE} endpoint":
            self.tagged = True
        elif where == "domain/devices/interface":
            self.ethernet = attributes.get("type") == "ethernet"
            if self.ethernet:
                self.nics.append({})
        elif where == "domain/devices/interface/mac" and self.ethernet:
            self.nics[-1]["mac"] = attributes.get("address", "")
        elif where == "domain/devices/interface/target" and self.ethernet:
            self.nics[-1]["dev"] = attributes.get("dev", "")

    def end(self, _: str) -> None:
        self.path.pop()

    def text(self, data: str) -> None:
        if self.path == ["domain", "name"] and len(self.name) < 200:
            self.name += data


def _settings() -> tuple[tuple[str, ...], bool]:
    """guard_prefixes, and whether on_hostd_down says refuse. A file that hostd would not take counts as empty."""
    try:
        raw = tomllib.loads(CONFIG.read_text("utf-8"))
    except (OSError, ValueError):
        raw = {}
    listed = raw.get("guard_prefixes")
    prefixes = tuple(p for p in listed if isinstance(p, str) and p) if isinstance(listed, list) else ()
    return prefixes or DEFAULT_PREFIXES, raw.get("on_hostd_down") == "refuse"


def judge(xml: bytes, why: str, operation: str) -> tuple[int, str]:
    """(exit code, message). 0: the guest starts, isolated by the guard. `why` says how hostd failed to answer."""
    reader = _Reader()
    try:
        if len(xml) > MAX_BYTES:
            raise Refused(f"more than {MAX_BYTES >> 20} MiB")
        reader.read(xml)
    except Refused as odd:
        return 1, f"the domain's XML cannot be read: {odd} (and slash32-hostd does not answer: {why})"
    if not reader.tagged:
        return 0, "slash32-hostd does not answer, but this guest has no tag"
    name = f"domain {reader.name[:200]!r}"
    prefixes, refuse = _settings()
    for nic in reader.nics:
        dev = nic.get("dev", "")
        if dev and not dev.startswith(prefixes):
            return 1, (
                f"{name}: interface {nic.get('mac', '')[:40]!r}: target dev {dev[:40]!r} lies outside the guard's "
                f"prefixes ({', '.join(prefixes)[:200]}): the guest would escape the guard; remove the <target dev>"
            )
    if operation == "migrate":  # only the destination is asked
        return 1, (
            f"{name}: cannot come to this host: slash32-hostd does not answer ({why}): it stays where it is; start "
            f"slash32-hostd, then migrate it again"
        )
    if refuse:
        return 1, f"{name}: slash32-hostd does not answer ({why}), and on_hostd_down = refuse; start slash32-hostd"
    return 0, f"{name}: slash32-hostd does not answer ({why}): the guest starts isolated until it is back"
