# Measures: one hook, end to end (spawn, 5 kB of XML to a daemon that parses it with hostd's own inbox and tag reader,
# answer, exit), against the bare interpreter. Bar 7: at most 1.15 times.   python -m bench.hook [--json] [-n N]
from __future__ import annotations

import argparse
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Report, measure
from hostd.guests.inbox import Inbox
from slash32.tag import parse_domain

REPO = Path(__file__).resolve().parents[1]
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
BARE = ["/usr/bin/python3", "-ISE", "-c", "pass"]
NIC = "<interface type='ethernet'><mac address='52:54:00:00:00:02'/><target dev='vnet0'/></interface>"
DEVICE = "<controller type='pci' index='0'><address type='pci' domain='0x0000' bus='0x00' slot='0x01'/></controller>"
DOMAIN = f"""<domain type='qemu' id='3'><name>web1</name><uuid>6e85e5f0-4ea9-4267-9ec6-22ff2194af6c</uuid><metadata>
<slash32:endpoint xmlns:slash32="urn:slash32:domain:1"><slash32:label key="role" value="web"/><slash32:interface>
<slash32:address>10.65.0.2</slash32:address></slash32:interface></slash32:endpoint></metadata>
<devices>{NIC}{DEVICE * 45}</devices></domain>"""


def serve(path: Path) -> None:
    """The daemon's side."""
    selector = selectors.DefaultSelector()
    inbox = Inbox(path, uid=os.getuid())
    inbox.register(selector)
    while True:
        for key, _ in selector.select():
            for request in inbox.ready(key, time.monotonic()):
                parse_domain(request.xml, request.driver)
                request.answer(0)


def install(directory: Path) -> Path:
    """The hook as the package installs it, but for the socket's path."""
    text = (REPO / "hooks/hook.py").read_text().replace('"/run/slash32/hook.sock"', repr(str(directory / "hook.sock")))
    script = directory / "hooks/qemu.d/50-slash32"
    script.parent.mkdir(parents=True)
    script.write_text(text)
    script.chmod(0o755)
    return script


def spawn(argv: list[str], stdin: Path) -> None:
    descriptor = os.open(stdin, os.O_RDONLY)
    try:
        pid = os.posix_spawn(argv[0], argv, ENV, file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, 0)])
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(descriptor)
    if status:
        raise RuntimeError(f"{argv}: exit status {os.waitstatus_to_exitcode(status)}")


def wait_for(path: Path, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the daemon did not start")
        time.sleep(0.01)


def run(n: int, json: bool) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        script, xml, path = install(directory), directory / "domain.xml", directory / "hook.sock"
        xml.write_text(DOMAIN)
        with subprocess.Popen([sys.executable, "-m", "bench.hook", "--serve", str(path)], cwd=REPO) as daemon:
            try:
                wait_for(path, daemon)
                hook = [str(script), "web1", "start", "begin", "-"]
                measured = measure(
                    {
                        "hook": lambda: spawn(hook, xml),
                        "python3 -ISE -c pass": lambda: spawn(BARE, xml),
                        "/bin/true": lambda: spawn(["/bin/true"], xml),
                    },
                    n,
                )
            finally:
                daemon.terminate()
    ratio = {"hook / bare python3": measured["hook"].median / measured["python3 -ISE -c pass"].median}
    bars = {"hook / bare python3": 1.15}
    return Report(f"hook ({len(DOMAIN)} bytes of XML)", measured, ratio, bars).tell(json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.hook")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=300)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    return 0 if run(given.n, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
