# Owns: the command `slash32-hostd`. Touches: what its verbs touch; `compile` and `diff` change nothing.
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from slash32.errors import Slash32Error

from . import config as settings
from .config import Config, ConfigError
from .inbox import InboxError

_HELP = """\
Keeps this hypervisor's guests connected: routes, neighbours and the packet filter follow what libvirt runs here and
what the dispatcher says. Guests are tagged in their domain XML; see slash32-hostd(8).
"""
_CODES = "exit codes: 0 done, 1 refused or failed, 2 usage"


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return int(arguments.verb(settings.load(arguments.config), arguments))
    except (ConfigError, InboxError, Slash32Error, OSError, ValueError) as error:
        print(f"slash32-hostd: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("slash32-hostd", description=_HELP, epilog=_CODES)
    parser.add_argument("--config", type=Path, default=settings.PATH, metavar="FILE", help=f"default: {settings.PATH}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, does: Callable[[Config, argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=words, description=words + ".", epilog=_CODES)
        sub.set_defaults(verb=does)
        return sub

    verb("run", _run, "be the daemon (systemd does this)")
    verb("compile", _compile, "print what the kernel is to hold, as nft and ip commands, from the last state on disk")
    verb("diff", _diff, "print what a resync would change in the kernel now; exit 1 if anything")
    show = verb("status", _status, "say how this host is: dispatcher, endpoints, what the kernel refused")
    show.add_argument("-o", "--output", choices=("table", "wide", "json", "yaml"), default="table")
    verb("key", _key, "print this host's public key, for the dispatcher's Host resource; made at first use")
    guard = verb("guard", _guard, "put up the guard: unknown taps are isolated (the early unit does this)")
    guard.add_argument("--first-install", action="store_true", help="list untagged guests that run, and let them be")
    return parser


def _run(config: Config, _: argparse.Namespace) -> int:
    from .daemon import Daemon

    Daemon(config).run()
    return 0


def _compile(config: Config, _: argparse.Namespace) -> int:
    from .offline import compiled

    sys.stdout.write(compiled(config))
    return 0


def _diff(config: Config, _: argparse.Namespace) -> int:
    from .offline import pending

    lines = pending(config)
    for line in lines:
        print(line)
    return 1 if lines else 0


def _status(config: Config, arguments: argparse.Namespace) -> int:
    from .report import show

    return show(config.run_dir, arguments.output)


def _key(config: Config, _: argparse.Namespace) -> int:
    from slash32.keys import load_or_create_key

    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    print(load_or_create_key(config.state_dir / "hostd.key").public)
    return 0


def _guard(config: Config, arguments: argparse.Namespace) -> int:
    from .dataplane.host import Machine

    machine = Machine(config)
    if arguments.first_install:
        from .first_install import running_untagged

        machine.kernel.load(exempt=running_untagged(config))
        return 0
    machine.kernel.load()
    return 0


if __name__ == "__main__":
    sys.exit(main())
