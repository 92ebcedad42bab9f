# Owns: the dispatcher's configuration file: reading it strictly, and its defaults. Touches: the file it is given.
# TOML, as hostd's is (decided for both daemons; packages, man pages and lab rely on it).
from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from slash32.errors import Slash32Error, quoted

PATH = Path("/etc/slash32/dispatcher.toml")
_STATE = Path("/var/lib/slash32-dispatcher")
_LISTEN = re.compile(r"tcp://([A-Za-z0-9][A-Za-z0-9.-]*|\*|\[[0-9A-Fa-f:.]+\]):([1-9][0-9]{0,4})")
_SOCKET_MOST = 107  # bytes, the kernel's limit


class ConfigError(Slash32Error):
    """One line: file, key, what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Field names are the file's keys."""

    listen: str = "tcp://0.0.0.0:5532"  # where hosts connect
    database: Path = _STATE / "slash32.db"
    socket: Path = Path("/run/slash32-dispatcher/api.sock")  # the operators' API
    key_file: Path = _STATE / "curve.key"  # made at first use


def load(path: Path | None) -> Config:
    """Raises ConfigError. None: the default file, which may be missing."""
    file = path or PATH
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path is None:
            return Config()
        raise ConfigError(f"{file}: there is no such file") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{file}: not UTF-8 text, at byte {e.start}") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{file}: not TOML: {e}") from None
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read: {e.strerror}") from None
    try:
        return _decode(raw)
    except ValueError as e:
        raise ConfigError(f"{file}: {e}") from None


def _decode(raw: dict[str, object]) -> Config:
    known = ("listen", "database", "socket", "key_file")
    values: dict[str, str] = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"{quoted(key, 64)[1:-1]}: no such setting; known are {', '.join(known)}")
        if not isinstance(value, str):
            raise ValueError(f"{key}: give a string, not {quoted(value, 64)}")
        values[key] = value
    listen = values.pop("listen", Config().listen)
    found = _LISTEN.fullmatch(listen)
    if not found or int(found[2]) > 65535:
        raise ValueError(f"listen: {quoted(listen, 64)} is not like tcp://0.0.0.0:5532")
    for key, text in values.items():
        if not Path(text).is_absolute() or not text.isprintable():
            raise ValueError(f"{key}: {quoted(text)}: give an absolute path")
    config = Config(listen, **{key: Path(text) for key, text in values.items()})
    if len(bytes(config.socket)) > _SOCKET_MOST:
        raise ValueError(f"socket: give a path of at most {_SOCKET_MOST} bytes")
    if len({config.database, config.socket, config.key_file}) < 3:
        raise ValueError("database, socket and key_file: give three different paths")
    return config
