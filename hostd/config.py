# Owns: hostd's configuration file (TOML): reading it strictly, and its defaults. Touches: the file it is given.
from __future__ import annotations

import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slash32.net import Address, parse_address

from .ruleset import GROUP_MASK, Guard

PATH = Path("/etc/slash32/hostd.toml")
STATE = Path("/var/lib/slash32")
RUN = Path("/run/slash32")


class ConfigError(ValueError):
    """One line: file, key, what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Field names are the file's keys."""

    host: str = ""  # this hypervisor's name; default: the hostname
    addresses: tuple[Address, ...] = ()  # next hops of this host on the segment, at most one per family
    dispatcher: str = ""  # tcp://ADDRESS:PORT; empty: alone, with what is on disk
    dispatcher_key: str = ""  # the dispatcher's public key (slash32-dispatcher key)
    guard_prefixes: tuple[str, ...] = ("vnet",)
    group_base: int = 0x53320000
    conn_limit: int = 65536
    on_hostd_down: str = "isolate"  # isolate | refuse
    table_owner: str = "auto"  # auto | yes | no
    libvirt: tuple[str, ...] = ("qemu:///system", "lxc:///")
    state_dir: Path = STATE
    run_dir: Path = RUN

    def guard(self, drop_transit: tuple[int, ...]) -> Guard:
        return Guard(self.guard_prefixes, self.group_base, self.conn_limit, drop_transit)


def load(path: Path = PATH) -> Config:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError:
        raw = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        return decode(raw)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def decode(raw: Mapping[str, Any]) -> Config:
    known = {f.name: f for f in fields(Config)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"{key}: no such setting; known are {', '.join(sorted(known))}")
        values[key] = _value(key, value)
    values.setdefault("host", socket.gethostname().partition(".")[0])
    config = Config(**values)
    _check(config)
    return config


def _value(key: str, value: Any) -> Any:
    if key in ("group_base", "conn_limit"):
        if type(value) is not int:
            raise ValueError(f"{key}: give a number, not {value!r}")
        return value
    if key in ("addresses", "guard_prefixes", "libvirt"):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise ValueError(f'{key}: give a list of strings, like ["a", "b"]')
        return tuple(parse_address(x) for x in value) if key == "addresses" else tuple(value)
    if not isinstance(value, str):
        raise ValueError(f"{key}: give a string, not {value!r}")
    return Path(value) if key.endswith("_dir") else value


def _check(config: Config) -> None:
    for key, allowed in (("on_hostd_down", ("isolate", "refuse")), ("table_owner", ("auto", "yes", "no"))):
        if getattr(config, key) not in allowed:
            raise ValueError(f"{key}: {getattr(config, key)!r} is not one of {', '.join(allowed)}")
    if not 0 < config.group_base <= GROUP_MASK or config.group_base & ~GROUP_MASK:
        raise ValueError(f"group_base: {config.group_base:#x} must be a multiple of 0x10000 above 0")
    if not 1 <= config.conn_limit <= 10_000_000:
        raise ValueError("conn_limit: give 1 to 10000000 connections")
    usable = [p.isalnum() and p.isascii() and 2 <= len(p) <= 12 for p in config.guard_prefixes]
    if not usable or not all(usable):
        raise ValueError('guard_prefixes: give at least one prefix of 2 to 12 letters and digits, like ["vnet"]')
    if len({len(a) for a in config.addresses}) != len(config.addresses):
        raise ValueError("addresses: give at most one address per family")
    if bool(config.dispatcher) != bool(config.dispatcher_key):
        raise ValueError("dispatcher and dispatcher_key belong together: set both, or none")
    if config.dispatcher and not config.dispatcher.startswith("tcp://"):
        raise ValueError(f"dispatcher: {config.dispatcher!r} is not like tcp://10.0.0.1:5532")
