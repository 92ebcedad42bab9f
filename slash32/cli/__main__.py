# Owns: the process: exit codes (0 done, 1 refused or failed, 2 usage) and where complaints go (stderr, one line each).
from __future__ import annotations

import os
import sys

import click

from slash32.errors import Slash32Error

from .commands import cli


def main(arguments: list[str] | None = None) -> int:
    try:
        cli.main(args=arguments, prog_name="slash32", standalone_mode=False, complete_var="_SLASH32_COMPLETE")
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.UsageError as error:
        error.show()
        return 2
    except click.Abort:
        click.echo("interrupted", err=True)
        return 1
    except Slash32Error as error:
        click.echo(str(error), err=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
