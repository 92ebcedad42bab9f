#!/usr/bin/python3 -ISE
# Owns: what libvirt runs as /etc/libvirt/hooks/{qemu,lxc}.d/50-slash32, four times per guest start: this whole file is
# installed there. It tells hostd and returns hostd's answer. Only modules that the interpreter has anyway, few lines:
# an import costs milliseconds, compiling this file 0.2. No child; no stdout, at migrate it would replace the XML.
import sys
from _signal import alarm, signal  # type: ignore[import-not-found]  # `signal` would import enum
from _socket import socket
from posix import _exit, read, write

SOCKET = "/run/slash32/hook.sock"
CODE = "/usr/share/slash32"
TAG = b"urn:slash32:domain:1"
MAY_REFUSE = ("prepare", "start", "migrate")
TOLD = (*MAY_REFUSE, "started", "stopped", "release", "reconnect")
MAX_BYTES = 16 << 20  # libvirt's own limit is 4 MiB; hostd refuses more than this
SECONDS = 10  # for everything: libvirt itself waits for ever


def late(*_: object) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def say(message: bytes) -> None:
    try:
        write(2, b"slash32: " + b" ".join(message.split())[:2000] + b"\n")
    except OSError:
        return  # libvirt closed our stderr: nobody is left to tell


def tell(argv: list[str], xml: bytearray) -> int:
    signal(14, late)  # SIGALRM
    alarm(SECONDS)
    while len(xml) <= MAX_BYTES and (part := read(0, 1 << 20)):
        xml += part
    driver = "lxc" if argv[0].rpartition("/hooks/")[2].startswith("lxc") else "qemu"
    connection = socket(1, 1)  # AF_UNIX, SOCK_STREAM
    connection.connect(SOCKET)
    connection.sendall("\1".join(["1", driver, *argv[1:5]]).encode("utf-8", "surrogateescape") + b"\0" + xml)
    connection.shutdown(1)
    answer = b""
    while part := connection.recv(4096):
        answer += part
    alarm(0)
    if not answer:
        raise ConnectionError("it closed without an answer")
    if len(answer) > 1:
        say(answer[1:])
    return answer[0]


def alone(xml: bytearray, why: BaseException, operation: str) -> int:
    """hostd is dead or silent: the guard isolates the guest, unless that guest would escape it, or stays elsewhere."""
    sys.path.insert(0, CODE)
    sys.dont_write_bytecode = True
    try:
        from hooks.alone import judge

        code, message = judge(bytes(xml), f"{type(why).__name__}: {why}", operation)
    except ModuleNotFoundError:
        return 0  # the package is removed, only this conffile is left
    except Exception as broken:
        code, message = 1, f"{CODE}/hooks/alone.py is broken: {broken!r}; reinstall slash32-hostd"
    say(message.encode("utf-8", "backslashreplace"))
    return code


def main(argv: list[str]) -> int:
    operation = argv[2] if len(argv) > 2 else ""
    if operation not in TOLD:
        return 0
    code, xml = 0, bytearray()
    try:
        code = tell(argv, xml)
    except BaseException as why:  # whatever it is: after `reconnect`, anything but 0 kills the running guest
        alarm(0)
        if operation in MAY_REFUSE and TAG in xml:
            code = alone(xml, why, operation)
    return int(code > 0 and operation in MAY_REFUSE)


if __name__ == "__main__":
    status = 0
    try:
        status = main(sys.argv)
    finally:
        _exit(status)
