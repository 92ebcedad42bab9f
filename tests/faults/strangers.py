# Owns: connections that are none: who connects and says nothing, a byte a second, garbage, or another mechanism.
# Touches: sockets on loopback.
from __future__ import annotations

import os
import socket
from pathlib import Path

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
VERSION = b"\x03\x00"


def greeting(mechanism: bytes, server: bool = False) -> bytes:
    return SIGNATURE + VERSION + mechanism.ljust(20, b"\0") + bytes([server]) + bytes(31)


def command(name: bytes, body: bytes = b"") -> bytes:
    said = bytes([len(name)]) + name + body
    return b"\x06" + len(said).to_bytes(8, "big") + said


def ready(**properties: bytes) -> bytes:
    body = b"".join(
        bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value
        for name, value in ((name.replace("_", "-"), value) for name, value in properties.items())
    )
    return command(b"READY", body)


NULL = greeting(b"NULL") + ready(Socket_Type=b"DEALER", Identity=b"s" + bytes(15))
PLAIN = greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x06secret")
HELLO = greeting(b"CURVE") + command(b"HELLO", b"\x01\x00" + bytes(72) + os.urandom(32) + bytes(7) + b"\1" + bytes(80))
LONG = greeting(b"CURVE") + b"\x06" + (1 << 62).to_bytes(8, "big")
OLD = b"\x01\x00"  # ZMTP 1.0: no authentication at all
OLDER = SIGNATURE + b"\x01\x05" + b"\x00\x10" + b"s" + bytes(15)  # ZMTP 2.0
SAID = {"null": NULL, "plain": PLAIN, "bad hello": HELLO, "endless command": LONG, "zmtp 1": OLD, "zmtp 2": OLDER,
        "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "noise": os.urandom(4096), "zeros": bytes(4096)}  # fmt: skip


class Crowd:
    """Open connections to one port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sockets: list[socket.socket] = []

    def join(self, count: int, said: bytes = b"") -> None:
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", self.port), 20)
            one.setblocking(False)
            self.sockets.append(one)
            if said:
                self.say(one, said)

    @staticmethod
    def say(one: socket.socket, said: bytes) -> bool:
        try:
            one.send(said)
        except (BlockingIOError, ConnectionError):
            return False
        return True

    def alive(self) -> int:
        """Those that were not closed from there; what has come is dropped."""
        found = 0
        for one in self.sockets:
            try:
                while one.recv(4096):
                    pass
            except BlockingIOError:
                found += 1
            except ConnectionError:
                pass
        return found

    def leave(self) -> None:
        for one in self.sockets:
            one.close()
        self.sockets.clear()


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
