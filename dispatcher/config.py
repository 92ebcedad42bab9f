# Owns: the dispatcher's configuration file (YAML): read strictly, with defaults. Touches: the file it is given.
# A package may set folders of its own there; the defaults are for a checkout and for what the file leaves out.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slash32.decode import Field
from slash32.documents import load_yaml
from slash32.errors import ResourceError, Slash32Error, quoted

PATH = Path("/etc/slash32/dispatcher.yaml")


class ConfigError(Slash32Error):
    """One line: file, key, what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Field names are the file's keys."""

    listen: str = "tcp://0.0.0.0:5532"  # where hosts connect
    database: Path = Path("/var/lib/slash32/dispatcher.db")
    socket: Path = Path("/run/slash32/dispatcher.sock")  # the operators' API
    key: Path = Path("/var/lib/slash32/dispatcher.key")  # made at first use


def load(path: Path | None) -> Config:
    """Raises ConfigError. None: the default file, which may be missing."""
    file = path or PATH
    try:
        documents = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        if path is None:
            return Config()
        raise ConfigError(f"{file}: does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read ({e})") from None
    except ResourceError as e:
        raise ConfigError(str(e)) from None
    if len(documents) > 1:
        raise ConfigError(f"{file}: holds more than one YAML document")
    if not documents:
        return Config()
    try:
        return _decode(Field(dict(documents[0].value), str(file)))
    except ResourceError as e:
        raise ConfigError(str(e)) from None


def _decode(root: Field) -> Config:
    given = root.fields(("listen", "database", "socket", "key"))
    listen = given["listen"].line(256) if "listen" in given else Config().listen
    if not listen.startswith("tcp://"):
        given["listen"].fail(f"{quoted(listen)} is not like tcp://0.0.0.0:5532")
    paths = {}
    for name in ("database", "socket", "key"):
        if name in given:
            paths[name] = Path(given[name].line(4096))
            if not paths[name].is_absolute():
                given[name].fail("give an absolute path")
    return Config(listen, **paths)
