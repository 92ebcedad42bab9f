# The pages of docs/ are true: their files are valid, their commands print what stands there, their tables hold; and
# every folder of examples that promises verdicts keeps them, by the model's word and by the compiled packet filters'.
#
# In a page, a comment before a block says what it is: `<!-- file: NAME -->` (the block is that file of the page's
# folder; under examples/ it is a part of that file), `<!-- file: NAME, refused -->`, `<!-- table: KIND -->`. Commands
# stand in blocks of `console`, after "$ ". Those that need a rack are in RACK.
from __future__ import annotations

import copy
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from lxml import etree

import hostd.__main__
from slash32 import failsafe, selector
from slash32.cli.__main__ import main
from slash32.cli.commands import cli
from slash32.documents import load_yaml
from slash32.errors import ResourceError
from slash32.policy import Action, Policy
from slash32.resources import decode
from slash32.tag import parse_domain
from slash32.worldfile import read_world
from tests.recipes import Recipe, recipes

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")
RUNS = ("slash32 explain --offline ", "slash32 validate ", "slash32 schema ", "slash32 diff --before ")
RACK: dict[str, tuple[str, ...]] = {
    "cookbook.md": (
        "slash32 validate -f policy.yaml",
        "slash32 diff -f policy.yaml",
        "slash32 apply -f policy.yaml --wait",
        "virsh metadata web2 --uri urn:slash32:domain:1 --key slash32 --live --config --set \"$(cat tag.xml)\"",
        "slash32 describe endpoint web2",
        "slash32-hostd status -o json",
        "slash32 diff -f web-strict.yaml",
        "slash32 apply -f web-strict.yaml --wait",
        "slash32 delete sgnp web-strict",
        "journalctl -t slash32-hostd -o cat",
        "journalctl SLASH32_POLICY=log-the-rest SLASH32_ENDPOINT=db1",
    ),
    "from-calico.md": (
        "calicoctl get tier,globalnetworkset,globalnetworkpolicy,stagedglobalnetworkpolicy,hostendpoint,profile -o yaml"
        " > exported.yaml",
        "slash32 validate -f exported.yaml",
        "slash32 diff -f exported.yaml",
        "slash32 apply -f exported.yaml --wait",
    ),
    "from-nwfilter.md": (
        "slash32 diff -f examples/from-nwfilter/policy.yaml",
        "slash32 apply -f examples/from-nwfilter/policy.yaml --wait",
        "virsh dumpxml --inactive web1 > before.xml",
        "virsh define after.xml",
        "virsh shutdown web1",
        "virsh start web1",
        "slash32-hostd status",
        "slash32 describe endpoint web1",
        "slash32 explain web1 db1 tcp/5432",
    ),
}
UUID = "<uuid>11111111-2222-3333-4444-555555555555</uuid>"


class Block(NamedTuple):
    kind: str  # of the fence
    file: str  # "": none
    refused: bool
    text: str
    indent: str = ""  # in a list


FENCE = re.compile(
    r"^(?: *<!-- file: (?P<file>[^,\n]+?)(?P<refused>, refused)? -->\n)?"
    r"(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
TABLE = re.compile(r"^<!-- table: (?P<kind>\w+)(?: (?P<about>.+?))? -->\n(?P<rows>(?:\|.*\n)+)", re.M)


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    found = []
    for m in FENCE.finditer(text):
        inside = re.sub(f"^{m['indent']}", "", m["text"], flags=re.M)
        found.append(Block(m["kind"], m["file"] or "", bool(m["refused"]), inside, m["indent"]))
    assert len(re.findall(r"^ *(```|~~~)", text, re.M)) == 2 * len(found), "a fence that is not read"
    assert len(re.findall(r"^ *<!-- file", text, re.M)) == sum(bool(block.file) for block in found)
    return found


def tables(page: str, kind: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(what the comment says besides, rows of cells without head)."""
    for match in TABLE.finditer((DOCS / page).read_text()):
        if match["kind"] == kind:
            rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in match["rows"].splitlines()[2:]]
            yield match["about"] or "", [[cell.strip().replace("\\|", "|") for cell in row] for row in rows]


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints)."""
    assert text.startswith("$ "), text
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, printed = part.partition("\n")
        while command.endswith("\\"):
            more, _, printed = printed.partition("\n")
            command = command[:-1].rstrip() + " " + more.strip()
        yield command, printed.rstrip("\n")


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(REPO / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SLASH32_GOLDEN=write puts in what the commands print now: then read what changed."""
    needs_a_rack = []
    for block in blocks(page):
        if block.file:
            take(block, folder)
        assert block.file or block.kind not in ("yaml", "xml", "ini"), f"which file is this? {block.text[:200]}"
        if block.kind == "console":
            for command, printed in commands(block.text):
                if command in RACK.get(page, ()) or not command.startswith(RUNS):
                    needs_a_rack.append(command)
                    continue
                said = ran(command, capsys)
                if os.environ.get("SLASH32_GOLDEN") == "write":
                    rewrite(page, block.indent, command, printed, said)
                else:
                    assert said == printed, command
    assert needs_a_rack == list(RACK.get(page, ())), "name in RACK what cannot be run here"


def rewrite(page: str, indent: str, command: str, printed: str, said: str) -> None:
    old, new = (
        "".join(f"{indent}{line}\n" if line else "\n" for line in (f"$ {command}", *text.splitlines()))
        for text in (printed, said)
    )
    text = (DOCS / page).read_text()
    assert old in text, f"write it on one line: {command}"
    (DOCS / page).write_text(text.replace(old, new, 1))


def take(block: Block, folder: Path) -> None:
    if block.file.startswith("examples/"):
        there, here = (REPO / block.file).read_text(), block.text
        if block.kind == "xml":  # indented as it suits the page
            there, here = ("\n".join(map(str.strip, text.splitlines())) for text in (there, here))
        assert here in there, f"{block.file} says something else: {here[:200]}"
        return
    (folder / block.file).write_text(block.text)
    if block.kind == "yaml":
        problems = [*yaml_problems(block.text)]
        assert bool(problems) is block.refused, problems
    elif block.kind == "xml":
        tree = etree.fromstring(block.text.encode())
        assert tree.tag in ("endpoint", "{urn:slash32:domain:1}endpoint")
        tag = block.text.replace("<endpoint>", '<endpoint xmlns="urn:slash32:domain:1">')  # as virsh metadata wants it
        macs = re.findall(r'mac="([^"]+)"', tag)
        nics = "".join(f"<interface type='ethernet'><mac address='{mac}'/></interface>" for mac in macs)
        tagged = f"<name>x</name><metadata>{tag}</metadata><devices>{nics}</devices>"
        found = parse_domain(f"<domain type='kvm'>{UUID}{tagged}</domain>".encode(), "qemu")
        assert len(found.endpoints) == len(macs) > 0, block.file
    else:
        pytest.fail(f"{block.file}: who checks {block.kind}?")


def yaml_problems(text: str) -> Iterator[str]:
    documents = load_yaml(text, "page")
    assert documents
    if any(document.value.get("kind") == "Endpoint" for document in documents):
        read_world(documents)
        return
    for document in documents:
        try:
            decode(document)
        except ResourceError as error:
            yield str(error)


def ran(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main(shlex.split(command)[1:])
    out, err = capsys.readouterr()
    if command.startswith("slash32 explain") and not err:
        denied = "denied" in out.splitlines()[0] or out.startswith('{\n  "verdict": "deny"')
        assert code == (3 if denied else 0), command
    else:
        assert code == (1 if err else 0), (command, err)
    return (out + err).rstrip("\n")


@pytest.mark.parametrize("page", RACK)
def test_commands_for_a_rack_can_be_understood(page: str) -> None:
    for command in RACK[page]:
        program, *arguments = shlex.split(command)
        if program == "slash32":
            cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
        elif program == "slash32-hostd":
            hostd.__main__._parser().parse_args(arguments)
        else:
            assert program in ("virsh", "systemctl", "calicoctl", "journalctl", "ip", "editor"), command


def test_a_wrong_page_is_seen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control."""
    with pytest.raises(AssertionError):
        tier = "{apiVersion: slash32/v1, kind: Tier, metadata: {name: default}, spec: {}}\n"
        take(Block("yaml", "x.yaml", False, tier), folder)
    with pytest.raises(AssertionError):
        take(Block("yaml", "examples/three-tier.yaml", False, "something else\n"), folder)
    assert ran("slash32 validate -f nothing.yaml", capsys) == "nothing.yaml: No such file or directory"
    assert [*commands("$ a \\\n    b\nx\ny\n$ c\n")] == [("a b", "x\ny"), ("c", "")]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_selectors_hold_where_the_page_says() -> None:
    seen = set()
    for about, rows in tables("policy-model.md", "selectors"):
        labels = yaml.safe_load(about)
        for written, word, *_ in rows:
            chosen = selector.parse(written.strip("`"))
            assert chosen.matches(labels) is {"yes": True, "no": False}[word], written
            seen.add(word)
    assert seen == {"yes", "no"}


def test_failsafes_are_those_of_the_page() -> None:
    names = {6: "TCP", 17: "UDP"}
    ((_, rows),) = tables("policy-model.md", "failsafes")
    for column, listed in ((1, failsafe.INBOUND), (2, failsafe.OUTBOUND)):
        said = {(row[0], part) for row in rows for part in row[column].split(", ") if part}
        have = {
            (each.why, f"{names[each.protocol]} {each.first}" + (f"-{each.last}" if each.last > each.first else ""))
            for each in listed
        }
        assert said == have


PLAIN: dict[str, Any] = {
    "apiVersion": "projectcalico.org/v3",
    "kind": "GlobalNetworkPolicy",
    "metadata": {"name": "x"},
    "spec": {
        "selector": "all()",
        "types": ["Ingress", "Egress"],
        "ingress": [{"action": "Allow", "protocol": "TCP", "source": {}, "destination": {}}],
        "egress": [],
    },
}


def refusal(field: str) -> str:
    """What a policy is refused for that has this field; `kind: X` is a document of that kind."""
    value = copy.deepcopy(PLAIN)
    if field.startswith("kind: "):
        value["kind"] = field.removeprefix("kind: ")
    else:
        path, _, given = field.partition(": ")
        *way, last = re.findall(r"\w+", path)
        at: Any = value
        for step in way:
            at = at[int(step) if step.isdigit() else step]
        at[last] = yaml.safe_load(given) if given else {"x": "y"}
    with pytest.raises(ResourceError) as caught:
        decode(value)
    return str(caught.value)


def test_fields_are_refused_as_the_page_says() -> None:
    decode(PLAIN)  # the control
    rows = [row for _, rows in tables("from-calico.md", "refused") for row in rows]
    assert len(rows) >= 25
    for written, said, *_ in rows:
        for field in re.findall(r"`([^`]+)`", written):
            assert said.strip("`") in refusal(field), field


def test_what_is_taken_of_a_calico_export_is_unchanged() -> None:
    exported, mended = (
        [document.value for document in load_yaml((REPO / "examples/from-calico" / name).read_text(), name)]
        for name in ("exported.yaml", "policy.yaml")
    )
    taken = [value for value in exported if not [*yaml_problems(yaml.safe_dump(value))]]
    assert len(taken) == 6 and len(exported) == 9
    assert all(value in mended for value in taken)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_what_their_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "pictures" / "draw.py"))["PICTURES"]
    there = {path.name: path.read_text() for path in (DOCS / "pictures").glob("*.svg")}
    assert there == {name: picture() for name, picture in drawn.items()}
    text = "".join((DOCS / page).read_text() for page in PAGES)
    assert all(f"](pictures/{name})" in text for name in there)


# -- the index, and the way about -------------------------------------------------------------------------------------


def test_the_index_has_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert listed == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", (DOCS / page).read_text())
    for link in links:
        file, _, anchor = link.partition("#")
        target = DOCS / (file or page)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


# -- recipes ----------------------------------------------------------------------------------------------------------

IDS = [str(recipe.folder.relative_to(REPO / "examples")) for recipe in recipes()]


@pytest.mark.parametrize("recipe", recipes(), ids=IDS)
def test_a_recipe_keeps_what_it_promises(recipe: Recipe) -> None:
    expected = recipe.expected()
    assert set(expected.values()) == {True, False}
    assert set(recipe.listed) <= set(expected)
    for cell, allowed in expected.items():
        assert {verdict.allowed for verdict in recipe.model(cell)} == {allowed}, cell
        assert set(recipe.compiled(cell)) == {allowed}, f"compiled: {cell}"


@pytest.mark.parametrize("recipe", recipes(), ids=IDS)
def test_by_the_command(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    files = [word for name in ("world.yaml", recipe.policy) for word in ("-f", str(recipe.folder / name))]
    assert main(["validate", "-f", str(recipe.folder / recipe.policy)]) == 0
    for allowed, code in ((True, 0), (False, 3)):
        cell = next(c for c, word in recipe.listed.items() if word is allowed and c.traffic != "ping")
        assert main(["explain", "--offline", *files, *cell]) == code, cell
    capsys.readouterr()


@pytest.mark.parametrize("recipe", recipes(), ids=IDS)
def test_each_of_its_policies_matters(recipe: Recipe) -> None:
    """The control: without any one of them a promise is broken, by the model's word and by the compiled filters'."""
    policies = [policy for policy in recipe.world.policies if not policy.staged and decides(policy)]
    assert policies
    for policy in policies:
        changed = Recipe(recipe.folder, recipe.policy)
        changed.__dict__["world"] = replace(recipe.world, policies=[p for p in recipe.world.policies if p != policy])
        modelled = {cell: all(v.allowed for v in changed.model(cell)) for cell in recipe.expected()}
        assert modelled != recipe.expected(), f"{policy.name}: nothing in the matrix needs it"
        assert {cell: all(changed.compiled(cell)) for cell in modelled} == modelled


def decides(policy: Policy) -> bool:
    rules = (*policy.ingress, *policy.egress)
    return not rules or any(rule.action is not Action.LOG for rule in rules)


def test_the_cookbook_has_every_recipe() -> None:
    text = (DOCS / "cookbook.md").read_text()
    folders = {path.name for path in (REPO / "examples" / "cookbook").iterdir()}
    assert folders == set(re.findall(r"\]\(\.\./examples/cookbook/([\w-]+)\)", text))
    assert {recipe.folder.name for recipe in recipes()} >= folders
