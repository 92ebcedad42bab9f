# Owns: writing tables of iptables-legacy: one `iptables-legacy-restore --noflush` per IP version, each table in it one
# atomic replacement. (Why not by python-iptables: docs/decisions/0007-iptables.md.) Touches: subprocesses.
from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..netlink import Refusal
from ..nft.transaction import TransactionRefused
from .lines import Line

_COMMAND = {4: "iptables-legacy-restore", 6: "ip6tables-legacy-restore"}
_ENVIRONMENT = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C"}
_WAIT = 5  # seconds for /run/xtables.lock: hooks wait meanwhile, and so does systemd's watchdog
_AT_LINE = re.compile(r"line:? (\d+)")


class _Row(NamedTuple):
    text: str
    label: Hashable
    what: str


@dataclass
class Edit:
    """Changes of one table. Chains are declared (emptied) first, so that rules may lead to any of them."""

    heads: list[_Row] = field(default_factory=list)
    rules: list[_Row] = field(default_factory=list)
    ends: list[_Row] = field(default_factory=list)

    def chain(self, name: str, lines: Iterable[Line]) -> None:
        """Make it, or replace what is in it."""
        what = f"write chain {name}"
        self.heads.append(_Row(f":{name} - [0:0]", None, what))
        self.rules += [_Row(line.text(name), None, what) for line in lines]

    def policy(self, name: str, rules: Iterable[Iterable[Line]], label: Hashable, accept: str) -> None:
        """The same for a chain of policies: of each rule its lines."""
        what = f"write chain {name}"
        self.heads.append(_Row(f":{name} - [0:0]", label, what))
        for number, lines in enumerate(rules):
            self.rules += [_Row(line.text(name, accept, number=number), label, what) for line in lines]

    def add(self, chain: str, line: Line) -> None:
        self.rules.append(_Row(line.text(chain), None, f"write chain {chain}"))

    def raw(self, text: str) -> None:
        self.rules.append(_Row(text, None, "hook up our chains"))

    def remove(self, name: str, label: Hashable = None) -> None:
        what = f"delete chain {name}"
        self.heads.append(_Row(f":{name} - [0:0]", label, what))
        self.ends.append(_Row(f"-X {name}", label, what))

    def rows(self, table: str) -> list[_Row]:
        body = [*self.heads, *self.rules, *self.ends]
        return [_Row(f"*{table}", None, table), *body, _Row("COMMIT", None, f"table {table}")] if body else []


def text_of(edits: dict[str, Edit]) -> str:
    return "".join(f"{row.text}\n" for table, edit in edits.items() for row in edit.rows(table))


def write(version: int, edits: dict[str, Edit]) -> None:
    """In the order of the tables given. Raises TransactionRefused: the refused table is as it was, those before it are
    written."""
    rows = [row for table, edit in edits.items() for row in edit.rows(table)]
    if not rows:
        return
    command = [_COMMAND[version], "--noflush", "--wait", str(_WAIT)]
    text = "".join(f"{row.text}\n" for row in rows)
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=3 * _WAIT, check=False, env=_ENVIRONMENT
        )
    except FileNotFoundError:
        raise _refusal(_Row("", None, command[0]), errno.ENOENT, "not installed: apt install iptables") from None
    except subprocess.TimeoutExpired:
        raise _refusal(_Row("", None, command[0]), errno.ETIMEDOUT, "no answer") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        at = _AT_LINE.search(said)
        row = rows[min(int(at[1]), len(rows)) - 1] if at else _Row("", None, command[0])
        words = " ".join(said.split())[:200]
        raise _refusal(row, errno.EINVAL, words)


def _refusal(row: _Row, code: int, words: str) -> TransactionRefused:
    return TransactionRefused(row.label, Refusal(0, code, words), row.what)
