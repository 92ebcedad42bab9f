# Owns: hostd's configuration file (TOML): reading it strictly, and its defaults. Touches: the file it is given.
from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slash32.errors import Slash32Error, quoted
from slash32.journal import FORMATS
from slash32.net import Address, format_address, parse_address, parse_prefix

from .compiler.ruleset import GROUP_MASK, Guard

PATH = Path("/etc/slash32/hostd.toml")
STATE = Path("/var/lib/slash32")
RUN = Path("/run/slash32")

DISPATCHERS = 15  # at most

_HOST = re.compile(r"(?=.{1,64}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_DISPATCHER = re.compile(r"tcp://([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):([1-9][0-9]{0,4})")
_KEY = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_METRICS = re.compile(r"http://([0-9.]+|\[[0-9A-Fa-f:.]+\]):([1-9][0-9]{0,4})")
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_URI = re.compile(r"[a-z]+(\+[a-z0-9]+)?://[!-~]*")
_NO_NEXT_HOP = tuple(map(parse_prefix, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/127", "ff00::/8", "fe80::/10")))


class ConfigError(ValueError):
    """One line: file, key, what to do."""


class Unusable(Slash32Error):
    """What the configuration asks for is not to be had on this host: one line."""


@dataclass(frozen=True, slots=True)
class Config:
    """Field names are the file's keys."""

    host: str = ""  # this hypervisor's name; default: the hostname
    addresses: tuple[Address, ...] = ()  # next hops of this host on the segment, at most one per family
    dispatcher: tuple[str, ...] = ()  # tcp://ADDRESS:PORT of each; none: alone, with what is on disk
    dispatcher_key: tuple[str, ...] = ()  # their public keys (slash32-dispatcher key), or one that all have
    guard_prefixes: tuple[str, ...] = ("vnet",)
    group_base: int = 0x53320000
    conn_limit: int = 65536
    on_hostd_down: str = "isolate"  # isolate | refuse
    table_owner: str = "auto"  # auto | yes | no
    packet_filter: str = "auto"  # auto | nftables | iptables
    libvirt: tuple[str, ...] = ("qemu:///system", "lxc:///")
    metrics_listen: str = ""  # http://ADDRESS:PORT; empty: nowhere
    log_format: str = "text"  # text | json
    state_dir: Path = STATE
    run_dir: Path = RUN

    @property
    def key_file(self) -> Path:
        return self.state_dir / "hostd.key"

    def guard(self, drop_transit: tuple[int, ...]) -> Guard:
        known = int(self.dispatcher[0].rpartition(":")[2]) if self.dispatcher else 0
        return Guard(self.guard_prefixes, self.group_base, self.conn_limit, drop_transit, known)

    def dispatchers(self) -> Iterator[tuple[str, str]]:
        """Each one's endpoint and key."""
        keys = self.dispatcher_key if len(self.dispatcher_key) > 1 else self.dispatcher_key * len(self.dispatcher)
        return zip(self.dispatcher, keys, strict=True)


def load(path: Path | None = None) -> Config:
    """Raises ConfigError. None: the default file, which may be missing."""
    file = path or PATH
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path is not None:
            raise ConfigError(f"{path}: there is no such file") from None
        raw = {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text, at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return decode(raw)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def decode(raw: Mapping[str, Any]) -> Config:
    """Raises ValueError."""
    known = {f.name for f in fields(Config)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            settings = ", ".join(sorted(each for each in known if not each.endswith("_dir")))
            raise ValueError(f"{quoted(key, 64)[1:-1]}: no such setting; known are {settings}")
        values[key] = _value(key, value)
    values.setdefault("host", socket.gethostname().partition(".")[0].lower())
    config = Config(**values)
    _check(config)
    _check_fleet(config)
    return config


def _value(key: str, value: Any) -> Any:
    if key in ("group_base", "conn_limit"):
        if type(value) is not int:
            raise ValueError(f"{key}: give a number, not {quoted(value, 64)}")
        return value
    if key in ("addresses", "guard_prefixes", "libvirt"):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise ValueError(f'{key}: give a list of strings, like ["a", "b"]')
        return tuple(map(_address, value)) if key == "addresses" else tuple(value)
    if key in ("dispatcher", "dispatcher_key"):
        return _one_or_more(key, value)
    if not isinstance(value, str):
        raise ValueError(f"{key}: give a string, not {quoted(value, 64)}")
    if not key.endswith("_dir"):
        return value
    if not Path(value).is_absolute():
        raise ValueError(f"{key}: {quoted(value)}: give an absolute path")
    return Path(value)


def _one_or_more(key: str, value: Any) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value] if value != "" else []
    if not all(isinstance(x, str) for x in several):
        raise ValueError(f'{key}: give a string, or a list of strings like ["a", "b"], not {quoted(value, 64)}')
    if len(several) > DISPATCHERS:
        raise ValueError(f"{key}: {len(several)} of them, more than {DISPATCHERS}")
    return tuple(several)


def _address(text: str) -> Address:
    try:
        found = parse_address(text)
    except ValueError:
        raise ValueError(f"addresses: {quoted(text, 64)} is not an address like 10.0.0.11 or fd00::11") from None
    if any(prefix.contains(found) for prefix in _NO_NEXT_HOP):
        raise ValueError(f"addresses: {format_address(found)}: other hosts cannot reach this one by it")
    return found


def _check(config: Config) -> None:
    for key, allowed in (
        ("on_hostd_down", ("isolate", "refuse")),
        ("table_owner", ("auto", "yes", "no")),
        ("packet_filter", ("auto", "nftables", "iptables")),
        ("log_format", FORMATS),
    ):
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key}: {quoted(getattr(config, key), 64)} is not one of {', '.join(allowed)}")
    if not 0 < config.group_base <= GROUP_MASK or config.group_base & ~GROUP_MASK:
        raise ValueError(f"group_base: {config.group_base:#x} must be a multiple of 0x10000 above 0")
    if not 1 <= config.conn_limit <= 10_000_000:
        raise ValueError("conn_limit: give 1 to 10000000 connections")
    usable = [p.isalnum() and p.isascii() and 2 <= len(p) <= 12 for p in config.guard_prefixes]
    if not usable or not all(usable):
        raise ValueError('guard_prefixes: give at least one prefix of 2 to 12 letters and digits, like ["vnet"]')
    for uri in config.libvirt:
        if not _URI.fullmatch(uri):
            raise ValueError(f"libvirt: {quoted(uri, 64)} is not a connection like qemu:///system")
    if not config.libvirt:
        raise ValueError('libvirt: give at least one connection, like ["qemu:///system", "lxc:///"]')
    if config.metrics_listen:
        listening(config.metrics_listen)


def listening(text: str) -> tuple[str, int]:
    """Address and port of `metrics_listen`; a name would have to be looked up. Raises ValueError."""
    found = _METRICS.fullmatch(text)
    if found and int(found[2]) <= 65535:
        with suppress(ValueError):
            return format_address(parse_address(found[1].strip("[]"))), int(found[2])
    raise ValueError(f"metrics_listen: {quoted(text, 64)} is not like http://127.0.0.1:9533")


def _check_fleet(config: Config) -> None:
    if not _HOST.fullmatch(config.host):
        raise ValueError(f"host: {quoted(config.host, 64)} is not a name: use a-z, 0-9, '-' and '.', at most 64")
    if len({len(a) for a in config.addresses}) != len(config.addresses):
        raise ValueError("addresses: give at most one address per family")
    if bool(config.dispatcher) != bool(config.dispatcher_key):
        raise ValueError("dispatcher and dispatcher_key belong together: set both, or none")
    if len(config.dispatcher_key) not in (0, 1, len(config.dispatcher)):
        wanted = f"one key that all {len(config.dispatcher)} dispatchers have, or one for each in their order"
        raise ValueError(f"dispatcher_key: {len(config.dispatcher_key)} keys: give {wanted}")
    for each in config.dispatcher:
        found = _DISPATCHER.fullmatch(each)
        if not found or int(found[2]) > 65535:
            raise ValueError(f"dispatcher: {quoted(each, 64)} is not like tcp://10.0.0.1:5532")
        if config.dispatcher.count(each) > 1:
            raise ValueError(f"dispatcher: {quoted(each, 64)} is there twice")
    if len(ports := sorted({each.rpartition(":")[2] for each in config.dispatcher})) > 1:
        raise ValueError(f"dispatcher: ports {', '.join(ports)}: give all dispatchers the same port")
    for each in config.dispatcher_key:
        if not _is_key(each):
            what = "is not a key of 40 characters, as `slash32-dispatcher key` prints it"
            raise ValueError(f"dispatcher_key: {quoted(each, 64)} {what}")


def _is_key(text: str) -> bool:
    """40 characters of Z85 that stand for 32 bytes: five at a time are less than 2**32."""
    if not _KEY.fullmatch(text):
        return False
    fives = (text[i : i + 5] for i in range(0, 40, 5))
    return all(sum(_Z85.index(c) * 85**n for n, c in enumerate(reversed(five))) < 1 << 32 for five in fives)
