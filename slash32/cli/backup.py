# Owns: the commands `slash32 backup` and `slash32 restore`, and what a backup looks like.
# Touches: the dispatcher, by the client that it is given; the one file that it is given, and its directory.
from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click

from slash32.errors import Slash32Error, printable, quoted

from . import text
from .asking import YES, confirm
from .client import MAX_ANSWER, CallError, Client

VERSION = 1
PATIENCE = 300.0  # seconds; all there is, written at once


class Backup(NamedTuple):
    """What is told of one."""

    revision: int
    made: str
    records: int


@click.command(short_help="Save all that the dispatcher has.")
@click.argument("file", type=click.Path())
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.pass_obj
def backup(client: Client, file: str, force: bool) -> None:
    """Save all that the dispatcher has, as of one revision, while it works: resources, endpoints, hosts, audit log.

    \b
    Examples:
      slash32 backup /var/backups/slash32.json
      slash32 backup - | gzip > slash32.json.gz

    FILE is made whole or not at all, readable by its owner only; - is standard output. Secret keys are not in it: save
    the dispatcher's key_file once, too. `slash32 restore` takes it.
    """
    target = None if file == "-" else Path(file)
    if target is not None:
        _may_write(target, force)
    content = client.content("backup", wait=PATIENCE)
    saved = check(content, str(client.place))
    if target is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        try:
            _write(target, content, force)
        except OSError as error:
            why = error.strerror or printable(str(error))
            raise Slash32Error(f"{_short(file)}: {why}; nothing was saved") from None
        click.echo(f"{_short(file)}: revision {saved.revision}, {text.count(saved.records, 'record')}")


def _may_write(path: Path, force: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or printable(str(error))
        raise Slash32Error(f"{_short(path)}: {why}; nothing was saved") from None
    if not stat.S_ISREG(mode):
        raise Slash32Error(f"{_short(path)}: is there, and is not a file; nothing was saved")
    if not force:
        raise Slash32Error(f"{_short(path)}: is there already; give another name, or --force")


def _write(path: Path, content: bytes, force: bool) -> None:
    """Beside it first: whoever looks sees the old file, or all of the new one, also after a power cut."""
    fresh = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        if force:
            fresh.replace(path)
        else:
            _new_name(fresh, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _new_name(fresh: Path, path: Path) -> None:
    """Raises FileExistsError where somebody was faster."""
    try:
        path.hardlink_to(fresh)
    except PermissionError:  # a file system without hard links
        path.touch(0o600, exist_ok=False)
        fresh.replace(path)


@click.command(short_help="Give a dispatcher what a backup holds.")
@click.argument("file", type=click.Path())
@click.option("--replace", is_flag=True, help="Also where the dispatcher has something: all of it goes.")
@YES
@click.pass_obj
def restore(client: Client, file: str, replace: bool, yes: bool) -> None:
    """Give a dispatcher what a backup holds. One that has something already refuses, but for --replace.

    \b
    The whole procedure, as examples:
      slash32 restore /var/backups/slash32.json
      slash32 status                               which hosts hold?
      slash32 diff -f policies/                    is anything missing that was changed after the backup?
      slash32 adopt --all                          let the hosts take it

    The file is checked before anything is asked. Endpoints that run stay, as far as their hosts do: hosts tell them,
    not backups. A host that has seen a later revision than the backup's, or another store, holds what it has until
    `slash32 adopt`. With --replace, what the dispatcher was told before is gone. It asks on a terminal; elsewhere
    give --yes.
    """
    content = _read(file)
    saved = check(content, _short(file))
    what = f"revision {saved.revision}, made {saved.made}, {text.count(saved.records, 'record')}"
    instead = " Everything that it has now goes." if replace else ""
    confirm(f"Restore {what}, to {client.place}?{instead}", yes, "nothing was restored")
    try:
        answer = client.post("restore", body=content, query=f"replace={int(replace)}", wait=PATIENCE)
    except CallError as error:
        if error.status == 409 and not replace:
            first = error.lines[0].rstrip(".")
            raise Slash32Error(f"{first}; to give up what it has: slash32 restore --replace") from None
        raise
    revision = answer.get("revision", saved.revision)
    click.echo(printable(f"restored: {what}; the dispatcher is at revision {revision}"))
    click.echo("hosts that have seen a later revision, or another store, hold what they have until slash32 adopt")


def _read(file: str) -> bytes:
    try:
        if file == "-":
            if sys.stdin is None:
                raise Slash32Error("stdin: it is closed; nothing was restored")
            content = sys.stdin.buffer.read(MAX_ANSWER + 1)
        else:
            with Path(file).open("rb") as source:
                content = source.read(MAX_ANSWER + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or printable(str(error))
        raise Slash32Error(f"{_short(file)}: {why}; nothing was restored") from None
    if len(content) > MAX_ANSWER:
        raise Slash32Error(f"{_short(file)}: is larger than a backup can be; nothing was restored")
    return content


def _short(file: str | Path) -> str:
    name = str(file)
    if name == "-":
        return "stdin"
    return printable(name if len(name) <= 200 else f"{name[:200]}...")


# --- what one looks like ---------------------------------------------------------------------------------------------


def check(content: bytes, subject: str) -> Backup:
    """Its frame; what the records say is the dispatcher's to judge. Raises Slash32Error, one line."""

    def bad(why: str) -> Slash32Error:
        return Slash32Error(f"{subject}: {why}")

    if content.startswith(b"\x1f\x8b"):
        raise bad("is compressed; give what gunzip makes of it")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise bad("is no backup, or only a part of one: it is not JSON") from None
    if not isinstance(found, dict) or "slash32Backup" not in found:
        raise bad("is no backup: it does not say slash32Backup; slash32 backup makes one")
    if found["slash32Backup"] != VERSION:
        raise bad(f"slash32Backup: {quoted(found['slash32Backup'], 40)} is not known here; {VERSION} is")
    for field, kind in (("revision", int), ("epoch", str), ("made", str), ("records", list)):
        if not isinstance(found.get(field), kind) or isinstance(found[field], bool):
            raise bad(f"{field}: is missing, or of another kind; take another backup")
    if found["revision"] < 0:
        raise bad("revision: is negative; take another backup")
    for index, record in enumerate(found["records"]):
        if not _is_record(record):
            raise bad(f"records[{index}]: is not [table, [key, ...], base64]; take another backup")
    return Backup(found["revision"], found["made"][:64], len(found["records"]))


def _is_record(record: Any) -> bool:
    if not isinstance(record, list) or len(record) != 3:
        return False
    table, key, body = record
    if not isinstance(table, str) or not isinstance(body, str) or not isinstance(key, list):
        return False
    try:
        base64.b64decode(body, validate=True)
    except ValueError:
        return False
    return bool(key) and all(isinstance(part, str) for part in key)
