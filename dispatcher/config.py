# Owns: the dispatcher's configuration file: reading it strictly, and its defaults. Touches: the file it is given.
# TOML, as hostd's is (decided for both daemons; packages, man pages and lab rely on it).
from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slash32.decode import NAME, NAME_LIMIT
from slash32.errors import Slash32Error, quoted
from slash32.journal import FORMATS

PATH = Path("/etc/slash32/dispatcher.toml")
STORES = ("sqlite", "etcd")
_STATE = Path("/var/lib/slash32-dispatcher")
_HOST = r"([A-Za-z0-9][A-Za-z0-9.-]*|\*|\[[0-9A-Fa-f:.]+\])"
_PORT = r"([1-9][0-9]{0,4})"
_WHERE = re.compile(rf"([a-z]{{3,5}})://{_HOST}:{_PORT}")
_GROUP = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_PREFIX = re.compile(r"/([!-.0-~]+/){1,8}")
_ANYWHERE = ("*", "0.0.0.0", "[::]")
_SOCKET_MOST = 107  # bytes, the kernel's limit
_ETCD_MOST = 16


class ConfigError(Slash32Error):
    """One line: file, key, what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Field names are the file's keys."""

    listen: str = "tcp://0.0.0.0:5532"  # where hosts connect
    key_file: Path = _STATE / "curve.key"  # made at first use
    store: str = "sqlite"
    database: Path = _STATE / "slash32.db"  # sqlite's
    etcd: tuple[str, ...] = ()
    etcd_prefix: str = "/slash32/"
    etcd_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    name: str = ""  # among the dispatchers of one store; empty: the machine's
    advertise: str = ""  # where hosts and other dispatchers reach this one; empty: `listen`
    socket: Path = Path("/run/slash32-dispatcher/api.sock")  # the operators' API
    socket_group: str = ""  # empty: the daemon's own
    api_listen: str = ""  # the API on TCP
    api_cert: Path | None = None
    api_key: Path | None = None
    api_tokens: Path | None = None
    metrics_listen: str = ""
    log_format: str = "text"

    @property
    def advertised(self) -> str:
        return self.advertise or self.listen


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


def address_of(url: str) -> tuple[str, int]:
    """Of a URL that was read here: host without brackets ("" stands for every address), port."""
    found = _WHERE.fullmatch(url)
    if not found:
        raise ValueError(f"{quoted(url, 64)} is not like tcp://10.0.0.1:5532")
    return ("" if found[2] == "*" else found[2].strip("[]")), int(found[3])


def _decode(raw: dict[str, object]) -> Config:
    known = [each.name for each in fields(Config)]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"{quoted(key, 64)[1:-1]}: no such setting; known are {', '.join(known)}")
        if value in ("", []) and type(value) is type(_EMPTY.get(key)):
            continue  # as if it were not there
        values[key] = _READ.get(key, _path)(key, value)
    config = Config(**values)
    _agree(config)
    return config


def _agree(config: Config) -> None:
    """What no single value shows."""
    if len(bytes(config.socket)) > _SOCKET_MOST:
        raise ValueError(f"socket: give a path of at most {_SOCKET_MOST} bytes")
    if len({config.database, config.socket, config.key_file}) < 3:
        raise ValueError("database, socket and key_file: give three different paths")
    if config.store == "etcd" and not config.etcd:
        raise ValueError('etcd: is missing; name etcd\'s members, like ["http://10.0.0.1:2379"]')
    if config.store == "etcd" and _unreachable(config.advertised):
        raise ValueError("advertise: is missing; say where hosts reach this dispatcher, like tcp://10.0.0.1:5532")
    secret = bool(config.etcd) and config.etcd[0].startswith("https:")
    for key in ("etcd_ca", "etcd_cert", "etcd_key"):
        if getattr(config, key) is not None and not secret:
            raise ValueError(f"{key}: is for TLS: give etcd's members as https://")
    if (config.etcd_cert is None) != (config.etcd_key is None):
        raise ValueError("etcd_cert and etcd_key belong together: give both or none")
    for key in ("api_cert", "api_key", "api_tokens"):
        if config.api_listen and getattr(config, key) is None:
            raise ValueError(f"{key}: is missing; api_listen needs api_cert, api_key and api_tokens")


def _unreachable(url: str) -> bool:
    found = _WHERE.fullmatch(url)
    return found is None or found[2] in _ANYWHERE


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key}: give a string, not {quoted(value, 64)}")
    return value


def _path(key: str, value: object) -> Path:
    text = _text(key, value)
    if not Path(text).is_absolute() or not text.isprintable():
        raise ValueError(f"{key}: {quoted(text)}: give an absolute path")
    return Path(text)


def _where(scheme: str, example: str) -> Callable[[str, object], str]:
    def read(key: str, value: object) -> str:
        text = _text(key, value)
        found = _WHERE.fullmatch(text)
        if found and (found[1], scheme) == ("http", "https"):
            raise ValueError(f"{key}: {quoted(text, 64)}: tokens go over TLS only: give it as https://")
        if not found or found[1] != scheme or int(found[3]) > 65535:
            raise ValueError(f"{key}: {quoted(text, 64)} is not like {example}")
        return text

    return read


def _advertise(key: str, value: object) -> str:
    text = _where("tcp", "tcp://10.0.0.1:5532")(key, value)
    if _unreachable(text):
        raise ValueError(f"{key}: {quoted(text, 64)}: give an address that others can connect to")
    return text


def _etcd(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f'{key}: give a list of strings, like ["http://10.0.0.1:2379"]')
    members = [each.rstrip("/") for each in value]
    for member in members:
        found = _WHERE.fullmatch(member)
        if not found or found[1] not in ("http", "https") or int(found[3]) > 65535 or found[2] == "*":
            raise ValueError(f"{key}: {quoted(member, 64)} is not like http://10.0.0.1:2379")
    if len({member.partition(":")[0] for member in members}) > 1:
        raise ValueError(f"{key}: give all members as https://, or all as http://")
    if len(set(members)) < len(members) or len(members) > _ETCD_MOST:
        raise ValueError(f"{key}: give each member once, and at most {_ETCD_MOST}")
    return tuple(members)


def _etcd_prefix(key: str, value: object) -> str:
    text = _text(key, value)
    if not _PREFIX.fullmatch(text) or len(text) > 128:
        raise ValueError(f"{key}: {quoted(text, 64)} is not like /slash32/")
    return text


def _one_of(*known: str) -> Callable[[str, object], str]:
    def read(key: str, value: object) -> str:
        text = _text(key, value)
        if text not in known:
            raise ValueError(f"{key}: {quoted(text, 64)} is not one of {', '.join(known)}")
        return text

    return read


def _name(key: str, value: object) -> str:
    text = _text(key, value)
    if not NAME.fullmatch(text) or len(text) > NAME_LIMIT:
        raise ValueError(f"{key}: {quoted(text, 64)}: give a name like d1 (a-z, 0-9, - and . between)")
    return text


def _group(key: str, value: object) -> str:
    text = _text(key, value)
    if not _GROUP.fullmatch(text):
        raise ValueError(f"{key}: {quoted(text, 64)} is not the name of a group")
    return text


_READ: dict[str, Callable[[str, object], object]] = {
    "listen": _where("tcp", "tcp://0.0.0.0:5532"),
    "store": _one_of(*STORES),
    "etcd": _etcd,
    "etcd_prefix": _etcd_prefix,
    "name": _name,
    "advertise": _advertise,
    "socket_group": _group,
    "api_listen": _where("https", "https://0.0.0.0:5533"),
    "metrics_listen": _where("http", "http://127.0.0.1:9532"),
    "log_format": _one_of(*FORMATS),
}  # all others are paths
_EMPTY: dict[str, object] = {
    each.name: [] if each.default == () else "" for each in fields(Config) if each.default in ("", None, ())
}
