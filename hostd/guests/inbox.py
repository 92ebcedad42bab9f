# Owns: the socket on which libvirt's hooks speak to hostd. Used from one selectors loop in one thread, never blocks.
# A request is a header, the domain's XML and end of file; its answer may come much later. Touches its socket file only.
from __future__ import annotations

import errno
import os
import selectors
import socket
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

VERSION = "1"
STATUS = "status"  # no hook's operation: `slash32-hostd status` asks for the file to be written now
MAX_BYTES = 16 << 20  # of one request
MAX_CONNECTIONS = 64
PATIENCE = 12.0  # seconds for reading and answering; the hook itself gives up after 10
MAX_MESSAGE = 2000  # bytes; fits an empty socket buffer, so that an answer never blocks
_HEADER_MAX = 8192
_UCRED = struct.Struct("3i")  # pid, uid, gid


class InboxError(Exception):
    """The socket cannot be made. One line."""


@dataclass(eq=False, slots=True)
class _Connection:
    socket: socket.socket
    deadline: float
    data: bytearray = field(default_factory=bytearray)
    size: int = 0  # of what came, kept or not


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What one hook says. `xml` is raw and unchecked. Must be answered: libvirt waits."""

    driver: str
    guest: str
    operation: str
    suboperation: str
    extra: str
    xml: bytes
    _inbox: Inbox = field(repr=False)
    _connection: _Connection = field(repr=False)

    def answer(self, code: int, message: str = "") -> bool:
        """The hook's exit code and its line on stderr. False: the hook is gone, or was answered before."""
        return self._inbox.finish(self._connection, code, message)


class Inbox:
    """`uid`: the only peer that is listened to."""

    def __init__(self, path: Path, *, uid: int = 0) -> None:
        self.rejected = 0  # connections of other users
        self._path = path
        self._uid = uid
        self._selector: selectors.BaseSelector | None = None
        self._listening = False
        self._connections: set[_Connection] = set()
        self._listener = _bind(path)
        self._inode = path.stat().st_ino

    def register(self, selector: selectors.BaseSelector) -> None:
        """Every key that it registers has this Inbox as its `data`."""
        self._selector = selector
        self._listen(True)

    def ready(self, key: selectors.SelectorKey, now: float) -> list[Request]:
        """To be called for each key whose data is this Inbox. `now`: seconds, monotonic."""
        if key.fileobj is self._listener:
            self._accept(now)
            return []
        for connection in self._connections:
            if connection.socket is key.fileobj:
                return self._read(connection)
        return []

    def expire(self, now: float) -> None:
        """Closes what is past its deadline: half requests, and requests that nobody answered."""
        for connection in [c for c in self._connections if c.deadline <= now]:
            self._drop(connection)
        self._listen(True)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None: never."""
        return min((c.deadline for c in self._connections), default=None)

    def close(self) -> None:
        """Removes the socket file, unless a successor has put its own there."""
        for connection in list(self._connections):
            self._drop(connection)
        self._listen(False)
        self._listener.close()
        if self._path.exists() and self._path.stat().st_ino == self._inode:
            self._path.unlink()

    def finish(self, connection: _Connection, code: int, message: str) -> bool:
        """Answers and closes; what Request.answer does."""
        if connection not in self._connections:
            return False
        text = message.encode("utf-8", "backslashreplace")[:MAX_MESSAGE]
        try:
            connection.socket.send(bytes((min(max(code, 0), 1),)) + text)
        except OSError:  # the hook is gone, killed or past its deadline
            return False
        finally:
            self._drop(connection)
        return True

    def _listen(self, on: bool) -> None:
        on = on and len(self._connections) < MAX_CONNECTIONS
        if self._selector is None or on == self._listening:
            return
        self._listening = on
        if on:
            self._selector.register(self._listener, selectors.EVENT_READ, self)
        else:
            self._selector.unregister(self._listener)

    def _accept(self, now: float) -> None:
        """Beyond MAX_CONNECTIONS, or without descriptors, hooks wait in the backlog until `expire` or an answer."""
        while len(self._connections) < MAX_CONNECTIONS:
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as why:
                if why.errno == errno.ECONNABORTED:
                    continue
                if why.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                break
            self._take(accepted, now)
        self._listen(False)

    def _take(self, accepted: socket.socket, now: float) -> None:
        accepted.setblocking(False)
        _, uid, _ = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != self._uid:
            self.rejected += 1
            accepted.close()
            return
        assert self._selector is not None
        self._connections.add(_Connection(accepted, now + PATIENCE))
        self._selector.register(accepted, selectors.EVENT_READ, self)

    def _drop(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        self._unregister(connection)
        connection.socket.close()
        self._listen(True)

    def _unregister(self, connection: _Connection) -> None:
        if self._selector is not None and connection.socket in self._selector.get_map():
            self._selector.unregister(connection.socket)

    def _read(self, connection: _Connection) -> list[Request]:
        try:
            part = connection.socket.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:  # reset: the hook was killed
            self._drop(connection)
            return []
        if part:
            connection.size += len(part)
            if connection.size > MAX_BYTES:
                connection.data.clear()  # read to its end all the same, so that the hook gets its answer
            else:
                connection.data += part
            return []
        self._unregister(connection)
        return self._parse(connection)

    def _parse(self, connection: _Connection) -> list[Request]:
        if connection.size > MAX_BYTES:
            self.finish(connection, 1, f"the domain's XML has {connection.size} bytes; at most {MAX_BYTES} are read")
            return []
        at = connection.data.find(b"\0", 0, _HEADER_MAX)
        header = connection.data[: max(at, 0)].decode("utf-8", "surrogateescape").split("\1")
        if header[0] != VERSION or not 5 <= len(header) <= 6:
            self.finish(connection, 1, "the hook speaks another version; install the 50-slash32 of this package")
            return []
        driver, guest, operation, suboperation, extra = (*header[1:], "-")[:5]
        xml = bytes(connection.data[at + 1 :])
        connection.data.clear()
        return [Request(driver, guest, operation, suboperation, extra, xml, self, connection)]


def _bind(path: Path) -> socket.socket:
    """The file appears complete: 0600 and listening. A socket left by a dead hostd is replaced."""
    _check_directory(path.parent)
    with socket.socket(socket.AF_UNIX) as probe:
        if not probe.connect_ex(str(path)):
            raise InboxError(f"{path}: another slash32-hostd listens there; stop it first")
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(str(fresh))
        listener.listen(1024)
        fresh.rename(path)
    except OSError as why:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise InboxError(f"{path}: {why.strerror}") from None
    finally:
        os.umask(mask)
    return listener


def _check_directory(directory: Path) -> None:
    """Nobody else may be able to put a socket of his own there."""
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
        found = directory.lstat()
    except OSError as why:
        raise InboxError(f"{directory}: {why.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise InboxError(f"{directory}: must be a directory that only its owner, this user, can write; correct it")
