# Owns: the command `slash32 schema`.
from __future__ import annotations

import click

from slash32.errors import quoted
from slash32.resources import KINDS, find_kind


def _complete(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    return [kind.name for kind in KINDS.values() if kind.name.lower().startswith(typed.lower())]


@click.command(short_help="Print the JSON Schema of resources, for editors.")
@click.argument("kind", required=False, shell_complete=_complete)
@click.option("-o", "--output", type=click.Choice(["json", "yaml"]), default="json", show_default=True)
def schema(kind: str | None, output: str) -> None:
    """Print the JSON Schema of a kind of resources, or of all of them: editors complete and check with it.

    \b
    Examples:
      slash32 schema > slash32.schema.json
      slash32 schema tier -o yaml

    An editor with yaml-language-server uses it for a file that begins with this line:

    \b
      # yaml-language-server: $schema=slash32.schema.json
    """
    from slash32.schema import schema_of  # made when it is asked for

    from . import show

    found = find_kind(kind) if kind is not None else None
    if kind is not None and found is None:
        raise click.UsageError(f"there is no kind {quoted(kind, 40)}; known: {', '.join(KINDS)}")
    click.echo(show.dump(schema_of(found and found.name), output))
