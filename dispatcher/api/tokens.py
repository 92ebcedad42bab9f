# Owns: the file of bearer tokens: NAME, role and SHA-256 of each, one a line. Touches: that file. A token itself is
# never kept: it is printed once, when it is made.
from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from slash32.errors import Slash32Error, quoted

ROLES = ("ro", "admin")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 20  # bytes
_HEAD = "# Who may use the operators' API over TCP: NAME, ro or admin, SHA-256 of the token.\n"


class TokenError(Slash32Error):
    """One line: which file, which line, what to do."""


class Token(NamedTuple):
    name: str
    role: str
    digest: str  # SHA-256, hexadecimal


class Tokens:
    """What the file says now: it is looked at for each question, and read again when it is another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._known: tuple[Token, ...] = ()

    def find(self, token: str) -> Token | None:
        """Takes as long whichever it is. Raises TokenError: then nobody gets in."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known in self.all():
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def all(self) -> tuple[Token, ...]:
        """Raises TokenError."""
        try:
            is_now = self._path.stat()
            signature = (is_now.st_dev, is_now.st_ino, is_now.st_size, is_now.st_mtime_ns, is_now.st_ctime_ns)
            if signature != self._seen:
                self._seen, self._known = (), ()
                self._known = read(self._path)
                self._seen = signature
        except OSError as e:
            self._seen, self._known = (), ()
            raise TokenError(f"{self._path}: cannot be read ({e.strerror}); nobody gets in over TCP") from None
        return self._known


def read(path: Path) -> tuple[Token, ...]:
    """Raises TokenError, OSError. One bad line, and none counts: it may be the one that was to end somebody's."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno())
        content = file.read(_MOST + 1)
    if not stat.S_ISREG(mode.st_mode) or len(content) > _MOST:
        raise TokenError(f"{path}: is not a file of tokens, or has more than {_MOST} bytes")
    if mode.st_mode & 0o022:
        raise TokenError(f"{path}: mode {mode.st_mode & 0o7777:04o} lets others add tokens: chmod go-w it")
    if mode.st_uid not in (0, os.geteuid()):
        raise TokenError(f"{path}: belongs to user {mode.st_uid}, who may add tokens: chown it to root")
    return _decode(path, content)


def _decode(path: Path, content: bytes) -> tuple[Token, ...]:
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as e:
        raise TokenError(f"{path}: not UTF-8 text, at byte {e.start}") from None
    found: dict[str, Token] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        wrong = _wrong(words, found)
        if wrong:
            raise TokenError(f"{path}: line {number}: {wrong}")
        found[words[0]] = Token(*words)
    return tuple(found.values())


def _wrong(words: Sequence[str], known: dict[str, Token]) -> str:
    if len(words) != 3:
        return "is not NAME, ro or admin, SHA-256 in 64 hexadecimal digits"
    name, role, digest = words
    if not NAME.fullmatch(name):
        return f"{quoted(name, 64)} is no name: give up to 64 of A-Z a-z 0-9 . _ -"
    if name in known:
        return f"{name} is there twice; remove one"
    if role not in ROLES:
        return f"{quoted(role, 64)} is not one of {', '.join(ROLES)}"
    return "" if _HASH.fullmatch(digest) else "the third word is not a SHA-256 in 64 hexadecimal digits (0-9 a-f)"


def make(path: Path, name: str, role: str) -> str:
    """A new token, whose hash is in the file now. Raises TokenError, OSError."""
    if not NAME.fullmatch(name):
        raise TokenError(f"{quoted(name, 64)} is no name of a token: give up to 64 of A-Z a-z 0-9 . _ -")
    try:
        known = read(path)
        old, is_now = path.read_text(encoding="utf-8"), path.stat()
        mode, owner = is_now.st_mode & 0o755, (is_now.st_uid, is_now.st_gid)
    except FileNotFoundError:
        folder = path.parent.stat()
        known, old, mode, owner = (), _HEAD, 0o644, (os.geteuid(), folder.st_gid)
    if any(each.name == name for each in known):
        raise TokenError(f"{path}: there is a token {name} already; choose another name, or remove its line first")
    token = "s32_" + secrets.token_urlsafe(32)
    line = f"{name} {role} {hashlib.sha256(token.encode()).hexdigest()}\n"
    _replace(path, old + ("" if old.endswith("\n") or not old else "\n") + line, mode, owner)
    return token


def _replace(path: Path, text: str, mode: int, owner: tuple[int, int]) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            if os.geteuid() == 0:
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
