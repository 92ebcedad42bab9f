# Owns: the command line: names, options, help, and what each command prints. Asking is client.py, looks are show.py.
from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import click
from click.core import ParameterSource
from click.shell_completion import get_completion_class

import slash32
from slash32.errors import Slash32Error, printable, visible

from . import completing, show, text
from .backup import backup, restore
from .client import CallError, Client
from .dispatchers import dispatcher, store
from .files import DOMAINS, RESOURCES, Checked, check, check_text, duplicates, expand, is_xml
from .host import host
from .later import Later
from .place import PORT, SOCKET, place_of
from .schema import schema
from .waiting import Outcome, follow, terminal_progress
from .watch import audit, watch

CODES = "Exit codes: 0 done, 1 refused or failed, 2 usage."
FILE_HELP = "A file, a directory, or - (standard input)."
OUTPUT = click.option(
    "-o", "--output", type=click.Choice(["table", "wide", "yaml", "json"]), default="table", show_default=True
)


def usage(error: click.ClickException) -> str:
    """A wrong command line as one line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "slash32"
    message = visible(" ".join(error.format_message().split())[:300]).rstrip(".")
    return f"{command}: {message}; see {command} --help"


def _nothing(errors: Sequence[str], done: str) -> Failed:
    """All of them or none: one line for each error, and that nothing happened."""
    if len(errors) == 1:
        return Failed([f"{errors[0]}; nothing was {done}"])
    return Failed([*errors, f"{len(errors)} errors: nothing was {done}"])


class Failed(Slash32Error):
    """A command that did its work and found something wrong: one line each on stderr, exit code 1."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))


def with_files(command: Callable[..., None]) -> Callable[..., None]:
    """`-f FILE` as often as wanted, and what a shell makes of `-f *.yaml`; the command gets `names`."""

    @click.option("-f", "--file", "files", multiple=True, metavar="FILE", help=FILE_HELP, type=click.Path())
    @click.argument("more", nargs=-1, metavar="[FILE]...", type=click.Path())
    @functools.wraps(command)
    def wrapped(*args: object, files: tuple[str, ...], more: tuple[str, ...], **options: object) -> None:
        if not files:
            raise click.UsageError("name the files with -f FILE (- is standard input)")
        command(*args, names=[*files, *more], **options)

    return wrapped


WAIT = click.option("--wait", is_flag=True, help="Return when every host has it in its kernel.")
TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(0, 86400), metavar="SECONDS", help="For --wait: give up after that. Default: 60."
)
KIND = click.argument("kind", shell_complete=completing.kinds)


@click.group(
    epilog=CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--socket", envvar="SLASH32_SOCKET", metavar="PATH", help=f"The dispatcher's socket. [default: {SOCKET}]")
@click.option(
    "--server",
    envvar="SLASH32_SERVER",
    metavar="https://HOST:PORT",
    help=f"In place of --socket: a dispatcher elsewhere. [default port: {PORT}]",
)
@click.option("--token-file", envvar="SLASH32_TOKEN_FILE", metavar="FILE", help="The token for --server; mode 0600.")
@click.option("--ca", envvar="SLASH32_CA", metavar="FILE", help="Who signed --server's certificate, in PEM.")
@click.version_option(slash32.__version__, message="slash32 %(version)s")
@click.pass_context
def cli(context: click.Context, **options: str | None) -> None:
    """Policy for the guests of a fleet of libvirt hosts.

    \b
    A first session:
      slash32 status                               is everything connected and in sync?
      slash32 get endpoints                        the guests that are known, with their labels
      slash32 validate -f policy.yaml              check a file, offline
      slash32 diff -f policy.yaml                  what would change, and who could speak to whom then?
      slash32 apply -f policy.yaml --wait          change it; returns when it is in every kernel
      slash32 describe endpoint web1               which policies apply to a guest
      slash32 host add h1 --key 'PUBLIC-KEY'       let a hypervisor connect
      slash32 get gnp -o yaml > policies.yaml      all policies, ready to be applied again

    Kinds: {kinds}.
    SLASH32_SOCKET, SLASH32_SERVER, SLASH32_TOKEN_FILE and SLASH32_CA in the environment are like the options.
    """
    typed = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    context.obj = Client(lambda: place_of(options, typed))
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Create or change resources: all of them, or none.")
@with_files
@WAIT
@TIMEOUT
@click.option("--dry-run", is_flag=True, help="Say what would change; change nothing.")
@click.pass_obj
def apply(client: Client, names: list[str], wait: bool, timeout: float | None, dry_run: bool) -> None:
    """Create or change resources from YAML or JSON: all of them, or none.

    \b
    Examples:
      slash32 apply -f policy.yaml --wait
      slash32 apply -f policies/ --dry-run
      cat policy.yaml | slash32 apply -f -

    Of a directory, its .yaml, .yml and .json files. One bad document of fifty changes nothing, and every bad one is
    listed. With --wait, exit code 1 names the hosts that failed or did not answer in time; the change itself stands.
    """
    if wait and dry_run:
        raise click.UsageError("--wait has nothing to wait for with --dry-run")
    seconds = _seconds(wait, timeout)
    found = check(names)
    if found.errors:
        raise _nothing(found.errors, "applied")
    documents = [dict(document.value) for document in found.documents]
    try:
        answer = client.post("apply", body={"documents": documents}, query=f"dry_run={int(dry_run)}")
    except CallError as error:
        raise _nothing(error.lines, "applied") if error.status == 400 else error from None
    for change in answer.get("changes", []):
        note = " (dry run)" if dry_run else ""
        click.echo(printable(f"{change['kind']} {change['name']} {change['change']}{note}"))
    if wait:
        _follow(client, int(answer["revision"]), seconds)
    elif not dry_run:
        click.echo(f"revision {answer['revision']}")


def _seconds(wait: bool, timeout: float | None) -> float:
    if timeout is not None and (not wait or math.isnan(timeout)):
        raise click.UsageError("--timeout is a number of seconds for --wait")
    return 60.0 if timeout is None else timeout


def _follow(client: Client, revision: int, timeout: float) -> None:
    progress = terminal_progress()
    try:
        result: Outcome = follow(client, revision, timeout, progress)
    except KeyboardInterrupt:
        raise Failed([f"interrupted; revision {revision} stands (slash32 status shows which hosts have it)"]) from None
    finally:
        if progress:
            progress("")
    if not result.ok:
        raise Failed(result.lines)
    click.echo(result.lines[0])


@cli.command(short_help="List resources, or one of them.")
@KIND
@click.argument("name", required=False, shell_complete=completing.names)
@OUTPUT
@click.pass_obj
def get(client: Client, kind: str, name: str | None, output: str) -> None:
    """List resources, or one of them.

    \b
    Examples:
      slash32 get endpoints
      slash32 get hosts -o wide
      slash32 get gnp allow-web -o yaml
      slash32 get dispatchers

    KIND: {kinds}, and dispatchers. An endpoint's NAME is its domain,
    uuid, MAC or address. Yaml and json of resources can be applied again; hosts have a status there, which is not.
    """
    click.echo(show.get(client, show.kind_word(kind, listed=True), name, output))


@cli.command(short_help="Everything about one resource.")
@KIND
@click.argument("name", shell_complete=completing.names)
@click.pass_obj
def describe(client: Client, kind: str, name: str) -> None:
    """Everything about one resource: for a guest, which policies apply; for a policy, to which guests.

    \b
    Examples:
      slash32 describe endpoint web1
      slash32 describe gnp allow-web
      slash32 describe host h1
    """
    click.echo(show.describe(client, show.kind_word(kind), name))


@cli.command(short_help="Delete resources.")
@click.argument("target", nargs=-1, metavar="[KIND NAME | FILE...]", shell_complete=completing.target)
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Delete what these name.", type=click.Path())
@WAIT
@TIMEOUT
@click.pass_obj
def delete(client: Client, target: tuple[str, ...], files: tuple[str, ...], wait: bool, timeout: float | None) -> None:
    """Delete a resource, or all that the given files name.

    \b
    Examples:
      slash32 delete gnp allow-web
      slash32 delete -f policy.yaml --wait

    Endpoints come from the hosts' libvirt and cannot be deleted here.
    """
    seconds = _seconds(wait, timeout)
    if files:
        found = check([*files, *target])
        if found.errors:
            raise _nothing(found.errors, "deleted")
        wanted = [(str(d.value["kind"]), r.name) for d, r in zip(found.documents, found.resources, strict=True)]
    elif len(target) == 2:
        wanted = [(show.kind_word(target[0]), target[1])]
    else:
        raise click.UsageError("give KIND and NAME, or -f FILE")
    if wanted[0][0] == "Endpoint":
        raise click.UsageError("an endpoint goes when its guest stops or loses its tag (virsh metadata)")
    revision = _delete(client, wanted)
    if wait:
        _follow(client, revision, seconds)


def _delete(client: Client, wanted: Sequence[tuple[str, str]]) -> int:
    """The last revision."""
    errors: list[str] = []
    revision = 0
    for kind, name in sorted(wanted, key=lambda one: one[0] == "Tier"):  # after the policies that name it
        try:
            answer = client.delete("resources", kind, name)
        except CallError as error:
            if not error.status:
                raise
            errors += error.lines
        else:
            revision = show.revision_of(answer)
            click.echo(printable(f"{kind} {name} deleted (revision {revision})"))
    if errors:
        raise Failed(errors)
    return revision


@cli.command(short_help="Is everything connected and in sync?")
@OUTPUT
@click.pass_obj
def status(client: Client, output: str) -> None:
    """Is the dispatcher well, and are the hosts connected and in sync?

    \b
    Examples:
      slash32 status
      slash32 status -o json | jq '.hosts[] | select(.in_sync | not) | .name'

    Exit code 0 says that the dispatcher answered; what is wrong with hosts is in the answer.
    """
    click.echo(show.status(client, output))


@cli.command(short_help="Check files, offline.")
@with_files
def validate(names: list[str]) -> None:
    """Check files without any dispatcher: resources (YAML, JSON) and tagged domains (libvirt XML).

    \b
    Examples:
      slash32 validate -f policy.yaml
      slash32 validate -f web1.xml
      virsh dumpxml web1 | slash32 validate -f -

    Of a directory, its .yaml, .yml, .json and .xml files.
    """
    found = Checked()
    for name, content in expand(names, RESOURCES + DOMAINS):
        if isinstance(content, str):
            found.errors.append(f"{name}: {content}")
        elif is_xml(content):
            found.errors += _validate_domain(name, content)
        else:
            documents, errors = len(found.documents), len(found.errors)
            check_text(name, content, found)
            if len(found.errors) == errors:
                click.echo(f"{name}: {text.count(len(found.documents) - documents, 'document')}, valid")
    found.errors += duplicates(found)
    if found.errors:
        raise Failed(found.errors)


def _validate_domain(name: str, xml: bytes) -> list[str]:
    from slash32.tag import TagError, parse_domain  # lxml only where XML is read

    start = re.search(rb"<domain\b[^>]*>", xml[:4096])
    driver = "lxc" if start and re.search(rb"""type\s*=\s*["']lxc["']""", start[0]) else "qemu"
    if start and b"<uuid>" not in xml:  # written by hand: libvirt gives it one at define
        uuid = b"<uuid>00000000-0000-0000-0000-000000000000</uuid>"
        xml = xml[: start.end()] + uuid + xml[start.end() :]
    try:
        domain = parse_domain(xml, driver)
    except TagError as error:
        return [f"{name}: {printable(str(error))}"]
    tagged = text.count(len(domain.endpoints), "endpoint") if domain.tagged else "no slash32 tag: it is left alone"
    click.echo(f"{name}: domain {printable(domain.name)}: {tagged}, valid")
    return []


@cli.command(short_help="Let hosts take this dispatcher's state.")
@click.argument("hosts", nargs=-1, metavar="[HOST]...", shell_complete=completing.names)
@click.option("--all", "everyone", is_flag=True, help="Every host that waits.")
@click.pass_obj
def adopt(client: Client, hosts: tuple[str, ...], everyone: bool) -> None:
    """Let hosts that keep another dispatcher's state, or a newer one, take this dispatcher's.

    \b
    Examples:
      slash32 status                 which hosts are held?
      slash32 adopt h1 h2
      slash32 adopt --all

    A host never gives up what it has because a dispatcher comes up empty, restored from a backup, or in place of
    another: it holds its state until an operator has looked and says so here.
    """
    if bool(hosts) is everyone:
        raise click.UsageError("name the hosts, or give --all")
    answer = client.post("adopt", body={"all": True} if everyone else {"hosts": list(hosts)})
    adopted = answer.get("adopted", list(hosts))
    listed = [str(name) for name in adopted] if isinstance(adopted, list) else []
    click.echo(f"adopted: {text.names(listed, 1000) or 'no host waits'}")


@cli.command(short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's completion script. The package installs bash's.

    \b
    Examples:
      eval "$(slash32 completion bash)"
      slash32 completion zsh > ~/.zfunc/_slash32
    """
    found = get_completion_class(shell)
    if found is None:
        raise Slash32Error(f"no completion for {shell}")
    script = found(cli, {}, "slash32", "_SLASH32_COMPLETE")
    click.echo(script.source_template % script.source_vars())  # .source() would run the shell to learn its version


def _taught(command: click.Command) -> None:
    """Every help ends with the exit codes, and knows the kinds."""
    if isinstance(command, Later):
        command.taught = _taught  # once it is there
    command.epilog = CODES
    command.help = (command.help or "").replace("{kinds}", show.KIND_HELP)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _taught(inner)


diff = Later("diff", "What would a change do, and to whom?")
explain = Later("explain", "May SRC speak to DST, and which rule says so?")
for _command in (audit, backup, diff, dispatcher, explain, host, restore, schema, store, watch):
    cli.add_command(_command)
_taught(cli)
