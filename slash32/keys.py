# Owns: a CURVE key pair on disk: made once by its owner, mode 0600, its secret never anywhere else; and the one that is
# to replace it, in FILE.next. Touches: these two files.
from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple

import zmq

from slash32.errors import Slash32Error

_HEAD = "# CURVE key pair of this machine. The secret stays here; `public` is what others are told.\n"


class KeyFileError(Slash32Error):
    """One line: which file, what to do."""


class KeyPair(NamedTuple):
    """Z85, 40 characters each."""

    public: str
    secret: str


def load_or_create_key(path: Path) -> KeyPair:
    """Raises KeyFileError. Two processes that race get the same key."""
    try:
        return _load(path)
    except FileNotFoundError:
        _create(path)
    try:
        return _load(path)
    except OSError as e:
        raise KeyFileError(f"{path}: {e.strerror}") from None


def next_file(path: Path) -> Path:
    """Where the key waits that is to replace the one in `path`."""
    return path.with_name(f"{path.name}.next")


def load_next(path: Path) -> KeyPair | None:
    """Raises KeyFileError. None: no other key is to replace the one in `path`."""
    try:
        return _load(next_file(path))
    except FileNotFoundError:
        return None


def discard_next(path: Path) -> bool:
    """False: there was none. Raises KeyFileError."""
    try:
        next_file(path).unlink()
        _sync(path.parent)
    except FileNotFoundError:
        return False
    except OSError as e:
        raise KeyFileError(f"{next_file(path)}: cannot be removed ({e.strerror})") from None
    return True


def replace_key(path: Path, pair: KeyPair) -> None:
    """`pair`, which others know already, is the key from now on: whole on disk or not at all, whenever this is killed.

    Raises KeyFileError. FILE.next goes, unless somebody has put another key there meanwhile.
    """
    try:
        (next_file(path) if _waits(path, pair) else _written(path, pair)).replace(path)
        _sync(path.parent)
    except OSError as e:
        raise KeyFileError(f"{path}: the new key cannot take its place ({e.strerror})") from None


def _waits(path: Path, pair: KeyPair) -> bool:
    try:
        return load_next(path) == pair
    except KeyFileError:
        return False


def _load(path: Path) -> KeyPair:
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read(4096)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise KeyFileError(f"{path}: permission denied; run this as root") from None
    except (OSError, UnicodeDecodeError) as e:
        raise KeyFileError(f"{path}: cannot be read ({e}); it holds a CURVE key pair") from None
    if mode & 0o077:
        raise KeyFileError(f"{path}: mode {mode:04o} lets others read the secret key: chmod 600 it, or make a new key")
    found = dict(line.split(" ", 1) for line in text.splitlines() if " " in line and not line.startswith("#"))
    try:
        pair = KeyPair(found["public"], found["secret"])
        if len(pair.secret) == 40 and zmq.curve_public(pair.secret.encode()).decode() == pair.public:
            return pair
    except (KeyError, ValueError, zmq.ZMQError):
        pass  # the same refusal as for a pair that does not match
    raise KeyFileError(f"{path}: not a CURVE key pair; delete it and a new one is made (register its public key again)")


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        fresh = _written(path, KeyPair(*(key.decode() for key in zmq.curve_keypair())))
        try:
            os.link(fresh, path)
            _sync(path.parent)
        except FileExistsError:
            return  # another process was faster: its key is the key
        finally:
            fresh.unlink()
    except OSError as e:
        raise KeyFileError(f"{path}: a key cannot be made there ({e.strerror})") from None


def _written(path: Path, pair: KeyPair) -> Path:
    """A file beside `path` that has it, and that a rename makes the one."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(f"{_HEAD}public {pair.public}\nsecret {pair.secret}\n")
            file.flush()
            os.fsync(fd)
            if os.geteuid() == 0:  # root asks for the key of a daemon that is not root: the directory is its own
                os.fchown(fd, path.parent.stat().st_uid, path.parent.stat().st_gid)
    except BaseException:
        fresh.unlink()
        raise
    return fresh


def _sync(folder: Path) -> None:
    """What was renamed, made or removed there stays so, whatever happens to the power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
