# Owns: the command `slash32 diff`: what a change would do, before it is made. What is compared comes from the
# dispatcher (fleet.py) or from files (slash32.worldfile); comparing is slash32.compare, looks are differences.py.
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import click

from slash32.compare import compare
from slash32.documents import Document
from slash32.edits import Edit, Id, edits, identified
from slash32.errors import Slash32Error, quoted
from slash32.matching import World
from slash32.model import EndpointKey
from slash32.resources import Resource, decode
from slash32.worldfile import read_world

from . import fleet
from .client import Client
from .differences import Differences, as_data, as_text
from .explain import documents_of
from .files import check
from .waiting import terminal_progress

CHANGES = 3  # exit code
PATIENCE, EVERY = 1.0, 0.2  # seconds until progress is shown, and between its lines
_INVENTED = "00000000-0000-4000-8000-"  # uuids of Endpoints whose file gives none: they count, so the name must do
_FILE = {"multiple": True, "metavar": "FILE", "type": click.Path()}


@click.command(short_help="What would a change do, and to whom?")
@click.option(
    "-f", "--file", "files", help="What would be applied: a file, a directory, or - (standard input).", **_FILE
)
@click.argument("more", nargs=-1, metavar="[FILE]...", type=click.Path())
@click.option("--delete", is_flag=True, help="What -f names would be deleted.")
@click.option("--before", help="Without a dispatcher: the world as it is, with its Endpoints.", **_FILE)
@click.option("--after", help="With --before: the whole world as it would be, in place of -f.", **_FILE)
@click.option("--all", "everything", is_flag=True, help="All rows, not only the widest.")
@click.option("--exit-code", is_flag=True, help="Exit with 3 where any verdict changes.")
@click.option("-o", "--output", type=click.Choice(["table", "yaml", "json"]), default="table", show_default=True)
@click.pass_context
def diff(context: click.Context, files: tuple[str, ...], more: tuple[str, ...], **options: object) -> None:
    """What would change if files were applied: resources, and who could newly, or no longer, speak to whom.

    \b
    Examples:
      slash32 diff -f policy.yaml
      slash32 diff -f policies/ --all
      slash32 diff --delete -f old.yaml -o json
      slash32 diff --before world.yaml -f policy.yaml
      slash32 diff --before world.yaml --after new-world.yaml

    Nothing is applied. Of each ordered pair of guests (hosts, prefixes behind guests, the world outside) the verdict on
    every kind of traffic is compared; a pair counts once in each direction. With --before no dispatcher is asked.

    Exit code 0 also where verdicts change, but for --exit-code.
    """
    names, old, new = (*files, *more), _names(options["before"]), _names(options["after"])
    _usage(bool(files), bool(more), old, new, bool(options["delete"]))
    found = _offline(names, old, new, bool(options["delete"])) if old else _online(context.obj, names, options)
    if options["output"] == "table":
        click.echo(as_text(found, bool(options["everything"])))
    else:
        from . import show

        click.echo(show.dump(as_data(found), str(options["output"])))
    sys.stdout.flush()
    context.exit(CHANGES if options["exit_code"] and found.comparison.changes else 0)


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, tuple) else ()


def _usage(files: bool, more: bool, old: Sequence[str], new: Sequence[str], delete: bool) -> None:
    if new and not old:
        raise click.UsageError("--after needs --before: two worlds, each with its Endpoints")
    if new and (files or more or delete):
        raise click.UsageError("give --after, or what would be applied with -f, not both")
    if not files and (more or not new):
        raise click.UsageError("name the files with -f FILE (- is standard input)")


# --- with the dispatcher


def _online(client: Client, names: Sequence[str], options: dict[str, object]) -> Differences:
    found = check(names)
    if found.errors:
        raise Slash32Error("\n".join(found.errors))
    delete = bool(options["delete"])
    if not delete:  # whatever apply would refuse is refused here
        body = {"documents": [dict(document.value) for document in found.documents]}
        client.post("apply", body=body, query="dry_run=1")
    have = fleet.read(client)
    named = identified(found.resources)
    if delete:
        _must_exist(named, have.resources)
        after = {key: resource for key, resource in have.resources.items() if key not in named}
    else:
        after = {**have.resources, **named}
    edited = edits(have.resources, after, named)
    notes = [] if have.steady else ["the fleet changed while it was read: run this again when it is quiet"]
    return _differences(edited, have.world(), have.world(after), notes)


def _must_exist(named: Iterable[Id], have: Iterable[Id]) -> None:
    there = set(have)
    missing = [f"{kind} {quoted(name, 64)[1:-1]}: does not exist" for kind, name in named if (kind, name) not in there]
    if missing:
        raise Slash32Error("\n".join(missing))


# --- by files


def _offline(names: Sequence[str], old: Sequence[str], new: Sequence[str], delete: bool) -> Differences:
    before = documents_of(old)
    given = documents_of(new or names)
    after = given if new else _put(before, given, delete)
    worlds = _keyed(read_world(before)), _keyed(read_world(after))
    had, has = (identified(_resources(world)) for world in worlds)
    listed = () if new else tuple(key for key in map(_id, given) if key[0] != "Endpoint")
    return _differences(edits(had, has, [key for key in listed if key in had or key in has]), *worlds, [])


def _id(document: Document) -> Id:
    """Kind and name, as far as the document says them; who reads it says what is wrong."""
    value = document.value
    about = value.get("metadata")
    name = (about.get("name") if isinstance(about, dict) else None) or value.get("name") or value.get("domain")
    return str(value.get("kind") or "Endpoint"), str(name)


def _put(before: Sequence[Document], given: Sequence[Document], delete: bool) -> list[Document]:
    named = {_id(document) for document in given}
    if delete:
        for document in given:
            if _id(document)[0] != "Endpoint":
                decode(document)
        _must_exist(named, map(_id, before))
    kept = [document for document in before if _id(document) not in named]
    return kept if delete else [*kept, *given]


def _resources(world: World) -> list[Resource]:
    return [*world.policies, *world.profiles, *world.tiers, *world.sets, *world.host_endpoints]


def _keyed(world: World) -> World:
    """Endpoints without a uuid are the same in two files where their names are."""

    def renamed(key: EndpointKey, domain: str) -> EndpointKey:
        return EndpointKey(f"name {domain}", "") if key.uuid.startswith(_INVENTED) else key

    keys = {each.key: renamed(each.key, each.domain) for each in world.endpoints}
    endpoints = [replace(each, key=keys[each.key]) for each in world.endpoints]
    return replace(world, endpoints=endpoints, places={keys[key]: host for key, host in world.places.items()})


# --- both


def _differences(edited: Sequence[Edit], before: World, after: World, notes: Sequence[str]) -> Differences:
    show = terminal_progress()
    try:
        found = compare(before, after, _progress(show) if show else None)
    finally:
        if show:
            show("")
    return Differences(edited, found, [*notes, *_notes(edited, before, after, bool(found.losing))])


def _progress(show: Callable[[str], None]) -> Callable[[int, int], None]:
    last = time.monotonic() + PATIENCE - EVERY

    def tell(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            show(f"comparing: {100 * done // max(1, of)} %")

    return tell


def _notes(edited: Sequence[Edit], before: World, after: World, losing: bool) -> list[str]:
    notes = []
    changed = [edit for edit in edited if edit.change != "unchanged"]
    staged = [edit.name for edit in changed if edit.kind.startswith("Staged")]
    if staged:
        notes.append(f"staged policies change no verdict, they count: {_few(staged)}")
    if losing:
        keep = [policy.name for policy in before.policies if policy.keep_established]
        but = f", but for those that policies with keepEstablished had allowed ({_few(keep)})" if keep else ""
        notes.append(f"flows that are open and no longer allowed would be ended{but}")
    hosts = [edit.name for edit in changed if edit.kind == "Host"]
    if hosts:
        notes.append(f"which endpoints a Host may have is not compared: {_few(hosts)}")
    silent = [each.name for each in (*before.host_endpoints, *after.host_endpoints) if not each.addresses]
    if silent and changed:
        notes.append(f"without expectedIPs a host's own traffic is not compared: {_few(list(dict.fromkeys(silent)))}")
    return notes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
