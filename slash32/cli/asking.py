# Owns: "are you sure?": asked on a terminal, answered by --yes where there is none. Touches: the terminal.
from __future__ import annotations

import sys

import click

from slash32.errors import Slash32Error, printable

YES = click.option("--yes", is_flag=True, help="Do not ask.")


def confirm(question: str, yes: bool, otherwise: str) -> None:
    """Returns, or raises: `otherwise` says what was not done."""
    if yes:
        return
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("there is no terminal to ask on: give --yes")
    if not click.confirm(printable(question), err=True):
        raise Slash32Error(otherwise)
