# Owns: `slash32 host`: hypervisors come, go, change their keys, and are fenced. The dispatcher decides.
# Touches: the dispatcher, by the client that it is given.
from __future__ import annotations

from collections.abc import Sequence

import click

from slash32.errors import ResourceError, Slash32Error, printable, quoted
from slash32.resources import API_VERSION, decode

from . import text
from .asking import YES, confirm
from .client import Client, Json
from .completing import names

NAME = click.argument("name", shell_complete=names)
KEY = {"required": True, "metavar": "PUBLIC-KEY"}
Repeated = tuple[str, ...]


@click.group(short_help="Add, remove, re-key or fence a hypervisor.")
def host() -> None:
    """Hypervisors: which of them may connect, with which key, and what their guests may claim.

    \b
    Examples:
      slash32 host add h1 --key "$(ssh h1 slash32-hostd key)" --net 10.65.1.0/24
      slash32 get hosts                            who is connected and in sync?
      slash32 host fence h1 --reason 'disk dies'   its guests lose their network, at once
      slash32 host remove h1

    A host makes its key pair itself; the secret half never leaves it. A host that is not added here, or whose key is
    another, is not let in.
    """


@host.command(short_help="Let a new host connect.")
@NAME
@click.option("--key", help="What `slash32-hostd key` prints on the host.", **KEY)
@click.option("--net", "nets", multiple=True, metavar="CIDR", help="Its guests may claim addresses of this only.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="For KEY, its guests may have this only.")
@click.option("--address", "addresses", multiple=True, metavar="IP", help="Where other hosts reach its guests.")
@click.pass_obj
def add(client: Client, name: str, key: str, **bounds: Repeated) -> None:
    """Let a new hypervisor connect. A name that is there already is refused.

    \b
    The whole procedure, as examples:
      h1#  apt install slash32-hostd
      h1#  slash32-hostd key                          prints the public half of the key that h1 made
      ops# slash32-dispatcher key                     prints the dispatcher's
      h1#  editor /etc/slash32/hostd.toml             dispatcher, dispatcher_key: slash32-hostd.toml(5)
      ops# slash32 host add h1 --key 'PUBLIC-KEY' --net 10.65.1.0/24 --label env=prod --label env=test
      h1#  systemctl restart slash32-hostd
      ops# slash32 get hosts h1                       connected?

    NAME is what the host calls itself: host in its hostd.toml, by default its host name up to the first dot. Without
    --net its guests may claim any address, without --label for a key any value of it. --address is seldom needed: a
    host says itself where it is reached. Write keys in 'quotes': they are full of what shells obey.
    """
    spec: Json = {"publicKey": key, **{field: list(given) for field, given in bounds.items() if given}}
    if bounds["labels"]:
        spec["labels"] = _labels(bounds["labels"])
    _check(name, spec)
    answer = client.post("hosts", body={"name": name, **spec})
    click.echo(printable(f"Host {name} added (revision {answer.get('revision')})"))
    click.echo("next, there: dispatcher and dispatcher_key in hostd.toml, then: systemctl restart slash32-hostd")
    click.echo(f"connected? slash32 get hosts {printable(name)}")


def _labels(given: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--label {quoted(each, 80)} is not KEY=VALUE")
        found.setdefault(key, []).append(value)
    return found


def _check(name: str, spec: Json) -> None:
    """What the dispatcher would refuse; a name for an object is a word, and never a path."""
    try:
        decode({"apiVersion": API_VERSION, "kind": "Host", "metadata": {"name": name}, "spec": spec})
    except ResourceError as error:
        raise Slash32Error(f"{error}; nothing was changed") from None


@host.command(short_help="Let a host in no longer; its endpoints go.")
@NAME
@YES
@click.pass_obj
def remove(client: Client, name: str, yes: bool) -> None:
    """Let a hypervisor in no longer: it is cut off at once, and its endpoints go.

    \b
    The whole procedure, as examples:
      ops# slash32 get endpoints                 move or stop the guests of h1 first
      ops# slash32 host remove h1
      h1#  apt purge slash32-hostd               routes and firewall of ours leave its kernel

    Every other host forgets its guests: their addresses are free, and no policy lets them in any more. What the host's
    own kernel has stays until slash32-hostd is purged there. It asks on a terminal; elsewhere give --yes.
    """
    endpoints = text.count(_endpoints(client, name), "endpoint")
    confirm(f"Remove host {name}, and its {endpoints}?", yes, f"Host {name}: stays")
    answer = client.delete("resources", "Host", name)
    click.echo(printable(f"Host {name} removed, and its {endpoints} (revision {answer.get('revision')})"))


def _endpoints(client: Client, name: str) -> int:
    """How many it has. Raises Slash32Error where there is no such host."""
    for item in client.items("hosts"):
        if item.get("name") == name:
            number = item.get("endpoints")
            return number if isinstance(number, int) else 0
    raise Slash32Error(f"Host {quoted(name, 64)}: there is none; `slash32 get hosts` lists them")


@host.command(short_help="Give a host a new key; it stays connected.")
@NAME
@click.option("--key", help="What `slash32-hostd key --next` prints on the host.", **KEY)
@click.pass_obj
def rotate(client: Client, name: str, key: str) -> None:
    """Give a hypervisor a new key, without a moment in which it has none.

    \b
    The whole procedure, as examples:
      h1#  slash32-hostd key --next              makes the next key pair, prints its public half
      ops# slash32 host rotate h1 --key 'PUBLIC-KEY'
      ops# slash32 get hosts h1 -o wide          NEXT-KEY is empty again once it has come back with it

    Both keys are good until the host has connected with the new one; from then on the old one is refused. Its guests
    notice nothing. A key that was stolen is better removed at once: `slash32 host fence`, then a new key.
    """
    _check(name, {"publicKey": key})
    answer = client.post("hosts", name, "rotate", body={"publicKey": key})
    click.echo(printable(f"Host {name} may come with its new key (revision {answer.get('revision')})"))
    click.echo(f"has it? slash32 get hosts {printable(name)} -o wide: NEXT-KEY is empty then")


@host.command(short_help="Take a host's guests off the network, at once.")
@NAME
@click.option("--reason", metavar="TEXT", default="", help="Shown wherever the fence is.")
@YES
@click.pass_obj
def fence(client: Client, name: str, reason: str, yes: bool) -> None:
    """Take a hypervisor's guests off the network: their addresses are free for other hosts, what it claims is refused.

    \b
    The whole procedure for a host that is dead, or no longer trusted, as examples:
      ops# slash32 host fence h1 --reason 'does not answer, guests restarted on h2'
      ops# slash32 get hosts h1                  SYNC says fenced
      h2#  virsh start web1                      its address is free there now
      ops# slash32 host unfence h1               once it is well

    It may still connect, and then closes its guests' interfaces itself; every other host forgets them at once, whether
    it can be reached or not. It asks on a terminal; elsewhere give --yes.
    """
    endpoints = text.count(_endpoints(client, name), "endpoint")
    confirm(f"Fence host {name}? Its {endpoints} lose their network at once.", yes, f"Host {name}: not fenced")
    answer = client.post("hosts", name, "fence", body={"reason": reason} if reason else {})
    about = f"(revision {answer.get('revision')}); back with: slash32 host unfence {name}"
    click.echo(printable(f"Host {name} fenced, and its {endpoints} released {about}"))


@host.command(short_help="Let a fenced host's guests back.")
@NAME
@click.pass_obj
def unfence(client: Client, name: str) -> None:
    """Let the guests of a fenced hypervisor back, as far as nobody else has their addresses now.

    \b
    Examples:
      slash32 host unfence h1
      slash32 status                             claims that were refused, and why

    A host that is connected claims what runs there at once.
    """
    answer = client.post("hosts", name, "unfence", body={})
    click.echo(printable(f"Host {name}: fenced no longer (revision {answer.get('revision')})"))
