# The watcher and the hook against a real libvirtd, qemu and lxc drivers, in one node. Only our files are put there, no
# hostd: what the hook decides alone is seen on real guests.
from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import access, domains
from lab.node import Node
from lab.rack import Rack

REPO = Path(__file__).parents[2]
FULL = os.environ.get("SLASH32_COUNTS") == "full"
ROOMS = ("slash32", "hooks", "hostd")
SHARE = "/usr/share/slash32"
HOOK = "/etc/libvirt/hooks/{}.d/50-slash32"
ANSWER = "/root/answer.py"
MAC2 = "52:54:00:00:00:09"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")

# Prints what the watcher posts; ends at end of file on stdin.
EAR = """
import sys
sys.path.insert(0, "/usr/share/slash32")
from hostd.guests.watch import Watcher
lines = open(1, "w", buffering=1)
watcher = Watcher(("qemu:///system", "lxc:///"), lambda event: lines.write(repr(event) + "\\n"))
watcher.start()
sys.stdin.read()
watcher.stop()
"""

# A stand-in for hostd that refuses everything, and notes what it was told.
NO = """
import os, socket
os.makedirs("/run/slash32", exist_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/slash32/hook.sock")
listener.listen()
while True:
    connection, _ = listener.accept()
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    with open("/root/told", "ab") as file:
        file.write(data.partition(b"\\0")[0].replace(b"\\1", b" ") + b"\\n")
    connection.sendall(b"\\1domain: never")
    connection.close()
"""


class Ear:
    def __init__(self, node: Node) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._process = node.popen(["python3", "-I", "/root/ear.py"], stdin=-1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line if isinstance(line, str) else line.decode())
                self._changed.notify_all()

    def wait(self, *patterns: str, seconds: float = 30) -> str:
        """The first line that has all patterns; it and all before it are dropped."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for at, line in enumerate(self.lines):
                    if all(re.search(pattern, line) for pattern in patterns):
                        del self.lines[: at + 1]
                        return line
                assert self._changed.wait(max(0.0, deadline - time.monotonic())), f"no {patterns} in {self.lines}"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._reader.join(10)


@pytest.fixture(scope="module", params=["bookworm", "trixie"] if FULL else ["bookworm"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with Rack("twatch", hosts=1, suite=request.param) as rack:
        made = rack.node("h1")
        for path in sorted(file for room in ROOMS for file in (REPO / room).rglob("*.py")):
            made.push(path, f"{SHARE}/{path.relative_to(REPO)}")
        made.write("/root/ear.py", EAR)
        made.write(ANSWER, NO)
        made.run(["systemctl", "start", "libvirtd"])
        yield made


@pytest.fixture
def ear(node: Node) -> Iterator[Ear]:
    listening = Ear(node)
    listening.wait(r"^Scanned\(driver='qemu'")
    listening.lines.clear()
    yield listening
    listening.close()


@pytest.fixture
def hook(node: Node) -> Iterator[None]:
    """The hook as the package installs it, hostd not there."""
    for driver in ("qemu", "lxc"):
        node.push(REPO / "hooks/hook.py", HOOK.format(driver))
    node.run(["systemctl", "reload", "libvirtd"])
    yield
    node.run(["rm", "-f", HOOK.format("qemu"), HOOK.format("lxc")])
    node.run(["systemctl", "reload", "libvirtd"])


@pytest.fixture
def refusing(node: Node) -> Iterator[Callable[[], str]]:
    """A hostd that says no to everything; yields what it was told."""
    node.run(["rm", "-rf", "/run/slash32", "/root/told"])
    daemon = node.popen(["python3", ANSWER])
    until = time.monotonic() + 20
    while node.run(["test", "-S", "/run/slash32/hook.sock"], check=False).returncode:
        assert time.monotonic() < until
    yield lambda: node.run(["cat", "/root/told"], check=False).stdout
    daemon.kill()
    node.run(["rm", "-rf", "/run/slash32"])


def virsh(node: Node, driver: str, *words: str, check: bool = True) -> tuple[int, str]:
    done = node.run(["virsh", "-q", "-c", "qemu:///system" if driver == "qemu" else "lxc:///", *words], check=check)
    return done.returncode, done.stdout + done.stderr


def create(node: Node, driver: str, name: str, check: bool = True, **how: object) -> tuple[int, str]:
    make = domains.qemu_domain if driver == "qemu" else domains.lxc_domain
    node.write(f"/root/{name}.xml", make(name, addr4="10.65.0.7", labels={"role": "web"}, **how))  # type: ignore[arg-type]
    return virsh(node, driver, "create", f"/root/{name}.xml", check=check)


@pytest.mark.parametrize("driver", ["lxc", "qemu"])
def test_a_life(node: Node, ear: Ear, driver: str) -> None:
    create(node, driver, "w1")
    try:
        ear.wait(r"^Runs\(", "STARTED", f"driver='{driver}'")
        ear.wait(r"^Seen\(", "name='w1'", "target='vnet", "'role': 'web'", "running=True, migrating=False")
        new = '<endpoint><label key="role" value="db"/><interface><address>10.65.0.7</address></interface></endpoint>'
        virsh(node, driver, "metadata", "w1", domains.NAMESPACE, "--key", "slash32", "--live", "--set", new)
        ear.wait(r"^Seen\(", "'role': 'db'")
        virsh(node, driver, "suspend", "w1")
        ear.wait(r"^Suspended\(", "migrated=False")
        ear.wait(r"^Seen\(", "running=False, migrating=False")
        virsh(node, driver, "resume", "w1")
        ear.wait(r"^Runs\(", "RESUMED")
    finally:
        virsh(node, driver, "destroy", "w1")
    ear.wait(r"^Stopped\(", "reason='destroyed'")
    ear.wait(r"^Gone\(")


def test_hot_plug_on_qemu(node: Node, ear: Ear) -> None:
    create(node, "qemu", "w2")
    try:
        ear.wait(r"^Seen\(", "name='w2'", "running=True")
        access.wait_guest(node, "w2")
        nic = f"<interface type='ethernet'><mac address='{MAC2}'/><model type='virtio'/></interface>"
        node.write("/root/nic.xml", nic)
        virsh(node, "qemu", "attach-device", "w2", "/root/nic.xml", "--live")
        ear.wait(r"^Seen\(", MAC2)
    finally:
        virsh(node, "qemu", "destroy", "w2")


def test_libvirtd_restarts(node: Node, ear: Ear) -> None:
    create(node, "lxc", "w3")
    try:
        uuid = virsh(node, "lxc", "domuuid", "w3")[1].strip()
        node.run(["systemctl", "restart", "libvirtd"])
        ear.wait(r"^Lost\(driver='lxc'")
        ear.wait(r"^Scanned\(driver='lxc'", uuid)
        virsh(node, "lxc", "suspend", "w3")
        ear.wait(r"^Suspended\(")
    finally:
        virsh(node, "lxc", "destroy", "w3")
    ear.wait(r"^Gone\(")


def test_a_bad_tag_on_a_running_guest(node: Node, ear: Ear) -> None:
    create(node, "lxc", "w4")
    try:
        ear.wait(r"^Seen\(", "name='w4'")
        command = ["metadata", "w4", domains.NAMESPACE, "--key", "slash32", "--live", "--set"]
        virsh(node, "lxc", *command, "<endpoint><adress/></endpoint>")
        ear.wait(r"^BadTag\(", "name='w4'", "adress")
        virsh(node, "lxc", "metadata", "w4", domains.NAMESPACE, "--live", "--remove")
        ear.wait(r"^Seen\(", "name='w4'", "tagged=False")
    finally:
        virsh(node, "lxc", "destroy", "w4")


@pytest.mark.parametrize("driver", ["lxc", "qemu"])
@pytest.mark.usefixtures("hook")
def test_hostd_down_and_a_tap_outside_the_guard(node: Node, driver: str) -> None:
    code, said = create(node, driver, "w5", target="tap7", check=False)
    assert code != 0
    assert "slash32: domain 'w5'" in said and "'tap7' lies outside the guard's prefixes (vnet)" in said
    for allowed in ({"target": "tap7", "tag": False}, {}):
        create(node, driver, "w5", **allowed)
        virsh(node, driver, "destroy", "w5")


@pytest.mark.parametrize("driver", ["lxc", "qemu"])
@pytest.mark.usefixtures("hook")
def test_hostd_refuses(node: Node, refusing: Callable[[], str], driver: str) -> None:
    code, said = create(node, driver, "w6", check=False)
    assert code != 0 and "slash32: domain: never" in said
    assert f"1 {driver} w6 prepare begin -" in refusing()


@pytest.mark.parametrize("driver", ["lxc", "qemu"])
@pytest.mark.usefixtures("hook")
def test_a_refusal_at_reconnect_and_stop_changes_nothing(
    node: Node, driver: str, request: pytest.FixtureRequest
) -> None:
    create(node, driver, "w7")
    told = request.getfixturevalue("refusing")
    before = node.run(["pgrep", "-f", "qemu-system.*w7|libvirt_lxc.*w7"]).stdout
    node.run(["systemctl", "restart", "libvirtd"])
    virsh(node, driver, "list")
    until = time.monotonic() + 20
    while f"1 {driver} w7 reconnect begin -" not in told():
        assert time.monotonic() < until, told()
    assert virsh(node, driver, "domstate", "w7")[1].strip() == "running"
    assert node.run(["pgrep", "-f", "qemu-system.*w7|libvirt_lxc.*w7"]).stdout == before
    virsh(node, driver, "destroy", "w7")
    assert f"1 {driver} w7 stopped end" in told() and f"1 {driver} w7 release end" in told()
