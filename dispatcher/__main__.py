# Owns: the command slash32-dispatcher. Touches: arguments, signals, exit codes (0 done, 1 refused or failed, 2 usage).
from __future__ import annotations

import argparse
import http.client
import json
import logging
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from slash32.errors import Slash32Error
from slash32.keys import load_or_create_key

from .api import Api
from .config import Config, load
from .core import Core
from .loop import Loop
from .store import Store

log = logging.getLogger("slash32.dispatcher")

_TEACH = """\
first steps:
  slash32-dispatcher key                 print the public key; hosts need it as `dispatcher_key` in hostd.toml
  systemctl enable --now slash32-dispatcher
  slash32 apply -f hosts.yaml            each hypervisor: kind Host with its spec.publicKey
  slash32-dispatcher status              who is connected, which claims were refused

/etc/slash32/dispatcher.toml, all optional; slash32-dispatcher.toml(5):
  listen = "tcp://0.0.0.0:5532"          where hypervisors connect (CURVE only)
  database = "/var/lib/slash32-dispatcher/slash32.db"
  socket = "/run/slash32-dispatcher/api.sock"         the operators' API
  key_file = "/var/lib/slash32-dispatcher/curve.key"  made at first use; keep it with the backup of the database
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="slash32-dispatcher",
        description="Tells every hypervisor the policy, addresses and routes that its guests need, and nothing else.",
        epilog=_TEACH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "serve hypervisors and operators until SIGTERM"),
        ("key", "print this dispatcher's public key, making the key pair at first use"),
        ("status", "ask the running dispatcher how it is"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", type=Path, help="default: /etc/slash32/dispatcher.toml, if it exists")
    given = parser.parse_args(arguments)
    try:
        config = load(given.config)
        return {"run": _run, "key": _key, "status": _status}[given.command](config)
    except Slash32Error as e:
        print(f"slash32-dispatcher: {e}", file=sys.stderr)
        return 1


def _key(config: Config) -> int:
    print(load_or_create_key(config.key_file).public)
    return 0


def _run(config: Config) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one descriptor per host
    keys = load_or_create_key(config.key_file)
    store = Store(config.database)
    try:
        core = Core(store, time.monotonic)
        loop = Loop(core, config.listen, keys)
        api = Api(loop, config.socket)
        try:
            api.start()
            signal.set_wakeup_fd(loop.wake_fd, warn_on_full_buffer=False)  # whichever thread the signal finds
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


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _status(config: Config) -> int:
    try:
        connection = _Unix(config.socket)
        connection.request("GET", "/v1/status")
        status: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise Slash32Error(f"{config.socket}: no answer ({e}); is slash32-dispatcher running?") from None
    hosts = f"{status['inSync']} of {status['hosts']} hosts in sync, {status['connected']} connected"
    print(f"revision {status['revision']}, {hosts}, {status['endpoints']} endpoints, {status['policies']} policies")
    for name, why in status["held"].items():
        print(f"host {name} keeps its own state: {why}; `slash32 adopt` gives it this dispatcher's")
    for alarm in status["alarms"]:
        print(f"host {alarm['host']}: claim of {alarm['endpoint']} refused: {alarm['message']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
