# The manual and --help say the same: every command and option of one is in the other; every help has examples and exit
# codes.
from __future__ import annotations

import argparse
import re
from pathlib import Path

import click
import pytest

import dispatcher.__main__
import hostd.__main__
import lab.cli
from slash32.cli.commands import cli

REPO = Path(__file__).resolve().parents[2]
PAGES = {"slash32": "slash32.1", "slash32-hostd": "slash32-hostd.8", "slash32-dispatcher": "slash32-dispatcher.8"}
EVERYWHERE = {"--help", "-h"}
SHORT = {"--output": "-o", "--file": "-f"}  # the manual gives one of two names
CODES = re.compile(r"0 done, 1 (refused or )?failed, 2 usage")


def parsers() -> dict[str, argparse.ArgumentParser]:
    return {
        "slash32-hostd": hostd.__main__._parser(),
        "slash32-dispatcher": dispatcher.__main__._parser(),
        "lab/rack": lab.cli.parser(),
    }


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


def helps(program: str) -> dict[str, str]:
    """Command ("" is the program itself): what --help prints."""
    if program != "slash32":
        parser = parsers()[program]
        return {"": parser.format_help(), **{name: verb.format_help() for name, verb in verbs_of(parser).items()}}
    top = click.Context(cli, info_name="slash32")
    found = {"": cli.get_help(top)}
    return found | inner_helps(cli, top)


def inner_helps(group: click.Group, context: click.Context, before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, command in group.commands.items():
        inside = click.Context(command, parent=context, info_name=name)
        found[before + name] = command.get_help(inside)
        if isinstance(command, click.Group):
            found |= inner_helps(command, inside, f"{before}{name} ")
    return found


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", text)) - EVERYWHERE


def options_of(program: str) -> set[str]:
    """From the tables of options only, not from examples."""
    found: set[str] = set()
    for text in helps(program).values():
        table = re.search(r"^(options|Options):\n((  .*\n|\n(?=  -))*)", text + "\n", re.M)
        for line in re.findall(r"^  (-.*)$", table[2] if table else "", re.M):
            found |= options(re.split(r"  ", line)[0])
    return found - EVERYWHERE


def page(program: str) -> str:
    text = (REPO / "docs/man" / PAGES[program]).read_text()
    return re.sub(r"\\f[BIR]|\"", "", text).replace("\\-", "-").replace("\\&", "")


def commands_on(page: str) -> set[str]:
    section = page.split(".SH COMMANDS\n")[1].partition(".SH ")[0]
    groups = "host|dispatcher|store"
    return set(re.findall(rf"^\.TP\n\.B[RI]? +((?:(?:{groups}) )?\w+)", section, re.M))


@pytest.mark.parametrize("program", PAGES)
def test_the_manual_has_every_command_and_no_other(program: str) -> None:
    have = set(helps(program)) - {""}
    groups = {name.rpartition(" ")[0] for name in have}  # their commands are there
    assert commands_on(page(program)) == have - groups


@pytest.mark.parametrize("program", PAGES)
def test_the_manual_has_every_option_and_no_other(program: str) -> None:
    named = options(page(program).split(".SH EXAMPLES")[0])
    have = options_of(program)
    missing = {each for each in have - named if SHORT.get(each) not in named}
    assert (missing, named - have) == (set(), set())
    assert have >= {"slash32": {"--wait", "--socket"}}.get(program, {"--config"}), "the control"


@pytest.mark.parametrize("program", [*PAGES, "lab/rack"])
def test_every_help_teaches(program: str) -> None:
    for verb, text in helps(program).items():
        assert CODES.search(text), (program, verb)
        assert re.search("examples:|first session:", text, re.I), (program, verb)
        assert re.search(rf"^  .*{program.removesuffix('-dispatcher')}", text, re.M), (program, verb)
        assert max(map(len, text.splitlines())) <= 122, (program, verb)


@pytest.mark.parametrize("program", PAGES)
def test_the_manual_has_exit_codes(program: str) -> None:
    assert CODES.search(page(program).split(".SH EXIT STATUS\n")[1])


@pytest.mark.parametrize("name", ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (REPO / name).read_text())
    assert [link for link in links if not (REPO / name).parent.joinpath(link).exists()] == []


def test_the_index_has_every_page() -> None:
    listed = set(re.findall(r"\]\(((?:man|decisions)/[^)]+)\)", (REPO / "docs/README.md").read_text()))
    there = [path for room in ("man", "decisions") for path in (REPO / "docs" / room).iterdir()]
    assert listed == {f"{path.parent.name}/{path.name}" for path in there}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_make_targets_exist(name: str) -> None:
    named = set(re.findall(r"(?:^ *|`|\()make ([a-z-]+)", (REPO / name).read_text(), re.M))
    targets = set(re.findall(r"^([a-z -]+):", (REPO / "Makefile").read_text(), re.M))
    assert named and named <= {word for each in targets for word in each.split()}


def test_the_changelog_has_this_version() -> None:
    import slash32

    assert f"## [{slash32.__version__}]" in (REPO / "CHANGELOG.md").read_text()
