# The tag's whole schema, a corpus of good, foreign and hostile domains (each file's first line says what is expected),
# and anything at all: Domain or TagError, in one line, always.
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import format_address, parse_address, parse_prefix
from slash32.tag import MAX_BYTES, Domain, Nic, TagError, outside_guard, parse_domain, quote

CORPUS = Path(__file__).resolve().parents[2] / "corpus/domains"
UUID = "6e85e5f0-4ea9-4267-9ec6-22ff2194af6c"
MAC = "52:54:00:00:00:02"
FULL = os.environ.get("SLASH32_COUNTS") == "full"


def corpus(kind: str) -> list[Path]:
    found = sorted(CORPUS.glob(f"{kind}-*.xml"))
    assert found
    return found


def read(path: Path) -> tuple[bytes, str]:
    data = path.read_bytes()
    expect = re.match(rb"<!-- expect: (.*?) ?-->\n", data)
    assert expect, path
    return data, expect[1].decode().strip()


def load(name: str) -> bytes:
    return (CORPUS / f"{name}.xml").read_bytes()


def refused(xml: bytes) -> str:
    with pytest.raises(TagError) as caught:
        parse_domain(xml, "qemu")
    line = str(caught.value)
    assert line.isprintable() and len(line) <= 400, line
    return line


def shown(endpoint: Endpoint) -> str:
    shared = [f"{format_address(s.address)}@{s.group}" for s in endpoint.shared]
    return " ".join([*map(format_address, endpoint.addresses), *shared, *map(str, endpoint.prefixes)])


@pytest.mark.parametrize("path", corpus("ok"), ids=lambda p: p.stem)
def test_good_tags(path: Path) -> None:
    xml, expect = read(path)
    domain = parse_domain(xml, "qemu")
    assert domain.tagged and domain.uuid == UUID
    assert " | ".join(shown(endpoint) for endpoint, _ in domain.endpoints) == expect


@pytest.mark.parametrize("path", corpus("untagged"), ids=lambda p: p.stem)
def test_what_is_not_ours_is_untagged(path: Path) -> None:
    domain = parse_domain(read(path)[0], "qemu")
    assert not domain.tagged and domain.endpoints == ()


@pytest.mark.parametrize("path", corpus("bad"), ids=lambda p: p.stem)
def test_bad_tags_are_one_clear_line(path: Path) -> None:
    xml, expect = read(path)
    assert expect in refused(xml)


def test_the_whole_schema() -> None:
    domain = parse_domain(load("ok-full"), "qemu")
    nic = Nic(MAC, "vnet2", "ethernet")
    endpoint = Endpoint(
        key=EndpointKey(UUID, MAC),
        domain="web1",
        labels={"role": "web", "env": "prod", "nic": "front"},
        profiles=("default",),
        addresses=(parse_address("10.65.0.2"), parse_address("fd00:65::2")),
        shared=(SharedAddress(parse_address("10.65.9.1"), "vip"),),
        prefixes=(parse_prefix("10.66.0.0/26"),),
    )
    assert domain == Domain(UUID, "web1", "qemu", (nic,), True, ((endpoint, nic),))


def test_nic_labels_override_the_domains() -> None:
    xml = load("ok-full").replace(b'key="nic" value="front"', b'key="role" value="db"')
    assert parse_domain(xml, "qemu").endpoints[0][0].labels == {"role": "db", "env": "prod"}


def test_every_nic_is_seen() -> None:
    domain = parse_domain(load("ok-two-nics"), "lxc")
    assert domain.driver == "lxc"
    assert [(nic.mac, nic.type) for nic in domain.nics] == [
        ("52:54:00:00:00:02", "ethernet"), ("52:54:00:00:00:03", "ethernet"), ("52:54:00:00:00:04", "bridge"),
    ]  # fmt: skip
    assert parse_domain(load("untagged-odd-nics"), "qemu").nics == (
        Nic(None, None, "ethernet"), Nic(None, None, "ethernet"), Nic(None, None, ""), Nic(None, None, "ethernet"),
    )  # fmt: skip


def test_a_running_domain_may_lack_a_tagged_nic() -> None:
    xml = load("ok-two-nics").replace(b"<mac address='52:54:00:00:00:03'/>", b"<mac address='52:54:00:00:00:99'/>")
    assert "has no NIC with this mac" in refused(xml)
    domain = parse_domain(xml, "qemu", absent_ok=True)
    assert domain.absent == ("52:54:00:00:00:03",)
    assert [nic.mac for _, nic in domain.endpoints] == [MAC]
    no_nic = load("ok-minimal").replace(b"type='ethernet'", b"type='bridge'")
    assert "0 ethernet NICs" in refused(no_nic)
    assert parse_domain(no_nic, "qemu", absent_ok=True).endpoints == ()


@pytest.mark.parametrize(
    ("target", "prefixes", "outside"),
    [
        ("tap0", ("vnet",), True),
        ("vnet0", ("vnet",), False),
        ("tap0", ("vnet", "tap"), False),
        ("xvnet", ("vnet",), True),
    ],
)
def test_outside_guard(target: str, prefixes: tuple[str, ...], outside: bool) -> None:
    xml = load("ok-full").replace(b"vnet2", target.encode())
    assert bool(outside_guard(parse_domain(xml, "qemu"), prefixes)) == outside
    untagged = re.sub(rb"<metadata>.*</metadata>", b"", xml, flags=re.S)
    assert outside_guard(parse_domain(untagged, "qemu"), prefixes) == []


def test_outside_guard_looks_at_ethernet_only_but_at_all_of_them() -> None:
    xml = load("ok-second-nic-isolated").replace(b"00:03'/>", b"00:03'/><target dev='tap9'/>")
    assert [nic.target for nic in outside_guard(parse_domain(xml, "qemu"), ("vnet",))] == ["tap9"]
    beside = load("ok-bridge-beside").replace(b"00:03'/>", b"00:03'/><target dev='tap9'/>")
    assert outside_guard(parse_domain(beside, "qemu"), ("vnet",)) == []


def odd_bytes() -> dict[str, bytes]:
    good = load("ok-minimal")
    deep = b"<a>" * 100_000 + b"</a>" * 100_000
    text = good.decode()
    return {
        "empty": b"",
        "blank": b" \n",
        "nul": b"\0" + good,
        "nul-inside": good.replace(b"web1", b"we\0b1"),
        "binary": bytes(range(256)),
        "utf-16": text.encode("utf-16"),
        "utf-16-doctype": ("<!DOCTYPE domain>" + text).encode("utf-16"),
        "utf-32": text.encode("utf-32"),
        "utf-16-declared": ('<?xml version="1.0" encoding="utf-16"?>' + text).encode("utf-16-le"),
        "not-utf-8": good.replace(b"web1", b"w\xe9b1"),
        "utf-7": b'<?xml version="1.0" encoding="utf-7"?>+ADw-domain/+AD4-',
        "ebcdic": ('<?xml version="1.0" encoding="cp037"?>' + text).encode("cp037"),
        "surrogate": good.replace(b"web1", b"w\xed\xa0\x80b"),
        "deep": good.replace(b"</devices>", deep + b"</devices>"),
        "deep-open": b"<domain>" * 100_000,
        "deep-in-tag": good.replace(b"10.65.0.2", deep),
        "10-MB": good + b" " * (10 << 20),
        "10-MB-text": good.replace(b"10.65.0.2", b"1" * (10 << 20)),
        "open-comment": b"<!--" * 100_000,
        "open-pi": b"<?" * 100_000,
        "json": b'{"domain": 1}',
    }


@pytest.mark.parametrize("name", odd_bytes())
def test_odd_bytes_are_refused(name: str) -> None:
    assert "domain XML: " in refused(odd_bytes()[name]) or name == "deep-in-tag"


@pytest.mark.parametrize("count", [7 << 20, MAX_BYTES - 2000])
def test_large_but_allowed(count: int) -> None:
    xml = load("ok-minimal").replace(b"<memory", b" " * count + b"<memory")
    assert parse_domain(xml, "qemu").tagged


def test_many_siblings_and_attributes() -> None:
    wide = load("ok-minimal").replace(b"</devices>", b"<interface type='ethernet'/>" * 100_000 + b"</devices>")
    assert "100001 ethernet NICs" in refused(wide)
    labels = b"".join(b"<slash32:label key='k%d' value=''/>" % i for i in range(100_000))
    assert "100000 labels" in refused(
        load("ok-minimal").replace(b"<slash32:interface>", labels + b"<slash32:interface>")
    )


def test_bom_and_declaration_are_fine() -> None:
    good = load("ok-minimal")
    assert parse_domain(b"\xef\xbb\xbf" + good, "qemu").tagged
    assert parse_domain(b'<?xml version="1.0" encoding="UTF-8"?>\n' + good, "qemu").tagged


def test_a_doctype_in_a_description_is_only_text() -> None:
    xml = load("untagged-plain").replace(b"<memory", b"<description><![CDATA[<!DOCTYPE x>]]></description><memory")
    assert not parse_domain(xml, "qemu").tagged


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """Control: the entity's file exists and holds a valid address, which would be taken if entities were."""
    (tmp_path / "a").write_text("10.65.0.2")
    dtd = f'<!DOCTYPE domain [<!ENTITY a SYSTEM "{tmp_path / "a"}">]>'.encode()
    assert "DOCTYPE" in refused(dtd + load("ok-minimal").replace(b"10.65.0.2", b"&a;"))
    assert parse_domain(load("ok-minimal"), "qemu").tagged


def test_quote() -> None:
    assert quote("a\nb'\u202e") == '"a\\nb\'\\u202e"'
    assert len(quote("\n" * 10_000)) <= 2 * 64 + 2


def anything(xml: bytes) -> None:
    try:
        domain = parse_domain(xml, "qemu")
    except TagError as error:
        assert str(error).isprintable() and len(str(error)) <= 600
    else:
        assert isinstance(domain, Domain) and (domain.tagged or not domain.endpoints)


@settings(max_examples=5000 if FULL else 500, deadline=None)
@given(st.binary(max_size=400))
@example(b"<domain/>")
def test_any_bytes(data: bytes) -> None:
    anything(data)


SEEDS = [path.read_bytes() for path in corpus("ok") + corpus("untagged")]
PIECES = [
    b"<",
    b">",
    b"'",
    b'"',
    b"&#0;",
    b"&x;",
    b"<!DOCTYPE d>",
    b"<![CDATA[",
    b"]]>",
    b"\xff",
    b"<slash32:",
    b"/>",
    b"xmlns=''",
]


@settings(max_examples=5000 if FULL else 500, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_any_damage_to_a_good_domain(seed: bytes, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(seed)))
        length = data.draw(st.integers(0, 30))
        piece = data.draw(st.sampled_from(PIECES) | st.binary(max_size=8))
        seed = seed[:start] + piece + seed[start + length :]
    anything(seed)


@settings(max_examples=3000 if FULL else 300, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["key", "value", "name", "mac", "shared", "text", "domain"]))
def test_any_text_in_any_field(text: str, field: str) -> None:
    from lxml import etree

    root = etree.fromstring(load("ok-full"))
    try:
        for element in root.iter("{urn:slash32:domain:1}*"):
            if field in element.attrib:
                element.set(field, text)
            elif field == "text" and (element.text or "").strip():
                element.text = text
        if field == "domain":
            root.find("name").text = text
    except ValueError:  # not an XML character
        return
    anything(etree.tostring(root))
