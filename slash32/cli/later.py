# Owns: commands whose modules are large and imported when they are used: `slash32 --help` is quick.
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import click


class Later(click.Command):
    """The command NAME of the module of that name. All there is of it before is what a list of commands shows."""

    taught: Callable[[click.Command], None]

    def __init__(self, name: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)

    @cached_property
    def whole(self) -> click.Command:
        found = getattr(import_module(f".{self.name}", __package__), str(self.name))
        assert isinstance(found, click.Command)
        self.taught(found)
        return found

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        return self.whole.make_context(info_name, args, parent, **extra)

    def get_help(self, ctx: click.Context) -> str:
        return self.whole.get_help(ctx)
