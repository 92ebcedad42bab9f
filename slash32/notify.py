# Owns: telling systemd how a daemon is (sd_notify(3)). Touches: the datagram socket that NOTIFY_SOCKET names.
from __future__ import annotations

import os
import socket

ALIVE = "WATCHDOG=1\nEXTEND_TIMEOUT_USEC=30000000"  # busy with something long, at the start maybe


def notify(state: str) -> None:
    """ "READY=1", "WATCHDOG=1", "STATUS=...". Does nothing where systemd did not start us."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
