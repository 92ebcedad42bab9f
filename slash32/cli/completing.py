# Owns: what the shell may complete: kinds, and names that the dispatcher knows; nothing where it does not answer.
# Touches: the dispatcher, briefly.
from __future__ import annotations

import click

from slash32.errors import Slash32Error
from slash32.resources import KINDS

from . import show
from .client import Client
from .place import place_of

PATIENCE = 2.0  # seconds; somebody waits at a prompt


def kinds(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    words = [kind.plural for kind in KINDS.values()]
    words = words if context.command.name == "delete" else ["endpoints", *words]
    words += ["dispatchers"] if context.command.name == "get" else []
    words += [kind.short[0] for kind in KINDS.values() if kind.short]
    return [word for word in words if word.startswith(typed)]


def names(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """Of the kind that stands before; of hosts where there is none."""
    return _known(context, context.params.get("kind") or (context.params.get("target") or ("hosts",))[0], typed)


def dispatchers(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    return _known(context, "dispatchers", typed)


def target(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    return (names if context.params.get("target") else kinds)(context, parameter, typed)


def watched(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    words = ["endpoints", *(kind.plural for kind in KINDS.values())]
    return [word for word in words if word.startswith(typed)]


def _known(context: click.Context, word: str, typed: str) -> list[str]:
    options = context.find_root().params
    client = Client(lambda: place_of(options), timeout=PATIENCE)
    try:
        return [name for name in show.names(client, show.kind_word(word, listed=True)) if name.startswith(typed)]
    except (Slash32Error, click.UsageError):
        return []
