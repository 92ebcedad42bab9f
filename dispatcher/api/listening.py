# Owns: the sockets of the API: where they listen, who may connect to the Unix one, how many may be connected, TLS.
# Touches: those sockets, the files of the certificate. What comes in is handed to a Gate.
from __future__ import annotations

import asyncio
import contextlib
import errno
import grp
import logging
import os
import pwd
import socket
import ssl
import stat
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from slash32.errors import Slash32Error, quoted

from ..config import address_of
from .gate import Gate, Peer

log = logging.getLogger("slash32.dispatcher.api")

CONNECTIONS = 1024  # at once, of one socket,
OF_ONE_PEER = 64  # and of one address on TCP
HANDSHAKE = 10.0  # seconds
GOODBYE = 5.0
BACKLOG = 256
OUT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_CREDENTIALS = struct.Struct("3i")


class ApiError(Slash32Error):
    """One line."""


class Certificate:
    """What the files say; read again when they are others."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises ApiError."""
        self._files = certificate, key
        self._seen = self._signature()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """What is wrong after a change is said once; the old one stays."""
        try:
            signature = self._signature()
            if signature != self._seen:
                self._seen = signature
                self._context = self._load()
                log.info("%s: the new certificate is in use", self._files[0])
        except ApiError as e:
            if self._seen:
                log.warning("%s; the old certificate stays in use", e)
            self._seen = ()
        return self._context

    def _signature(self) -> tuple[int, ...]:
        found: list[int] = []
        for file in self._files:
            try:
                is_now = file.stat()
            except OSError as e:
                raise ApiError(f"{file}: cannot be read ({e.strerror})") from None
            found += is_now.st_ino, is_now.st_size, is_now.st_mtime_ns, is_now.st_mode
        return tuple(found)

    def _load(self) -> ssl.SSLContext:
        certificate, key = self._files
        mode = key.stat().st_mode & 0o777
        if mode & 0o007:
            raise ApiError(f"{key}: mode {mode:04o} lets everybody read the key: chmod o-rwx it")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(certificate, key, password="")  # never asks a terminal
        except (OSError, ssl.SSLError, ValueError) as e:
            why = " ".join(str(getattr(e, "reason", None) or getattr(e, "strerror", None) or e).split())
            hint = "PEM, the certificate first, a key without a passphrase"
            raise ApiError(f"{certificate}, {key}: not a certificate and its key ({why[:100]}); give {hint}") from None
        return context


def unix_socket(path: Path, group: str) -> socket.socket:
    """Open to root and the group from its first moment. Raises ApiError."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        number = grp.getgrnam(group).gr_gid if group else -1
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path)
        s.bind(str(path))
        path.chmod(0o600)
        if group:
            os.chown(path, -1, number)
        path.chmod(0o660)
        s.listen(BACKLOG)  # nobody could connect before
    except KeyError:
        s.close()
        raise ApiError(f"socket_group: there is no group {group} here: groupadd --system {group}") from None
    except ApiError:
        s.close()
        raise
    except PermissionError as e:
        s.close()
        hint = f", in group {group}: is the daemon's user in it?" if group else ""
        raise ApiError(f"{path}: cannot serve the API there ({e.strerror}){hint}") from None
    except OSError as e:
        s.close()
        raise ApiError(f"{path}: cannot serve the API there ({e.strerror or e})") from None
    s.setblocking(False)
    return s


def _make_room(path: Path) -> None:
    """What a dispatcher that is gone has left. Raises ApiError, OSError."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ApiError(f"{path}: is there and is not a socket; remove it, or give another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as s:
        s.setblocking(False)
        with contextlib.suppress(ConnectionRefusedError):
            s.connect(str(path))
            raise ApiError(f"{path}: another dispatcher serves the API there; give this one another socket")
    path.unlink(missing_ok=True)


def tcp_sockets(key: str, url: str) -> list[socket.socket]:
    """One for each address that the name stands for. Raises ApiError; `key` is the setting's."""
    host, port = address_of(url)
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            s = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            made.append(s)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(len(found) > 1))
            s.bind(address)
            s.listen(BACKLOG)
            s.setblocking(False)
    except OSError as e:
        for s in made:
            s.close()
        raise ApiError(f"{key}: cannot listen on {url} ({e.strerror or e})") from None
    return made


class Door:
    """A listening socket's connections. `protocol` makes what is behind each of them."""

    def __init__(
        self, s: socket.socket, protocol: Callable[[], asyncio.Protocol], certificate: Certificate | None = None
    ) -> None:
        self._socket = s
        self._protocol = protocol
        self._certificate = certificate
        self._peers: Counter[str] = Counter()
        self._users: dict[int, str] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._said = 0.0
        self._task = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        for task in (self._task, *self._opening):
            task.cancel()
        await asyncio.gather(self._task, *self._opening, return_exceptions=True)
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                s, _ = await loop.sock_accept(self._socket)
            except OSError as e:
                if e.errno in OUT_OF:
                    self._warn("cannot take another connection: %s", e.strerror)
                    await asyncio.sleep(1)
                continue
            peer = await self._peer(s)
            who = _counted(peer)
            if peer is None or self._peers.total() >= CONNECTIONS or (peer.address and self._peers[who] >= OF_ONE_PEER):
                s.close()
                if peer is not None:
                    self._warn("too many connections: one of %s was refused", who or "a user here")
                continue
            self._peers[who] += 1
            task = loop.create_task(self._open(s, peer))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, s: socket.socket, peer: Peer) -> None:
        counted = [_counted(peer)]

        def left() -> None:
            if counted:
                who = counted.pop()
                self._peers[who] -= 1
                if not self._peers[who]:
                    del self._peers[who]

        gate = Gate(self._protocol(), peer, left)
        context = self._certificate.context() if self._certificate else None
        limits = {"ssl_handshake_timeout": HANDSHAKE, "ssl_shutdown_timeout": GOODBYE} if context else {}
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: gate, s, ssl=context, **limits)
        except OSError:  # TLS that is none, or ends: the client's matter
            left()
            s.close()
        except asyncio.CancelledError:
            left()
            s.close()
            raise

    async def _peer(self, s: socket.socket) -> Peer | None:
        """None: it is gone already."""
        try:
            if s.family == socket.AF_UNIX:
                credentials = s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                return Peer(trusted=f"{await self._user(_CREDENTIALS.unpack(credentials)[1])} (unix socket)")
            address = str(s.getpeername()[0]).partition("%")[0]
            return Peer(address=address.removeprefix("::ffff:"))
        except OSError:
            return None

    async def _user(self, number: int) -> str:
        if number not in self._users:
            loop = asyncio.get_running_loop()
            self._users[number] = await loop.run_in_executor(None, _name, number)  # may ask a directory server
        return self._users[number]

    def _warn(self, text: str, *values: object) -> None:
        """The journal is not a client's to fill."""
        now = asyncio.get_running_loop().time()
        if now - self._said > 10 or not self._said:
            self._said = now
            log.warning(text, *values)


def _counted(peer: Peer | None) -> str:
    """An IPv6 client has its whole /64 at its disposal."""
    if peer is None or ":" not in peer.address:
        return peer.address if peer else ""
    with contextlib.suppress(OSError):
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, peer.address)[:8] + bytes(8))
    return peer.address


def _name(number: int) -> str:
    try:
        return quoted(pwd.getpwuid(number).pw_name, 64)[1:-1]
    except (KeyError, OSError):
        return f"uid {number}"
