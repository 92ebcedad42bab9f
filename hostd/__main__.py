# Owns: the command `slash32-hostd`. Touches: what its verbs touch; `compile` and `diff` change nothing.
from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from slash32 import journal
from slash32.errors import Slash32Error
from slash32.usage import Parser

from . import config as settings
from .config import Config, ConfigError, Unusable
from .guests.inbox import InboxError

_HELP = """\
Keeps this hypervisor's guests connected: routes, neighbours and the packet filter follow what libvirt runs here and
what the dispatcher says. Guests are tagged in their domain XML: slash32-tag(5). Run as root.
"""
_FIRST_STEPS = """
editor /etc/slash32/hostd.toml               addresses, dispatcher, dispatcher_key: slash32-hostd.toml(5)
systemctl restart slash32-hostd              after every change of that file; guests notice nothing
slash32-hostd key                            for this host's Host resource, on the dispatcher
slash32-hostd status                         is all well here?
"""


_KEYS = """\
slash32-hostd key             the spec.publicKey of slash32-policy(5), always in "quotes" there
slash32-hostd key --next      then, on the dispatcher: slash32 host rotate h1 --key 'WHAT IT PRINTED'
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        config = settings.load(arguments.config)
    except ConfigError as error:
        return _unusable(str(error), arguments)
    try:
        if arguments.verb in (_compile, _diff) and os.geteuid():
            return _complain("the last state and the kernel are root's to read; run this as root")
        return int(arguments.verb(config, arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 1
    except KeyboardInterrupt:
        return _complain("interrupted")
    except PermissionError as error:
        return _complain(f"{error.filename or 'the kernel'}: permission denied; run this as root")
    except Unusable as error:
        return _unusable(str(error), arguments)
    except (InboxError, Slash32Error, OSError, ValueError) as error:
        return _complain(str(error))


def _unusable(why: str, arguments: argparse.Namespace) -> int:
    """Nobody's guests run unguarded for a slip in a file; and systemd need not try the same file again and again."""
    if arguments.verb is _guard:
        _guard(Config(), arguments)
    return _complain(why) if arguments.verb is not _run else _complain(why, 2)


def _complain(why: str, code: int = 1) -> int:
    print(f"slash32-hostd: {why}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser("slash32-hostd", description=_HELP, examples=_FIRST_STEPS)
    where = f"another configuration than {settings.PATH}"
    parser.add_argument("--config", type=Path, metavar="FILE", help=where)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, does: Callable[[Config, argparse.Namespace], int], words: str, examples: str) -> Parser:
        about = f"{words[0].upper()}{words[1:]}."
        sub: Parser = verbs.add_parser(name, help=words, description=about, examples=examples)
        sub.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=where)
        sub.set_defaults(verb=does)
        return sub

    verb("run", _run, "be the daemon, as slash32-hostd.service does it", "systemctl restart slash32-hostd")
    verb(
        "compile",
        _compile,
        "print what the kernel is to hold, as the packet filter's and ip commands, from the last state on disk",
        "slash32-hostd compile | less\nslash32-hostd compile | nft -c -f -      the packet filter's part, checked only",
    )
    verb(
        "diff",
        _diff,
        "print what a resync would change in the kernel now; exit code 1 if anything",
        "slash32-hostd diff && echo the kernel holds what it should",
    )
    show = verb(
        "status",
        _status,
        "say how this host is; exit code 1 if hostd is not running or held, or the kernel refused something",
        "slash32-hostd status -o wide\nslash32-hostd status -o json | jq '.endpoints[] | select(.connected | not)'",
    )
    outputs = ("table", "wide", "json", "yaml")
    show.add_argument("-o", "--output", choices=outputs, default="table", help="default: table")
    words = "print this host's public key, for its Host resource on the dispatcher; made at first use"
    key = verb("key", _key, words, _KEYS)
    which = key.add_mutually_exclusive_group()
    which.add_argument("--next", action="store_true", help="of the key that is to replace it, made at first use")
    which.add_argument("--discard-next", action="store_true", help="no other key is to replace it")
    words = "isolate unknown guests, and do nothing else; slash32-guard.service does it at boot"
    guard = verb("guard", _guard, words, "slash32-hostd guard      changes nothing where the guard is in place")
    guard.add_argument("--first-install", action="store_true", help="spare the untagged guests that run now")
    return parser


def _run(config: Config, _: argparse.Namespace) -> int:
    from .daemon import Daemon

    journal.begin(config.log_format)
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
    from .reporting.report import show

    return show(config.run_dir, arguments.output)


def _key(config: Config, arguments: argparse.Namespace) -> int:
    from slash32.keys import discard_next, load_or_create_key, next_file

    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = config.key_file
    if arguments.discard_next:
        print("discarded" if discard_next(file) else "there is none")
        return 0
    present = load_or_create_key(file).public  # before a next one there is one
    print(load_or_create_key(next_file(file)).public if arguments.next else present)
    return 0


def _guard(config: Config, arguments: argparse.Namespace) -> int:
    from .dataplane.host import Machine

    machine = Machine(config)
    if machine.follows:
        return 0  # the other packet filter's guard stands, until hostd has loaded all into this one
    if arguments.first_install:
        from .guests.first_install import running_untagged

        machine.kernel.load(exempt=running_untagged(config))
        return 0
    machine.kernel.load()
    return 0


if __name__ == "__main__":
    sys.exit(main())
