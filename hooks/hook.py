#!/usr/bin/python3 -ISE
# Owns: what libvirt runs as /etc/libvirt/hooks/{qemu,lxc}.d/50-slash32, four times per guest start: the whole file is
# installed there. It tells hostd and returns hostd's answer. Only modules that the interpreter has loaded by itself:
# each other import costs milliseconds. Never a child, never stdout (at migrate it would replace the domain's XML).
import sys
from _signal import alarm, signal  # type: ignore[import-not-found]  # `signal` would import enum
from _socket import socket
from posix import _exit, read, write

SOCKET = "/run/slash32/hook.sock"
CODE = "/usr/share/slash32"
MAX_BYTES = 16 << 20  # libvirt's own limit is 4 MiB; hostd refuses more than this
SECONDS = 10  # for everything: libvirt itself waits for ever
MAY_REFUSE = ("prepare", "start", "migrate")
TOLD = (*MAY_REFUSE, "started", "stopped", "release", "reconnect")
TAG = b"urn:slash32:domain:1"


def say(message: bytes) -> None:
    line = b" ".join(message.split())[:2000]
    try:
        write(2, b"slash32: " + line + b"\n")
    except OSError:
        return  # libvirt closed our stderr: nobody is left to tell


def late(*_: object) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def read_all() -> bytearray:
    xml = bytearray()
    while len(xml) <= MAX_BYTES and (part := read(0, 1 << 20)):
        xml += part
    return xml


def ask(header: bytes, xml: bytes | bytearray) -> bytes:
    """hostd's answer: one byte, the exit code; then a message."""
    connection = socket(1, 1)  # AF_UNIX, SOCK_STREAM
    connection.connect(SOCKET)
    connection.sendall(header + xml)
    connection.shutdown(1)
    answer = b""
    while part := connection.recv(4096):
        answer += part
    if not answer:
        raise ConnectionError("it closed without an answer")
    return answer


def judge_alone(xml: bytes | bytearray, why: BaseException) -> int:
    """hostd is silent: the guard isolates the guest, unless it would escape the guard, or the operator says refuse."""
    if TAG not in xml:
        return 0
    sys.path.insert(0, CODE)
    sys.dont_write_bytecode = True
    try:
        from hooks import alone
    except ModuleNotFoundError:
        return 0  # the package is removed, only this conffile is left
    code, message = alone.judge(bytes(xml), f"{type(why).__name__}: {why}")
    say(message.encode("utf-8", "backslashreplace"))
    return code


def run(argv: list[str], xml: bytes | bytearray) -> int:
    driver = "lxc" if argv[0].rpartition("/hooks/")[2].startswith("lxc") else "qemu"
    header = "\1".join(["1", driver, *argv[1:5]]).encode("utf-8", "surrogateescape") + b"\0"
    try:
        answer = ask(header, xml)
    except OSError as why:
        alarm(0)
        return judge_alone(xml, why) if argv[2] in MAY_REFUSE else 0
    alarm(0)
    if answer[1:]:
        say(answer[1:])
    return int(answer[0] > 0)


def main(argv: list[str]) -> int:
    operation = argv[2] if len(argv) > 2 else ""
    if operation not in TOLD:
        return 0
    code, xml = 0, bytearray()
    try:
        signal(14, late)  # SIGALRM
        alarm(SECONDS)
        xml = read_all()
        code = run(argv, xml)
    except BaseException as why:  # whatever it is: `reconnect` must end with 0, or libvirt kills the running guest
        say(f"hook failed at {operation}: {why!r}".encode("utf-8", "backslashreplace"))
        code = int(TAG in xml)
    return code if operation in MAY_REFUSE else 0


if __name__ == "__main__":
    _exit(main(sys.argv))
