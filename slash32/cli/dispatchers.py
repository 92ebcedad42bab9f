# Owns: the commands about dispatchers themselves: `slash32 dispatcher`, `slash32 store`.
# Touches: the dispatcher, by the client that it is given; becomes slash32-dispatcher for what works on its files.
from __future__ import annotations

import os
import shutil

import click

from slash32.errors import Slash32Error, printable

from .client import Client
from .completing import dispatchers

DAEMON = "slash32-dispatcher"


@click.group(short_help="Forget a dispatcher that is gone for good.")
def dispatcher() -> None:
    """The dispatchers that share one store. Each enters itself when it starts; one that is gone for good is removed.

    \b
    Examples:
      slash32 get dispatchers
      slash32 dispatcher remove d3
    """


@dispatcher.command(short_help="Forget a dispatcher that is gone for good.")
@click.argument("name", shell_complete=dispatchers)
@click.pass_obj
def remove(client: Client, name: str) -> None:
    """Forget a dispatcher that is gone for good: the others look for it no longer.

    \b
    The whole procedure, as examples:
      d3#  systemctl disable --now slash32-dispatcher
      ops# slash32 get dispatchers
      ops# slash32 dispatcher remove d3

    One that still runs sends its hosts to the others, says so in /health, and enters itself again at its next start,
    with its name and key or with others. Take it out of the hosts' hostd.toml, too.
    """
    answer = client.delete("dispatchers", name)
    click.echo(printable(f"dispatcher {name} removed (revision {answer.get('revision')})"))


@click.group(short_help="Where the dispatcher keeps its state.")
def store() -> None:
    """Where the dispatcher keeps its state: SQLite, for one dispatcher; etcd, for several.

    \b
    Examples:
      slash32 store migrate --to etcd
    """


@store.command(short_help="Move the state from SQLite to etcd, or back.")
@click.option("--to", "target", type=click.Choice(["etcd", "sqlite"]), required=True, help="Where it goes.")
@click.option("--config", metavar="FILE", help="Another configuration than /etc/slash32/dispatcher.toml.")
def migrate(target: str, config: str | None) -> None:
    """Move the dispatcher's state from SQLite to etcd, or back. Guests and hosts notice nothing.

    \b
    The whole procedure on the dispatcher's machine, as examples:
      d1# editor /etc/slash32/dispatcher.toml       etcd = ["http://10.0.0.1:2379", ...]: slash32-dispatcher.toml(5)
      d1# systemctl stop slash32-dispatcher
      d1# slash32 store migrate --to etcd
      d1# editor /etc/slash32/dispatcher.toml       store = "etcd"
      d1# systemctl start slash32-dispatcher

    It is the same as `slash32-dispatcher store migrate`: epoch and revision stay, so no host has to be adopted. A
    target that holds something is refused. What it leaves is kept, but SQLite's file is marked: no dispatcher takes it
    again by mistake.
    """
    program = shutil.which(DAEMON, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")  # not in a user's PATH
    if program is None:
        raise Slash32Error(f"{DAEMON}: is not installed here: run this on the dispatcher's machine")
    more = [] if config is None else ["--config", config]
    try:
        os.execv(program, [DAEMON, "store", "migrate", "--to", target, *more])
    except (OSError, ValueError) as error:
        raise Slash32Error(f"{DAEMON}: cannot be run ({printable(str(error))})") from None
