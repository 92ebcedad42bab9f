# Owns: the commands `slash32 watch` and `slash32 audit`: what changes, as it changes; and who changed what.
# Touches: the dispatcher, by the client that it is given.
from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from typing import Any

import click

from slash32.errors import Slash32Error, printable, quoted

from . import events, show, text
from .client import Client, Json
from .completing import watched
from .tables import cell

SHORT = click.Choice(["table", "json"])


@click.command(short_help="Print changes as they happen.")
@click.argument("kinds", nargs=-1, metavar="[KIND]...", shell_complete=watched)
@click.option("--since", type=click.IntRange(0), metavar="REVISION", help="All after this one. Default: from now on.")
@click.option("-o", "--output", type=SHORT, default="table", show_default=True, help="json: one object a line.")
@click.pass_obj
def watch(client: Client, kinds: tuple[str, ...], since: int | None, output: str) -> None:
    """Print what changes, one line for each change, until it is interrupted (Ctrl-C, exit code 1).

    \b
    Examples:
      slash32 watch
      slash32 watch endpoints gnp
      slash32 watch -o json | jq -c '.changes[] | select(.kind == "Endpoint") | .object'
      slash32 watch --since 812

    KIND: {kinds}. A dispatcher that is restarted is asked again, and
    nothing is missed; where too much was missed, a line that begins with "reset" says so (in json, "reset": true).
    """
    wanted = {show.kind_word(word) for word in kinds}
    start = show.revision_of(client.get("status")) if since is None else since
    for event in events.follow(client, start, lambda line: click.echo(line, err=True)):
        for line in _lines(event, wanted, output) if event.name in ("commit", "reset") else ():
            click.echo(line)
        sys.stdout.flush()


def _lines(event: events.Event, wanted: Collection[str], output: str) -> Iterator[str]:
    data = _data(event)
    revision, reset = data.get("revision"), event.name == "reset"
    changes = [change for change in _changes(data) if not wanted or change.get("kind") in wanted]
    if output == "json" and (reset or changes):
        yield show.json_text({"revision": revision, **({"reset": True} if reset else {"changes": changes})})
    elif reset:
        yield f"reset     to revision {_word(revision)}: what changed before it is not known any more"
    elif output != "json":
        yield from (f"{_word(revision):9} {_change(change)}" for change in changes)


def _change(change: Json) -> str:
    words = [_word(change.get(key)) for key in ("kind", "name", "change")]
    about = change.get("object")
    domain = about.get("domain") if isinstance(about, dict) else None
    return " ".join([*words[:2], *([f"({_word(domain)})"] if domain else []), words[2]])


def _data(event: events.Event) -> Json:
    try:
        found = json.loads(event.data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Slash32Error(f"the dispatcher sent an event that is not JSON: {quoted(event.data, 80)}")
    return found


def _changes(data: Json) -> list[Json]:
    found = data.get("changes")
    return [change for change in found if isinstance(change, dict)] if isinstance(found, list) else []


def _word(value: object) -> str:
    return printable(cell(value)[:300])


@click.command(short_help="Who changed what?")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="The last so many.")
@click.option("--since", type=click.IntRange(0), metavar="REVISION", help="Only what came after this one.")
@click.option("-o", "--output", type=click.Choice(["table", "yaml", "json"]), default="table", show_default=True)
@click.pass_obj
def audit(client: Client, limit: int, since: int | None, output: str) -> None:
    """Who changed what, and when: the last changes by operators, the newest at the end.

    \b
    Examples:
      slash32 audit
      slash32 audit --since 812 --limit 1000
      slash32 audit -o json | jq '.items[] | select(.who | startswith("token"))'

    WHO is a user of the dispatcher's socket, or the name of a token. AT is the dispatcher's clock; what came first, the
    revisions say. The dispatcher keeps the last 10,000.
    """
    query = f"limit={limit}" + ("" if since is None else f"&since={since}")
    items = client.items("audit", query=query)[::-1]  # told the newest first
    items.sort(key=show.revision_of)
    if output != "table":
        click.echo(show.dump({"items": items}, output))
    elif items:
        head = ("revision", "at", "who", "what", "change")
        rows = [[_plain(item.get(key)) for key in head] for item in items]
        click.echo(text.table([word.upper() for word in head], rows))
    else:
        click.echo("no change yet" if since is None else f"no change since revision {since}")


def _plain(value: Any) -> str:
    return cell(value) if isinstance(value, str | int | float | None) else show.json_text(value)
