# What the .debs promise about this checkout: Depends name what is imported and nothing else, the configuration files
# show the true defaults, the units and manual pages fit.
from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher import config as dispatcher
from hostd import config as hostd
from slash32 import resources, tag
from slash32.cli import commands

REPO = Path(__file__).resolve().parents[2]
DEBIAN = REPO / "packaging/deb/debian"
ROOMS = {"slash32-common": ("slash32",), "slash32-hostd": ("hostd", "hooks"), "slash32-dispatcher": ("dispatcher",)}
OURS = {"slash32", "hostd", "hooks", "dispatcher"}
PACKAGE = {"yaml": "python3-yaml", "attr": "python3-attr", "attrs": "python3-attr", "iptc": "python3-iptables"}


def depends(package: str) -> set[str]:
    """The Depends of a binary package; alternatives as they are written, versions left out."""
    stanza = next(s for s in (DEBIAN / "control").read_text().split("\n\n") if s.startswith(f"Package: {package}\n"))
    field = re.search(r"^Depends: (.*)$", stanza, re.M)
    assert field
    return {re.sub(r" \(.*\)", "", each.strip()) for each in field[1].split(",")}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def third_party(rooms: tuple[str, ...]) -> set[str]:
    names = {name for room in rooms for path in (REPO / room).rglob("*.py") for name in imported(path)}
    foreign = names - set(sys.stdlib_module_names) - OURS
    return {PACKAGE.get(name, f"python3-{name}") for name in foreign}


@pytest.mark.parametrize("package", ROOMS)
def test_depends_are_what_is_imported(package: str) -> None:
    named = {each for each in depends(package) if each.startswith("python3-")}
    assert named == third_party(ROOMS[package])


def settings(name: str) -> dict[str, object]:
    """The file with its commented-out settings switched on; there are no others."""
    text = (DEBIAN / "system" / name).read_text()
    assert tomllib.loads(text) == {}, "what is shipped sets nothing"
    return tomllib.loads(re.sub(r"^#(?=\w+ = )", "", text, flags=re.M))


def test_hostd_toml_shows_the_defaults() -> None:
    raw = settings("hostd.toml")
    assert raw.pop("host") == "hv1"
    assert hostd.decode(raw) == hostd.decode({})
    known = {each for each in hostd.Config.__dataclass_fields__ if not each.endswith("_dir")}
    assert set(raw) == known - {"host"}


def test_dispatcher_toml_shows_the_defaults(tmp_path: Path) -> None:
    raw = settings("dispatcher.toml")
    file = tmp_path / "dispatcher.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in raw.items()))
    assert dispatcher.load(file) == dispatcher.Config()
    assert set(raw) == set(dispatcher.Config.__dataclass_fields__)


def test_the_command_looks_where_the_dispatcher_serves() -> None:
    assert dispatcher.Config().socket == Path(commands.SOCKET)
    unit = (DEBIAN / "slash32-dispatcher.slash32-dispatcher.service").read_text()
    assert f"RuntimeDirectory={dispatcher.Config().socket.parent.name}\n" in unit
    assert f"StateDirectory={dispatcher.Config().database.parent.name}\n" in unit


@pytest.mark.parametrize("name", ["hostd.toml", "dispatcher.toml"])
def test_every_setting_has_its_line_in_the_manual(name: str) -> None:
    page = (REPO / f"docs/man/slash32-{name}.5").read_text()
    assert set(re.findall(r"^\.BR (\w+) \"", page, re.M)) == set(settings(name))


def test_every_manual_page_is_shipped_once() -> None:
    shipped = [line for path in DEBIAN.glob("*.manpages") for line in path.read_text().split()]
    assert sorted(shipped) == sorted(str(path.relative_to(REPO)) for path in (REPO / "docs/man").iterdir())


@pytest.mark.parametrize("page", sorted(REPO.glob("docs/man/*")), ids=lambda path: path.name)
def test_manual_pages(page: Path) -> None:
    text = page.read_text()
    name, section = page.name.rsplit(".", 1)
    assert text.startswith(f".TH {name.upper()} {section} ")
    for other, number in re.findall(r"^\.BR (slash32[\w.-]*) \((\d)\)", text, re.M):
        assert (REPO / f"docs/man/{other}.{number}").exists(), other


def example(page: str) -> str:
    """The manual page's synopsis as people read it."""
    text = (REPO / "docs/man" / page).read_text()
    return text.split(".SH SYNOPSIS\n.nf\n")[1].split("\n.fi")[0].replace("\\&", "")


def test_the_manual_s_policies_are_policies() -> None:
    documents = resources.load_yaml(example("slash32-policy.5"), "manual")
    assert [resources.kind_of(resources.decode(each)) for each in documents] == ["GlobalNetworkPolicy", "Host"]


def test_the_manual_s_tag_is_a_tag() -> None:
    metadata, nic = example("slash32-tag.5").split("...\n")
    head = "<name>web1</name><uuid>c7a5fdbd-cdaf-9455-926a-d65c16db1809</uuid>"
    xml = f"<domain type='kvm'>{head}{metadata}<devices>{nic}</devices></domain>"
    assert tag.parse_domain(xml.encode(), "qemu").tagged


def test_no_unit_stops_forwarding() -> None:
    units = {path.name: path.read_text() for path in DEBIAN.glob("*.service")}
    assert len(units) == 3
    for name, text in units.items():
        assert not re.search("^ExecStop", text, re.M), name
    hostd = units["slash32-hostd.slash32-hostd.service"]
    assert "RuntimeDirectoryPreserve=yes" in hostd
    assert "Restart=always" in hostd
    assert not re.search("^ProtectKernelTunables", hostd, re.M), "it writes /proc/sys/net"
