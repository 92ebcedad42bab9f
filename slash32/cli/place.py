# Owns: where the dispatcher is and how it is reached: a Unix socket, or TLS with a token. There is no way to switch the
# check of its certificate off. Touches: the token's file, sockets.
from __future__ import annotations

import http.client
import os
import socket
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import click

from slash32.errors import Slash32Error, printable, quoted

if TYPE_CHECKING:
    import ssl

SOCKET = "/run/slash32-dispatcher/api.sock"
PORT = 5533
TOKEN_LIMIT = 4096  # bytes of a token's file
_HINT = "is slash32-dispatcher running here? (another socket: --socket or SLASH32_SOCKET)"
Connection = http.client.HTTPConnection


class PlaceError(Slash32Error):
    """One line: what keeps us from even asking."""


class Place(Protocol):
    def __str__(self) -> str:
        """As messages name it."""

    def headers(self) -> dict[str, str]:
        """Of every request. Raises PlaceError."""

    def connect(self, timeout: float) -> Connection:
        """Connected. Raises PlaceError, one line without the place's name."""


@dataclass(frozen=True, slots=True)
class UnixPlace:
    path: str

    def __str__(self) -> str:
        return f"the dispatcher at {quoted(self.path)}"

    def headers(self) -> dict[str, str]:
        return {}

    def connect(self, timeout: float) -> Connection:
        connection = _UnixConnection(self.path, timeout)
        try:
            connection.connect()
        except FileNotFoundError:
            why = f"there is no such socket; {_HINT}" if self.path else "give the path of a socket"
        except ConnectionRefusedError:
            why = f"nobody listens there; {_HINT}"
        except PermissionError:
            why = "permission denied; run this as root, or join group slash32"
        except OSError as error:
            why = printable(error.strerror or str(error))
        else:
            return connection
        connection.close()
        raise PlaceError(why)


@dataclass(frozen=True, slots=True)
class TlsPlace:
    host: str
    port: int
    token_file: str
    ca: str = ""  # empty: the authorities that this machine trusts

    def __str__(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"the dispatcher at {quoted(f'https://{shown}:{self.port}')}"

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {read_token(self.token_file)}"}

    def connect(self, timeout: float) -> Connection:
        import ssl  # where it is needed

        trusted = _trusted(self.ca)
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=trusted)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            why = printable(error.verify_message or str(error)).rstrip(".")
            ca = f"by what {quoted(self.ca)} holds" if self.ca else "by this machine; its authority: --ca FILE"
            why = f"its certificate is not trusted ({why}) {ca}"
        except ssl.SSLError as error:
            why = f"no TLS can be spoken there ({printable(error.reason or str(error))[:100]})"
        except socket.gaierror:
            why = "no such host is known"
        except TimeoutError:
            why = f"no answer for {timeout:.0f} s"
        except OSError as error:
            why = printable(error.strerror or str(error))
        else:
            return connection
        connection.close()
        raise PlaceError(why)


def _trusted(ca: str) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca or None)
    except ssl.SSLError:
        raise PlaceError(f"--ca {quoted(ca)}: holds no certificate; give a file in PEM") from None
    except OSError as error:
        raise PlaceError(f"--ca {quoted(ca)}: {error.strerror or printable(str(error))}") from None


def read_token(path: str) -> str:
    """Raises PlaceError. A token that others can read is nobody's proof."""
    subject = f"--token-file {quoted(path)}"
    try:
        with Path(path).open("rb") as file:
            about = os.fstat(file.fileno())
            fits = stat.S_ISREG(about.st_mode) or stat.S_ISFIFO(about.st_mode)  # a pipe: --token-file <(pass show x)
            content = file.read(TOKEN_LIMIT + 1) if fits else b""
    except (OSError, ValueError) as error:
        raise PlaceError(f"{subject}: {getattr(error, 'strerror', None) or printable(str(error))}") from None
    if not fits:
        raise PlaceError(f"{subject}: is not a file")
    if about.st_mode & 0o077:
        raise PlaceError(f"{subject}: mode {about.st_mode & 0o777:04o} lets others read the token: chmod 600 it")
    token = content.decode("ascii", "replace").strip()
    if not token or len(content) > TOKEN_LIMIT or not all("!" <= character <= "~" for character in token):
        raise PlaceError(f"{subject}: holds no token; give one line, as `slash32-dispatcher token` printed it")
    return token


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        if not self._path:
            raise FileNotFoundError
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


# --- the command line's words for it ---------------------------------------------------------------------------------


def place_of(options: Mapping[str, Any], typed: Collection[str] = ()) -> Place:
    """`options`: socket, server, token_file, ca; `typed`: those that the command line gave: they win over the
    environment's. Raises click.UsageError."""
    path, server = options.get("socket"), options.get("server")
    if server is not None and path is not None and ("socket" in typed) == ("server" in typed):
        how = "--socket and --server" if "socket" in typed else "SLASH32_SOCKET and SLASH32_SERVER"
        raise click.UsageError(f"{how} are two places: give one of them")
    if server is None or "socket" in typed:
        for name in ("token_file", "ca"):
            if name in typed:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --server https://HOST:PORT")
        return UnixPlace(SOCKET if path is None else str(path))
    host, port = _address(str(server))
    if not options.get("token_file"):
        raise click.UsageError("--server needs --token-file FILE (or SLASH32_TOKEN_FILE), with a token for it")
    return TlsPlace(host, port, str(options["token_file"]), str(options.get("ca") or ""))


def _address(server: str) -> tuple[str, int]:
    try:
        url = urlsplit(server)
        host, port = url.hostname or "", url.port
    except ValueError:
        raise click.UsageError(f"--server {quoted(server, 100)} is not https://HOST:PORT") from None
    if url.scheme == "http":
        raise click.UsageError("--server: give https://: over http:// everybody on the way could read the token")
    plain = url.path in ("", "/") and not url.query and not url.fragment and url.username is None
    if url.scheme != "https" or not host or not plain or not host.isprintable() or not host.isascii() or " " in host:
        raise click.UsageError(f"--server {quoted(server, 100)} is not https://HOST:PORT")
    return host, PORT if port is None else port
