"""One boot of a lab node: a program of its own (python3 -I -S boot.py SPEC.json), the node's power supply.

Enters the node's cgroups and network namespace, makes the others, forks PID 1, which mounts the node's disk and file
systems and becomes systemd. Prints the pid of PID 1 on stdout and stays, so that killing it cuts the node's power; with
an owner it cuts the power itself when the owner is gone. Every mount is made in the node's own mount namespace: nothing
has to be unmounted, whatever dies first. Touches the SPEC's paths and its own namespaces only.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import stat
import sys
import uuid
from pathlib import Path
from typing import TypedDict


class Spec(TypedDict):
    """What one boot needs to know."""

    root: str  # empty folder to mount the disk on
    layers: list[str]  # read-only, uppermost first
    upper: str
    work: str
    boot_id: str
    netns: str
    cgroups: list[str]  # folders of ours, one in each hierarchy
    controllers: list[str]  # v1 hierarchies to mount in the node; empty: one cgroup2
    owned: bool  # stdin is a pipe whose other end the owner holds


NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE, SHARED = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 1 << 20
DETACH, PDEATHSIG, PIVOT_ROOT = 2, 1, 155 if os.uname().machine == "x86_64" else 41
STRICT = NOSUID | NODEV | NOEXEC
libc = ctypes.CDLL(None, use_errno=True)

# fuse: libvirt_lxc needs it. No kvm: the lab's guests run under TCG everywhere alike.
DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "net/tun": (10, 200),
    "fuse": (10, 229),
}
LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    call(libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), f"mount {target}")


def join(spec: Spec) -> None:
    """Enter the node's cgroups (before the cgroup namespace is made: they become its root) and its network."""
    for folder in spec["cgroups"]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for key in ("cpuset.cpus", "cpuset.mems"):  # a new v1 cpuset is empty and takes no process
            above = Path(folder).parent / key
            if above.exists() and "/cpuset/" in folder:
                (Path(folder) / key).write_text(above.read_text())
        (Path(folder) / "cgroup.procs").write_text(str(os.getpid()))
    descriptor = os.open(spec["netns"], os.O_RDONLY | os.O_CLOEXEC)
    call(libc.setns(descriptor, NEWNET), "setns")
    os.close(descriptor)


def leave(spec: Spec) -> None:
    """Go back to the parent cgroups: a process that the node cannot name makes its systemctl status fail with EIO."""
    for folder in spec["cgroups"]:
        (Path(folder).parent / "cgroup.procs").write_text(str(os.getpid()))


def mount_proc(root: str, boot_id: str) -> None:
    """/proc, with a boot id of its own and sysctls read-only but for net."""
    mount("proc", f"{root}/proc", "proc", STRICT)
    Path(boot_id).write_text(f"{uuid.uuid4()}\n")
    mount(boot_id, f"{root}/proc/sys/kernel/random/boot_id", flags=BIND)
    mount(f"{root}/proc/sys", f"{root}/proc/sys", flags=BIND | REC)
    mount(f"{root}/proc/sys/net", f"{root}/proc/sys/net", flags=BIND)
    mount("none", f"{root}/proc/sys", flags=REMOUNT | BIND | RDONLY)


def mount_cgroups(root: str, controllers: list[str]) -> None:
    """v1: name=systemd and the controllers, and no cgroup2: in hybrid mode libvirt_lxc and systemd disagree."""
    top = f"{root}/sys/fs/cgroup"
    if not controllers:
        mount("cgroup2", top, "cgroup2", STRICT)
        return
    mount("cgroup", top, "tmpfs", data="mode=755")
    for name in [*controllers, "systemd"]:
        Path(f"{top}/{name}").mkdir()
        mount("cgroup", f"{top}/{name}", "cgroup", STRICT, "none,name=systemd" if name == "systemd" else name)


def mount_dev(root: str) -> None:
    dev = f"{root}/dev"
    mount("dev", dev, "tmpfs", NOSUID, "mode=755")
    for folder in ("net", "pts", "shm"):
        Path(dev, folder).mkdir()
    for name, (major, minor) in DEVICES.items():
        os.mknod(f"{dev}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
    for name, target in LINKS.items():
        Path(dev, name).symlink_to(target)
    mount("devpts", f"{dev}/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=666,mode=620,gid=5")
    mount("shm", f"{dev}/shm", "tmpfs", NOSUID | NODEV, "mode=1777")


def become_systemd(spec: Spec) -> None:
    """In PID 1 of the new namespaces: mount everything, make the disk the root, exec init."""
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    call(libc.unshare(NEWNS), "unshare of mounts")  # here: pivot_root moves every process of its mount namespace
    os.umask(0)
    root = spec["root"]
    mount("none", "/", flags=REC | PRIVATE)
    data = f"lowerdir={':'.join(spec['layers'])},upperdir={spec['upper']},workdir={spec['work']}"
    mount("overlay", root, "overlay", data=data)
    mount_proc(root, spec["boot_id"])
    mount("sysfs", f"{root}/sys", "sysfs", STRICT)
    mount_cgroups(root, spec["controllers"])
    mount_dev(root)
    mount("run", f"{root}/run", "tmpfs", NOSUID | NODEV, "mode=755")
    os.chdir(root)
    call(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    call(libc.umount2(b".", DETACH), "umount of the old root")
    os.chdir("/")
    mount("none", "/", flags=REC | SHARED)
    os.umask(0o022)
    environment = {"container": "slash32-lab", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    os.execve("/sbin/init", ["/sbin/init"], environment)


def stay(child: int, owned: bool) -> None:
    """Wait for the end of PID 1, or of the owner, whichever comes first."""
    watched = [os.pidfd_open(child)] + ([0] if owned else [])
    ready, _, _ = select.select(watched, [], [])
    if 0 in ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    spec: Spec = json.loads(Path(sys.argv[1]).read_text())
    os.setsid()
    if os.fork():  # the caller needs no zombie of ours
        os._exit(0)
    join(spec)
    call(libc.unshare(NEWUTS | NEWIPC | NEWCGROUP | NEWPID), "unshare")
    answer = os.dup(1)
    os.dup2(2, 1)  # stderr is the node's console log
    child = os.fork()
    if child == 0:
        try:
            become_systemd(spec)
        except BaseException as error:
            print(f"boot: {error}", file=sys.stderr, flush=True)
        os._exit(70)
    leave(spec)
    os.write(answer, f"{os.getpid()} {child}\n".encode())
    os.close(answer)
    stay(child, spec["owned"])


if __name__ == "__main__":
    main()
