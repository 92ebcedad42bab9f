# Owns: the process: exit codes (0 done, 1 refused or failed, 2 usage) and where complaints go (stderr, one line each).
from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    from slash32.errors import Slash32Error, printable

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letter
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except Slash32Error as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted")
    except BrokenPipeError:
        _forget_output()
        return 1
    except OSError as error:
        _forget_output()
        return _complain(f"slash32: output: {error.strerror or printable(str(error))}")
    except Exception as error:  # a bug, or something else than a dispatcher at the socket: still one line
        if os.environ.get("SLASH32_DEBUG"):
            raise
        what = printable(f"{type(error).__name__}: {error}"[:200])
        return _complain(f"slash32: a bug, or no dispatcher at that socket: {what}; SLASH32_DEBUG=1 shows where")


def _run(arguments: list[str]) -> int:
    import click

    from .commands import cli, usage

    if "_SLASH32_COMPLETE" in os.environ:
        cli.main(args=arguments, prog_name="slash32", complete_var="_SLASH32_COMPLETE")
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        with cli.make_context("slash32", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.Abort:
        return _complain("interrupted")
    except click.ClickException as error:
        return _complain(usage(error), error.exit_code)
    return 0


def _complain(text: str, code: int = 1) -> int:
    if sys.stderr is not None:
        print(text, file=sys.stderr)
    return code


def _forget_output() -> None:
    """Or Python complains once more at its exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
