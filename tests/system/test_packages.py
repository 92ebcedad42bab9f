# The .debs on a real hypervisor: installed beside running guests, upgraded, removed, purged. One node; the tests follow
# each other like an operator's days.
from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab import access, domains, product
from lab.node import Node
from lab.process import CommandError
from lab.rack import Rack

REPO = Path(__file__).parents[2]
FULL = os.environ.get("SLASH32_COUNTS") == "full"
OTHER = "nft add table inet other; nft add chain inet other c; nft add rule inet other c counter"
# Connection counters come and go.
RULES = "nft -a list ruleset | sed 's/packets [0-9]* bytes [0-9]*//; /ct count over/d'"
OLD, NEW = "10.65.0.50", "10.65.0.51"
A1, A2 = "10.65.0.61", "10.65.0.62"
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: one-way}
spec:
  selector: all()
  types: [Ingress, Egress]
  ingress: [{action: Allow, protocol: TCP, source: {selector: role == "a1"}, destination: {ports: [5432]}}]
  egress: [{action: Allow}]
"""
HOOKS = ("/etc/libvirt/hooks/qemu.d/50-slash32", "/etc/libvirt/hooks/lxc.d/50-slash32")
UNITS = ("slash32-guard", "slash32-hostd", "slash32-dispatcher")
TAGGED = b"<domain><metadata><endpoint xmlns='urn:slash32:domain:1'/></metadata></domain>".decode()
# What differs between two looks at an idle Debian, too.
LIVELY = r"-path /var/cache -o -path /var/log -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/libvirt"
NOISE = r"-name __pycache__ -o -name random-seed -o -name credential.* -o -name timesync -o -name '*-' -o -name .pwd*"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")


def build(*arguments: str, tree: Path = REPO) -> list[Path]:
    done = subprocess.run([tree / "packaging/deb/build", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Path(line) for line in done.stdout.splitlines() if line.endswith(".deb")]


@pytest.fixture(scope="module")
def debs() -> list[Path]:
    return build()


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The next release, in which the shipped hostd.toml has changed."""
    tree = tmp_path_factory.mktemp("newer")
    hidden = shutil.ignore_patterns(".*", "dist", "tests", "lab", "__pycache__")
    shutil.copytree(REPO, tree, ignore=hidden, dirs_exist_ok=True)
    with (tree / "packaging/deb/debian/system/hostd.toml").open("a") as file:
        file.write("\n# A new remark.\n")
    return build("--version", "99.0", tree=tree)


@pytest.fixture(scope="module", params=["bookworm", "trixie"] if FULL else ["bookworm"])
def rack(request: pytest.FixtureRequest) -> Iterator[Rack]:
    with Rack("tpkg", hosts=1, suite=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def node(rack: Rack) -> Node:
    return rack.node("h1")


@pytest.fixture(scope="module")
def before(node: Node) -> dict[str, str]:
    """The host before us: foreign tables and routes, an untagged guest that can be reached, libvirtd with no hooks."""
    node.sh(OTHER)
    node.sh("ip route add 10.77.0.0/24 dev lo proto static; ip -6 route add fd77::/64 dev lo proto static")
    start_guest(node, "old1", "52:54:00:00:00:50", OLD)
    assert reaches(node, OLD)
    return look(node) | {"pid": main_pid(node, "libvirtd")}


@pytest.fixture(scope="module")
def fleet(node: Node) -> None:
    """This host is the fleet: a dispatcher of its own and two guests, of which a1 may speak to a2 and not back."""
    key = node.sh("slash32-dispatcher key").strip()
    config = product.host_config(node, node, key) + "conn_limit = 4242\n"
    node.write("/etc/slash32/hostd.toml", node.read("/etc/slash32/hostd.toml") + config)
    node.sh("systemctl restart slash32-hostd")
    host = json.dumps(product.host_resource(node, product.public_key(node)))
    node.run(["slash32", "apply", "-f", "-"], input=f"{host}\n---{POLICY}")
    for name, mac, address in (("a1", "52:54:00:00:00:61", A1), ("a2", "52:54:00:00:00:62", A2)):
        create(node, domains.lxc_domain(name, mac=mac, addr4=address, labels={"role": name}))
        access.wait_guest(node, name)
    product.wait_connected(node, "a1", "a2")


def create(node: Node, xml: str) -> None:
    node.write("/root/guest.xml", xml)
    node.run(["virsh", "-c", "lxc:///", "create", "/root/guest.xml"])


def destroy(node: Node, *names: str) -> None:
    for name in names:
        node.run(["virsh", "-c", "lxc:///", "destroy", name])


def one_way(node: Node) -> None:
    assert access.probe(node, "a1", [A2])[A2, "5432"]
    assert not any(access.probe(node, "a2", [A1]).values())


def start_guest(node: Node, name: str, mac: str, address: str, tag: bool | str = False) -> str:
    """An LXC guest, with a route to it by hand; the name of its interface."""
    create(node, domains.lxc_domain(name, mac=mac, addr4=address, tag=tag))
    access.wait_guest(node, name)
    tap = node.sh(f"virsh -c lxc:/// -q domiflist {name} | awk '{{print $1}}'").strip()
    node.sh(f"ip address add 169.254.1.1/32 dev {tap}; ip route replace {address}/32 dev {tap}")
    return tap


def reaches(node: Node, address: str) -> bool:
    return node.run(["ping", "-c1", "-W1", address], check=False).returncode == 0


def main_pid(node: Node, unit: str) -> str:
    return node.sh(f"systemctl show -P MainPID {unit}").strip()


def look(node: Node) -> dict[str, str]:
    """What others may notice of us: files, their text in /etc, users, tables, routes, links, units."""
    return {
        "files": node.sh(f"find /etc /usr /var \\( {LIVELY} -o {NOISE} \\) -prune -o -printf '%p %y %m %U\\n' | sort"),
        "etc": node.sh(f"find /etc \\( {NOISE} \\) -prune -o -type f -print0 | sort -z | xargs -0 md5sum"),
        "ours in dpkg": node.sh("ls /var/lib/dpkg/info /var/lib/systemd/deb-systemd-helper* | grep slash32 || :"),
        "packages": node.sh("dpkg-query -W -f '${Package} ${Status}\\n'"),
        "users": node.sh("getent passwd; getent group"),
        "tables": node.sh("nft list ruleset"),
        "routes": node.sh("ip -4 route show table all; ip -6 route show table all | grep -v fe80 | sort"),
        "groups": node.sh("ip -o link | sed 's/.*: \\([^:]*\\): .* \\(group [^ ]*\\) .*/\\1 \\2/'"),
        "failed": node.sh("systemctl --failed --plain --no-legend"),
    }


def differs(now: dict[str, str], then: dict[str, str]) -> dict[str, set[str]]:
    pairs = ((key, set(now[key].splitlines()) ^ set(then[key].splitlines())) for key in now)
    return {key: lines for key, lines in pairs if lines}


def wait_for(node: Node, condition: str, seconds: float = 10) -> None:
    """Until the shell CONDITION holds on the node."""
    until = time.monotonic() + seconds
    while node.run(["sh", "-c", condition], check=False).returncode:
        assert time.monotonic() < until, f"never: {condition}\n{node.journal('slash32-*', 30)}"
        time.sleep(0.02)


def answers(node: Node) -> list[int]:
    """The exit codes of both hooks for a tagged domain."""
    return [node.run([hook, "g", "prepare", "begin", "-"], check=False, input=TAGGED).returncode for hook in HOOKS]


def test_the_same_sources_make_the_same_packages(debs: list[Path], tmp_path: Path) -> None:
    again = build("--out", str(tmp_path))
    assert [each.name for each in again] == [each.name for each in debs]
    assert [each.read_bytes() for each in again] == [each.read_bytes() for each in debs]
    assert "E:" not in lintian(again)


def lintian(debs: list[Path]) -> str:
    command = ["lintian", "--allow-root", "--fail-on", "none", *map(str, debs)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_install(rack: Rack, node: Node, before: dict[str, str], debs: list[Path]) -> None:
    rack.install(debs)
    assert main_pid(node, "libvirtd") == before["pid"], "libvirtd was restarted"
    for unit in UNITS:
        assert node.sh(f"systemctl is-enabled {unit}; systemctl is-active {unit}").split() == ["enabled", "active"]
    for unit in UNITS[1:]:
        assert node.sh(f"systemctl show -P Type -P SubState {unit}").split() == ["notify", "running"]
    assert node.sh("systemctl is-system-running").strip() == "running"


def test_nothing_of_others_was_touched(node: Node, before: dict[str, str]) -> None:
    now = look(node)
    for key in ("tables", "routes", "users", "etc", "files"):
        gone = set(before[key].splitlines()) - set(now[key].splitlines())
        assert not {line for line in gone if "/etc/passwd" not in line and not shadowed(line)}, key


def shadowed(line: str) -> bool:
    """Files that a new user changes, folders' times aside."""
    return any(name in line for name in ("/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/ld.so.cache"))


def test_files_and_modes(node: Node) -> None:
    modes = {
        "/etc/slash32": "755 root",
        "/etc/slash32/hostd.toml": "644 root",
        "/etc/slash32/dispatcher.toml": "644 root",
        "/run/slash32-dispatcher/api.sock": "660 slash32",
        "/run/slash32/hook.sock": "600 root",
        "/var/lib/slash32": "700 root",
        HOOKS[0]: "755 root",
        HOOKS[1]: "755 root",
        "/etc/iproute2/rt_protos.d/slash32.conf": "644 root",
        "/var/lib/slash32-dispatcher": "700 slash32",
        "/run/slash32": "755 root",
    }
    said = node.sh(f"stat -c '%n:%a %U' {' '.join(modes)}")
    assert dict(line.split(":") for line in said.splitlines()) == modes
    secrets = node.sh("find /var/lib/slash32 /var/lib/slash32-dispatcher -name '*key*' -perm /077").split()
    assert secrets == []
    node.sh("ip route show proto slash32")
    assert node.sh("ls /usr/share/slash32/*/__pycache__").count(".pyc") > 10, "compiled when it was configured"


def test_the_units_are_sound_and_confined(node: Node) -> None:
    units = [f"{unit}.service" for unit in (*UNITS, "nftables")]
    said = node.run(["systemd-analyze", "verify", "--man=no", *units])
    assert said.stderr.strip() == "" == said.stdout.strip()
    for unit in UNITS[1:]:
        inside = ["nsenter", "-t", main_pid(node, unit), "-m", "touch", "/usr/x"]
        assert "Read-only" in node.run(inside, check=False).stderr
    order = node.sh("systemctl show -P Before slash32-guard").split()
    assert {"libvirtd.service", "virtqemud.service", "virtlxcd.service", "network-pre.target"} <= set(order)


def test_a_guest_that_ran_before_keeps_its_network(node: Node) -> None:
    assert "52:54:00:00:00:50" in node.read("/etc/slash32/guard-exempt")
    assert reaches(node, OLD)


def test_an_untagged_guest_that_comes_later_is_isolated(node: Node) -> None:
    start_guest(node, "new1", "52:54:00:00:00:51", NEW)
    assert not reaches(node, NEW)  # OLD, above, is the control


def test_libvirtd_found_the_hooks(node: Node) -> None:
    broken = domains.tag_xml("52:54:00:00:00:52", ["not-an-address"], {})
    with pytest.raises(CommandError, match="not-an-address"):
        start_guest(node, "bad1", "52:54:00:00:00:52", "10.65.0.52", broken)


@pytest.mark.parametrize("verb", ["reload", "restart", "stop", "start"])
def test_the_guard_survives_nftables_service(node: Node, verb: str) -> None:
    """hostd is dead, so it is not hostd that heals."""
    node.sh("systemctl stop slash32-hostd; systemctl start nftables")
    try:
        node.sh("nft add table inet witness")
        node.sh(f"systemctl {verb} nftables")
        tables = node.sh("nft list tables")
        assert verb == "start" or "witness" not in tables, "the flush happened"
        assert "table inet slash32" in tables
        assert not reaches(node, NEW)
    finally:
        node.sh(f"systemctl stop nftables; systemctl start slash32-hostd; {OTHER}")


@pytest.mark.usefixtures("fleet")
def test_upgrade(rack: Rack, node: Node, before: dict[str, str], newer: list[Path]) -> None:
    one_way(node)
    rules, pid = node.sh(RULES), main_pid(node, "slash32-hostd")
    exempt = node.read("/etc/slash32/guard-exempt")
    with ThreadPoolExecutor() as pool:
        flow = pool.submit(access.guest_run, node, "a1", ["stream", "tcp", A2, "5432", "60"], timeout=90)
        wait_for(node, f"conntrack -L -d {A2} -p tcp --dport 5432 2>&1 | grep -q ESTABLISHED")
        ping = node.popen(["ping", "-i", "0.01", "-W1", OLD])
        rack.install(newer)
        ping.send_signal(2)
        assert not flow.done(), "it outlived the upgrade"
        access.guest_run(node, "a1", ["sh", "-c", "kill -TERM $(pidof stream)"])
        said = flow.result()
    sent, echoed = (int(said.split(f"{word} ")[1].split()[0]) for word in ("sent", "echoed"))
    assert "broken no" in said and sent == echoed > 100, said  # how many depends on how long an upgrade takes
    said = ping.communicate()[0]
    assert " 0% packet loss" in said, said
    assert int(said.split(" packets transmitted")[0].split()[-1]) > 20
    assert node.sh(RULES) == rules
    one_way(node)
    assert node.sh("dpkg-query -W -f '${Version}' slash32-hostd") == "99.0"
    assert main_pid(node, "slash32-hostd") not in ("0", pid), "the new code runs"
    assert main_pid(node, "libvirtd") == before["pid"]
    assert "conn_limit = 4242" in node.read("/etc/slash32/hostd.toml")
    assert node.read("/etc/slash32/guard-exempt") == exempt, "only the first install lists guests"
    assert not reaches(node, NEW)


def test_remove_leaves_the_kernel_as_it_is(node: Node) -> None:
    tables = node.sh("nft list tables")
    node.run(["apt-get", "-q", "remove", "-y", "slash32-common"])
    assert node.sh("nft list tables") == tables
    assert "slash32" in tables
    assert node.sh("systemctl list-unit-files --plain --no-legend 'slash32*'", check=False) == ""
    assert "conn_limit = 4242" in node.read("/etc/slash32/hostd.toml")
    one_way(node)
    assert reaches(node, OLD)
    assert not reaches(node, NEW)


def test_a_hook_without_its_package_stops_no_guest(node: Node) -> None:
    node.sh(f"test -x {HOOKS[0]} && test -x {HOOKS[1]}")
    assert answers(node) == [0, 0]
    tag = domains.tag_xml("52:54:00:00:00:53", ["10.65.0.53"], {})
    start_guest(node, "later1", "52:54:00:00:00:53", "10.65.0.53", tag)
    destroy(node, "later1")


def test_purge_leaves_nothing(node: Node, before: dict[str, str]) -> None:
    tap = node.sh("virsh -c lxc:/// -q domiflist new1 | awk '{print $1}'").strip()
    node.sh(f"ip link set {tap} group $((0x53320007)); ip route add 10.79.0.0/24 dev lo proto 132")
    node.sh(f"ip -6 route add fd79::/64 dev {tap} proto 132; ip neigh add 10.79.0.1 lladdr 02:00:00:00:00:01 dev {tap}")
    node.run(["apt-get", "-q", "purge", "-y", "slash32-common", "slash32-hostd", "slash32-dispatcher"])
    assert node.sh(f"ip neigh show dev {tap} nud permanent; ip -6 address show dev {tap} | grep fe80::1/ || :") == ""
    assert not any(access.probe(node, "a1", [A2]).values()), "without its policy no guest is open"
    destroy(node, "new1", "a1", "a2")
    assert differs(look(node), before) == {}
    assert reaches(node, OLD)
    assert main_pid(node, "libvirtd") == before["pid"]


def test_purge_leaves_forwarding_on_where_a_bridge_may_need_it(rack: Rack, node: Node, debs: list[Path]) -> None:
    forwarding = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"
    assert node.sh(forwarding).split() == ["0", "0"]
    rack.install(debs)
    assert node.sh(forwarding).split() == ["1", "1"]
    node.sh("ip link add virbr9 type bridge")
    node.run(["apt-get", "-q", "purge", "-y", "slash32-hostd"])
    assert node.sh(f"{forwarding}; ip link del virbr9").split() == ["1", "1"]
    node.sh("echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")


def test_install_after_purge_is_a_first_install(rack: Rack, node: Node, debs: list[Path]) -> None:
    rack.install(debs)
    assert "52:54:00:00:00:50" in node.read("/etc/slash32/guard-exempt")
    assert reaches(node, OLD)
    assert node.sh("systemctl is-system-running").strip() == "running"


def test_boot_order(node: Node) -> None:
    """The guard stands before a guest can start, and after nftables.service has flushed; hooks are answered."""
    node.sh("systemctl enable nftables libvirtd")
    node.reboot()
    assert "table inet slash32" in node.sh("nft list tables")
    began = {unit: stamp(node, unit, "InactiveExit") for unit in ("slash32-guard", "slash32-hostd", "libvirtd")}
    ended = {unit: stamp(node, unit, "ActiveEnter") for unit in (*UNITS, "nftables", "libvirtd")}
    assert ended["nftables"] <= began["slash32-guard"] < ended["slash32-guard"] <= began["slash32-hostd"]
    assert ended["slash32-hostd"] <= began["libvirtd"] < ended["libvirtd"]
    assert node.sh("systemctl is-system-running").strip() == "running"


def stamp(node: Node, unit: str, what: str) -> int:
    return int(node.sh(f"systemctl show -P {what}TimestampMonotonic {unit}"))


def test_a_chroot_is_not_this_machine(node: Node) -> None:
    """A purge in a chroot on a hypervisor, as image builders do it, leaves the hypervisor's own kernel state alone."""
    purge = "/var/lib/dpkg/info/slash32-hostd.postrm purge"
    node.sh("systemctl stop slash32-hostd")
    mounts = "mount --bind / /mnt; mount -t tmpfs none /mnt/run; mount -t proc proc /mnt/proc; chroot /mnt"
    node.sh(f"unshare -m sh -ec '{mounts} {purge}'")
    assert "slash32" in node.sh("nft list tables")
    node.sh(purge)
    assert "slash32" not in node.sh("nft list tables")
