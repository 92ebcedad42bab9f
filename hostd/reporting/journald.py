# Owns: structured entries for systemd's journal, in its native protocol. Touches: the journal's socket; without one,
# what is said goes the way of all of hostd's words.
from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"

log = logging.getLogger("slash32.packets")


class Journald:
    """Never waits."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def close(self) -> None:
        self._socket.close()

    def write(self, fields: Mapping[str, str]) -> bool:
        """Whether it was said. It is not where the journal cannot keep up."""
        try:
            self._socket.sendto(encoded(fields), self._path)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            log.info("%s", fields["MESSAGE"])
        except OSError:  # full
            return False
        return True


def encoded(fields: Mapping[str, str]) -> bytes:
    """A value of several lines has its length before it."""
    found = []
    for name, value in fields.items():
        data = value.encode(errors="replace")
        if b"\n" in data:
            found.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            found.append(name.encode() + b"=" + data + b"\n")
    return b"".join(found)
