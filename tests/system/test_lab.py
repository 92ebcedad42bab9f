"""The lab itself: a rack of one node is a real Debian hypervisor, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import access, domains, packets, paths, process
from lab.node import Node
from lab.rack import Rack

NAME = "tlab"
REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    with Rack(NAME, hosts=1) as made:
        yield made


@pytest.fixture(scope="module")
def node(rack: Rack) -> Node:
    return rack.node("h1")


def traces(name: str) -> list[str]:
    """Whatever of rack NAME is on this machine: namespaces, cgroups, mounts, processes, files."""
    found = [str(path) for path in Path("/run/netns").glob(f"s32-{name}-*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/s32-{name}-*")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f"/racks/{name}/" in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"/racks/{name}/" in line or f"s32-{name}-" in line:
            found.append(line)
    return found + [str(path) for path in paths.racks().glob(name)]


def test_systemd_and_libvirtd(node: Node) -> None:
    assert node.run(["systemctl", "is-system-running"]).stdout.strip() == "running"
    assert node.run(["cat", "/proc/1/comm"]).stdout.strip() == "systemd"
    assert node.run(["hostname"]).stdout.strip() == "h1"
    for uri in ("qemu:///system", "lxc:///"):
        assert node.run(["virsh", "-c", uri, "list", "--name"]).stdout.strip() == ""


def test_the_wire(rack: Rack, node: Node) -> None:
    for address in (node.address, node.address6):
        assert rack.tor.run(["ping", "-c1", "-W1", address]).returncode == 0
    assert node.run(["ping", "-c1", "-W1", "192.0.2.1"], check=False).returncode != 0, "nothing leaves the machine"


def test_a_container(node: Node) -> None:
    xml = domains.lxc_domain("c1", addr4="10.65.0.3", addr6="fd00:65::3", labels={"role": "db"})
    node.write("/root/c1.xml", xml)
    node.run(["virsh", "-c", "lxc:///", "create", "/root/c1.xml"])
    access.wait_guest(node, "c1")
    assert access.guest_run(node, "c1", ["hostname"]) == "c1\n"
    answers = access.probe(node, "c1", ["10.65.0.3", "fd00:65::3"])
    assert answers and all(answers.values()), answers
    with pytest.raises(process.CommandError):
        access.guest_run(node, "c1", ["false"])
    frame = packets.arp("52:54:00:00:00:03", "10.65.0.3", "169.254.1.1")
    assert access.guest_run(node, "c1", ["frames"], input=f"3 0 {frame}\n") == "3 0\n"
    node.run(["virsh", "-c", "lxc:///", "destroy", "c1"])


def test_a_qemu_guest(node: Node) -> None:
    xml = domains.qemu_domain("v1", addr4="10.65.0.2", addr6="fd00:65::2", labels={"role": "web"})
    node.write("/root/v1.xml", xml)
    node.run(["virsh", "create", "/root/v1.xml"])
    access.wait_guest(node, "v1")
    assert access.guest_run(node, "v1", ["hostname"]) == "v1\n"
    answers = access.probe(node, "v1", ["10.65.0.2", "fd00:65::2"])
    assert answers and all(answers.values()), answers
    assert access.guest_result(node, "v1", ["sh", "-c", "exit 7"]).returncode == 7
    assert access.guest_run(node, "v1", ["wc", "-c"], input="x" * 5000) == "5000\n"
    node.run(["virsh", "destroy", "v1"])


def test_a_flood_from_the_first_instruction(node: Node) -> None:
    frame = packets.udp("02:00:00:00:00:01", "52:54:00:00:00:04", "10.65.0.4", "10.99.0.1", 9)
    words = ["s32.flood=5", f"s32.frame={frame}"]
    xml = domains.lxc_domain("c2", mac="52:54:00:00:00:04", addr4="10.65.0.4", words=words, target="vflood")
    node.write("/root/c2.xml", xml)
    node.run(["virsh", "-c", "lxc:///", "create", "/root/c2.xml"])
    time.sleep(0.5)
    received = int(node.read("/sys/class/net/vflood/statistics/rx_packets"))
    node.run(["virsh", "-c", "lxc:///", "destroy", "c2"])
    assert received > 100


def test_reboot_keeps_the_disk_and_nothing_else(node: Node) -> None:
    node.write("/root/kept", "yes\n")
    node.write("/run/lost", "yes\n")
    node.run(["ip", "route", "add", "10.66.0.0/24", "dev", "lo"])
    boot = node.read("/proc/sys/kernel/random/boot_id")
    assert node.reboot() == "running"
    assert node.read("/root/kept") == "yes\n"
    assert node.run(["cat", "/run/lost"], check=False).returncode != 0
    assert "10.66" not in node.run(["ip", "route"]).stdout
    assert node.read("/proc/sys/kernel/random/boot_id") != boot
    assert node.reboot(clean=True) == "running"


def test_down_leaves_nothing(rack: Rack) -> None:
    assert traces(NAME)
    rack.down()
    assert traces(NAME) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_can_be_rerun_at_once(how: signal.Signals) -> None:
    command = [sys.executable, str(REPO / "lab/rack"), "up", "--name", "tkill", "--hosts", "2"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not traces("tkill") and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    killed.send_signal(how)
    killed.wait(30)
    if how != signal.SIGKILL:
        assert traces("tkill") == []
    subprocess.run(command, check=True, timeout=120)
    subprocess.run([sys.executable, str(REPO / "lab/rack"), "down", "--name", "tkill"], check=True, timeout=60)
    assert traces("tkill") == []


def test_tied_nodes_die_with_their_owner() -> None:
    script = "import time; from lab.rack import Rack; r = Rack('ttied', 1); r.up()"
    script += "; print(r.node('h1').pid, flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    init = process.Process.of(int(owner.stdout.readline()))
    assert init.alive()
    owner.kill()
    owner.wait()
    assert init.wait_gone(5)
    Rack("ttied", 1, tied=False).down()
    assert traces("ttied") == []
