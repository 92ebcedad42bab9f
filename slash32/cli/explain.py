# Owns: the command `slash32 explain`: who may say what to whom, and which rule says so. Reading worlds is fleet.py,
# slash32.worldfile, judging slash32.verdict, asking kernels witnesses.py; how an answer looks is judgement.py.
from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from slash32.documents import Document, load_yaml
from slash32.errors import Slash32Error, quoted
from slash32.net import Address, parse_address, version
from slash32.policy import Icmp
from slash32.rules import PROTOCOLS, WITH_PORTS
from slash32.verdict import Judge, Packet, World
from slash32.worldfile import read_world

from . import fleet
from .client import Client
from .files import expand, is_xml
from .judgement import Answer, End, as_data, as_text
from .witnesses import Testimony, testimony

EPHEMERAL = 50000  # a source port as clients have one
DENIED = 3  # exit code
_BY_NAME = {name.lower(): number for name, number in PROTOCOLS.items()}
_ECHO = {1: Icmp(8, 0), 58: Icmp(128, 0)}
_FAMILY = {1: 4, 58: 6}
_TRAFFIC = re.compile(r"([A-Za-z0-9-]{1,32})(?:/([0-9]{1,9}))?(?:/([0-9]{1,9}))?", re.ASCII)


class Traffic(NamedTuple):
    protocol: int
    port: int | None = None
    icmp: Icmp | None = None


class _TrafficType(click.ParamType):
    name = "PROTO/PORT"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Traffic:
        found = value if isinstance(value, Traffic) else parse_traffic(str(value))
        if isinstance(found, str):
            self.fail(found, param, ctx)
        return found


def parse_traffic(text: str) -> Traffic | str:
    """tcp/80, udp/53, 132/80, icmp, icmp/8, icmpv6/128/0, 47; or what is wrong with it."""
    match = _TRAFFIC.fullmatch(text)
    protocol = _protocol(match[1]) if match else None
    if match is None or protocol is None:
        return f"{quoted(text, 40)} is not PROTO/PORT, as in tcp/5432, udp/53, icmp, icmp/8, 132/80 or 47"
    first, second = (int(number) if number else None for number in match.groups()[1:])
    if protocol in _ECHO:
        if max(first or 0, second or 0) > 255:
            return f"{quoted(text, 40)}: types and codes of ICMP are 0 to 255"
        return Traffic(protocol, None, _ECHO[protocol] if first is None else Icmp(first, second or 0))
    if second is not None:
        return f"{quoted(text, 40)}: only ICMP has a type and a code"
    if protocol not in WITH_PORTS:
        return Traffic(protocol) if first is None else f"{quoted(text, 40)}: protocol {protocol} has no ports"
    if first is None or not 1 <= first <= 65535:
        return f"{quoted(text, 40)}: give a port from 1 to 65535, as in {match[1]}/80"
    return Traffic(protocol, first)


def _protocol(word: str) -> int | None:
    number = int(word) if word.isdigit() and len(word) <= 3 else _BY_NAME.get(word.lower())
    return number if number is not None and 1 <= number <= 255 else None


@click.command(short_help="May SRC speak to DST, and which rule says so?")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.argument("traffic", metavar="PROTO/PORT", type=_TrafficType())
@click.option("--offline", is_flag=True, help="Judge by files alone, without a dispatcher.")
@click.option(
    "-f", "--file", "files", multiple=True, metavar="FILE", type=click.Path(),
    help="With --offline: Endpoints and policies. A file, a directory, or - (standard input).",
)  # fmt: skip
@click.option("--family", type=click.Choice(["4", "6"]), help="The IP version. Default: those that both ends have.")
@click.option("--source-port", type=click.IntRange(1, 65535), default=EPHEMERAL, show_default=True)
@click.option("-v", "--verbose", is_flag=True, help="What else was met: Log, Pass, staged policies.")
@click.option("-o", "--output", type=click.Choice(["table", "yaml", "json"]), default="table", show_default=True)
@click.pass_context
def explain(context: click.Context, source: str, destination: str, traffic: Traffic, **options: object) -> None:
    """May SRC open a connection to DST, and which tier, policy and rule say so at either end?

    The dispatcher's state is judged, and the kernels of both ends' hosts are asked what they would do; where they
    differ, it says so loudly. With --offline, files are judged, and nobody is asked.

    \b
    Examples:
      slash32 explain web1 db1 tcp/5432
      slash32 explain 192.0.2.7 web1 icmp
      slash32 explain --offline -f world.yaml web1 db1 tcp/5432
      slash32 explain --offline -f endpoints.yaml -f policies/ web1 db1 udp/53 -o json

    SRC and DST are names of guests (or HostEndpoints), or addresses. PROTO/PORT: tcp/80, udp/53, sctp/80, 132/80;
    icmp or icmpv6 (a ping), icmp/3/1 (type and code); 47 (a protocol without ports). Rules count from 0.

    Exit code 0: allowed, 3: denied, 1: a kernel differs from the model. Where both ends have both IP versions, IPv4
    gives the exit code.
    """
    files, offline = options["files"], bool(options["offline"])
    assert isinstance(files, tuple)
    if offline != bool(files):
        raise click.UsageError("give --offline and the world with -f FILE, or neither to ask the dispatcher")
    client: Client = context.obj
    world = read_world(documents_of(files)) if offline else fleet.read(client).world()
    port, family = options["source_port"], options["family"]
    assert isinstance(port, int)
    ends = _end(world, source), _end(world, destination)
    answers = answers_of(world, ends, traffic, port, int(str(family)) if family else None)
    heard = [] if offline else [testimony(client, answer) for answer in answers]
    _show(answers, heard, bool(options["verbose"]), str(options["output"]))
    differs = [line for each in heard for line in each.differs]
    if differs:
        raise Slash32Error("\n".join(f"KERNEL AND MODEL DIFFER: {line}; run `slash32 status`" for line in differs))
    context.exit(0 if answers[0].verdict.allowed else DENIED)


def _show(answers: Sequence[Answer], heard: Sequence[Testimony], verbose: bool, output: str) -> None:
    """Kernels are asked of each IP version, and shown of the first."""
    if output == "table":
        click.echo("\n".join([as_text(answers, verbose), *(line for each in heard[:1] for line in each.as_lines())]))
    else:
        from . import show

        click.echo(show.dump(as_data(answers, verbose) | (heard[0].as_data() if heard else {}), output))
    sys.stdout.flush()
    for line in dict.fromkeys(line for each in heard for line in each.missing):
        click.echo(f"slash32 explain: {line}", err=True)


def documents_of(names: Sequence[str]) -> list[Document]:
    found: list[Document] = []
    for name, content in expand(names):
        if isinstance(content, str):
            raise Slash32Error(f"{name}: {content}")
        if is_xml(content):
            raise Slash32Error(f"{name}: is XML: write the guest as an Endpoint")
        try:
            documents = load_yaml(content.decode("utf-8-sig"), name)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise Slash32Error(f"{name}:{line}: not UTF-8 text: {quoted(error.reason)}") from None
        if not documents:
            raise Slash32Error(f"{name}: holds no document; give Endpoints and policies")
        found += documents
    return found


def _end(world: World, text: str) -> End:
    """An Endpoint (of a guest with several, name/MAC), a HostEndpoint, or an address."""
    guests = [e for e in world.endpoints if text in (e.domain, f"{e.domain}/{e.key.mac}")]
    if len(guests) > 1:
        named = f"{guests[0].domain}/{guests[0].key.mac}"
        raise Slash32Error(
            f"{quoted(text, 64)} has {len(guests)} interfaces: name one as {quoted(named)}, or an address"
        )
    for guest in guests:
        return End(text, _by_family(text, guest.all_addresses()), world.places.get(guest.key, ""))
    for host in world.host_endpoints:
        if host.name == text:
            return End(text, _by_family(text, host.addresses), host.node)
    try:
        address = parse_address(text)
    except ValueError:
        known = [e.domain for e in world.endpoints] + [h.name for h in world.host_endpoints]
        near = difflib.get_close_matches(text[:64], known[:2000], 1)
        hint = f"did you mean {quoted(near[0], 64)}?" if near else "give a name from the files, or an address"
        raise Slash32Error(f"{quoted(text, 64)} is neither an Endpoint there nor an IP address; {hint}") from None
    return End(text, {version(address): address})


def _by_family(name: str, addresses: Sequence[Address]) -> dict[int, Address]:
    if not addresses:
        raise Slash32Error(f"{quoted(name, 64)} has no address in the file: give it one, or ask with an address")
    return {version(address): address for address in reversed(addresses)}  # the first of each


def answers_of(
    world: World, ends: tuple[End, End], traffic: Traffic, source_port: int, family: int | None
) -> list[Answer]:
    """One for each IP version that both ends have and the protocol is of, IPv4 first; at least one."""
    source, destination = ends
    judge = Judge(world)
    answers = []
    for asked in _families(ends, traffic, family):
        packet = Packet(
            source.addresses[asked],
            destination.addresses[asked],
            traffic.protocol,
            source_port if traffic.protocol in WITH_PORTS else None,
            traffic.port,
            traffic.icmp,
        )
        answers.append(Answer(source, destination, packet, *judge.walk(packet)))
    return answers


def _families(ends: tuple[End, End], traffic: Traffic, family: int | None) -> list[int]:
    common = [each for each in (4, 6) if all(each in end.addresses for end in ends)]
    names = " and ".join(quoted(end.name, 64) for end in ends)
    if not common or (family and family not in common):
        raise Slash32Error(f"{names} do not both have an IP{f'v{family}' if family else ''} address to meet by")
    common = [family] if family else common
    of = _FAMILY.get(traffic.protocol)
    if of is None:
        return common
    if of not in common:
        this, other = ("ICMP", "icmpv6") if of == 4 else ("ICMPv6", "icmp")
        raise Slash32Error(f"{names} meet by IPv{common[0]}, and {this} is of IPv{of}: ask for {other}")
    return [of]
