# Owns: the command slash32-dispatcher. Touches: arguments, signals, exit codes (0 done, 1 refused or failed, 2 usage).
from __future__ import annotations

import argparse
import gc
import http.client
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from slash32 import journal
from slash32.errors import Slash32Error, visible
from slash32.keys import load_or_create_key
from slash32.usage import Parser

from .api import Api
from .api.tokens import ROLES, make
from .config import PATH, Config, ConfigError, load
from .core import Core
from .loop import Bell, Loop
from .store import stores

log = logging.getLogger("slash32.dispatcher")

_HELP = """\
Tells every hypervisor the policy, addresses and routes that its guests need, and nothing else. Configuration, all of
it optional: /etc/slash32/dispatcher.toml, slash32-dispatcher.toml(5). Operators use slash32(1).
"""
_FIRST_STEPS = """
slash32-dispatcher key                       its public key; hosts need it as dispatcher_key in hostd.toml
slash32 apply -f hosts.yaml                  each hypervisor: kind Host, with its spec.publicKey
slash32-dispatcher status                    who is connected, which claims were refused
systemctl restart slash32-dispatcher         after a change of its configuration; guests notice nothing
"""


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        config = load(given.config)
    except ConfigError as e:
        return _complain(str(e), 2 if given.verb is _run else 1)  # systemd need not try the same file again and again
    try:
        return int(given.verb(config, given))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 1
    except KeyboardInterrupt:
        return _complain("interrupted")
    except (Slash32Error, OSError) as e:
        return _complain(str(e))


def _complain(why: str, code: int = 1) -> int:
    print(f"slash32-dispatcher: {why}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser("slash32-dispatcher", description=_HELP, examples=_FIRST_STEPS)
    where = f"another configuration than {PATH}"
    parser.add_argument("--config", type=Path, metavar="FILE", help=where)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, does, text, example in (
        ("run", _run, "serve hypervisors and operators until SIGTERM", "systemctl restart slash32-dispatcher"),
        ("key", _key, "print this dispatcher's public key, making the key pair at first use", "slash32-dispatcher key"),
        ("token", _token, "make a token for the API on TCP and print it", "slash32-dispatcher token ci --role ro"),
        ("status", _status, "ask the running dispatcher how it is", "slash32-dispatcher status"),
        (
            "store",
            _store,
            "move what is stored to the other kind of store",
            "slash32-dispatcher store migrate --to etcd",
        ),
    ):
        verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", examples=example)
        verb.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=where)
        verb.set_defaults(verb=does)
        if does is _store:
            verb.add_argument("action", choices=["migrate"], help="everything goes, with its epoch and revision")
            verb.add_argument("--to", required=True, choices=["etcd", "sqlite"], help="the store that is to have it")
        if does is _token:
            verb.add_argument("name", metavar="NAME", help="whose it is: the audit log names it")
            verb.add_argument("--role", required=True, choices=ROLES, help="ro may read all but backups")
    return parser


def _token(config: Config, given: argparse.Namespace) -> int:
    if config.api_tokens is None:
        return _complain("api_tokens: is missing in the configuration; name the file that holds the tokens' hashes")
    token = make(config.api_tokens, given.name, given.role)
    print(f"{config.api_tokens}: {given.name} is in it now, role {given.role}; its token, this once:", file=sys.stderr)
    print(token)
    return 0


def _key(config: Config, given: argparse.Namespace) -> int:
    print(load_or_create_key(config.key_file).public)
    return 0


def _run(config: Config, given: argparse.Namespace) -> int:
    journal.begin(config.log_format)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one descriptor per host
    gc.disable()  # all that is loaded stays: the collector would look through it again and again
    keys = load_or_create_key(config.key_file)
    bell = Bell()
    store = stores.opened(config, bell.ring)
    try:
        core = Core(store, time.monotonic, time.time, config.name or socket.gethostname().partition(".")[0].lower())
        loop = Loop(core, config.listen, keys, bell)
        if store.shared:
            core.company.join(config.advertised, keys.public)
        api = Api(loop, config)
        try:
            api.start()
            signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)  # whichever thread the signal finds
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: loop.stop())
            counted = len(core.registry.hosts), len(core.registry.endpoints)
            log.info("listening on %s, revision %d, %d hosts, %d endpoints", loop.address, core.revision, *counted)
            loop.run()
        finally:
            loop.close()
            api.stop()
        log.info("stopped")
    finally:
        store.close()
    return 0


def _store(config: Config, given: argparse.Namespace) -> int:
    """With the dispatchers stopped."""
    to = given.to
    saved = stores.migrate(config, to)
    print(f"revision {saved.revision} with {len(saved.records)} records is in {to} now")
    if config.store != to:
        print(f'next: store = "{to}" in dispatcher.toml, then start slash32-dispatcher; hosts notice nothing')
    return 0


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _status(config: Config, given: argparse.Namespace) -> int:
    try:
        connection = _Unix(config.socket)
        connection.request("GET", "/v1/status")
        status: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise Slash32Error(f"{config.socket}: no answer ({e}); is slash32-dispatcher running?") from None
    hosts = f"{status['inSync']} of {status['hosts']} hosts in sync, {status['connected']} connected"
    print(f"revision {status['revision']}, {hosts}, {status['endpoints']} endpoints, {status['policies']} policies")
    for name, why in status["held"].items():
        print(f"host {name} keeps its own state: {visible(why)}; `slash32 adopt` gives it this dispatcher's")
    for alarm in status["alarms"]:
        print(f"host {alarm['host']}: claim of {alarm['endpoint']} refused: {visible(alarm['message'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
