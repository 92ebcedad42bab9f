# Owns: the dispatcher's configuration file: reading it strictly, and its defaults. Touches: the file it is given.
# TOML, as hostd's is (decided for both daemons; packages, man pages and lab rely on it).
from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from slash32.errors import Slash32Error, quoted

PATH = Path("/etc/slash32/dispatcher.toml")
_STATE = Path("/var/lib/slash32-dispatcher")


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
        raise ConfigError(f"{file}: does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read ({e})") from None
    try:
        return _decode(raw)
    except ValueError as e:
        raise ConfigError(f"{file}: {e}") from None


def _decode(raw: dict[str, object]) -> Config:
    known = ("listen", "database", "socket", "key_file")
    values: dict[str, str] = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"{key}: no such setting; known are {', '.join(known)}")
        if not isinstance(value, str):
            raise ValueError(f"{key}: give a string, not {quoted(value)}")
        values[key] = value
    listen = values.pop("listen", Config().listen)
    if not listen.startswith("tcp://"):
        raise ValueError(f"listen: {quoted(listen)} is not like tcp://0.0.0.0:5532")
    for key, text in values.items():
        if not Path(text).is_absolute():
            raise ValueError(f"{key}: {quoted(text)}: give an absolute path")
    return Config(listen, **{key: Path(text) for key, text in values.items()})
