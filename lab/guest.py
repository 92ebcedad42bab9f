"""What runs inside a lab guest: Debian's cloud kernel and a static busybox initrd for QEMU, a busybox root for LXC.

Owns cache/guest-HASH, an overlay layer that puts all of it under /opt/guest of every node; reads lab/guest/*, downloads
two Debian packages with apt-get and touches nothing else.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from lab.base import remove_tree
from lab.paths import LabError, cache, digest, locked, say

SOURCES = Path(__file__).parent / "guest"
_MODULES = """
virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net af_packet
"""
MODULES = _MODULES.split()
TOOLS = ("addr6", "frames", "probe", "serve", "stream")
FOLDERS = ("bin", "dev", "proc", "sys", "lib/mod", "etc", "root", "tmp", "run", ".oldroot")
TMPFILES = "d /run/slash32-lab 0777 root root -\n"
VERSION = "2"


def layer() -> Path:
    """The overlay layer with /opt/guest, built if its inputs have no cached result (about 5 s)."""
    inputs = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    done = cache() / f"guest-{digest(VERSION, TMPFILES, *MODULES, *inputs)}"
    if not done.exists():
        with locked("guest"):
            if not done.exists():
                _build(done)
    return done


def tool(name: str) -> Path:
    """The path on this machine of a guest tool (frames, probe, serve, stream), to run in the tor."""
    return layer() / "opt/guest/bin" / name


def _build(done: Path) -> None:
    say("guest: building kernel, initrd and container root (once, about 5 s)")
    temporary = done.with_suffix(".tmp")
    remove_tree(temporary)
    top = temporary / "opt/guest"
    (top / "bin").mkdir(parents=True)
    parts = cache() / "guest-parts"
    release = _download(parts)
    shutil.copy(parts / f"boot/vmlinuz-{release}", top / "vmlinuz")
    _tools(top / "bin")
    _root(top / "lxcroot", parts, top / "bin")
    _initrd(top, parts)
    tmpfiles = temporary / "etc/tmpfiles.d/slash32-lab.conf"
    tmpfiles.parent.mkdir(parents=True)
    tmpfiles.write_text(TMPFILES)
    subprocess.run(["chmod", "-R", "a+rX", str(temporary)], check=True)
    temporary.rename(done)


def _download(parts: Path) -> str:
    """Unpack the cloud kernel and busybox into PARTS (kept); return the kernel release."""
    stamp = parts / "release"
    if stamp.exists():
        return stamp.read_text()
    remove_tree(parts)
    parts.mkdir()
    depends = _output(["apt-cache", "depends", "linux-image-cloud-amd64"], parts)
    found = re.search(r"Depends: linux-image-(\S+)", depends)
    if not found:
        raise LabError("apt knows no linux-image-cloud-amd64: run 'apt-get update', then again")
    packages = [f"linux-image-{found.group(1)}", "busybox-static"]
    say(f"guest: downloading {' '.join(packages)}")
    _output(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *packages], parts)
    for package in parts.glob("*.deb"):
        _output(["dpkg-deb", "-x", str(package), "."], parts)
        package.unlink()
    stamp.write_text(found.group(1))
    return found.group(1)


def _tools(where: Path) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    _output(["gcc", "-Os", "-Wall", "-static", "-s", *sources, "-o", str(where / "s32tool")], where)
    for name in TOOLS:
        (where / name).symlink_to("s32tool")


def _root(root: Path, parts: Path, tools: Path) -> None:
    """A busybox root with the guest's init: as it is for LXC, with modules added for QEMU."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    busybox = str(shutil.copy(parts / "bin/busybox", root / "bin/busybox"))
    for applet in _output([busybox, "--list"], root).split():
        if applet not in ("busybox", "init"):
            (root / "bin" / applet).symlink_to("busybox")
    shutil.copy(tools / "s32tool", root / "bin/s32tool")
    for name in TOOLS:
        (root / "bin" / name).symlink_to("s32tool")
    for source, target in (("init", "bin/init"), ("door", "bin/door"), ("udhcpc.sh", "etc/udhcpc.sh")):
        Path(shutil.copy(SOURCES / source, root / target)).chmod(0o755)


def _initrd(top: Path, parts: Path) -> None:
    root = top.parent / "initrd"
    shutil.copytree(top / "lxcroot", root, symlinks=True)
    (root / "init").symlink_to("bin/init")
    order = []
    for module in MODULES:
        found = sorted(parts.glob(f"lib/modules/*/kernel/**/{module}.ko"))
        if found:  # else it is built into this kernel
            shutil.copy(found[0], root / "lib/mod")
            order.append(module)
    (root / "lib/mod/order").write_text("".join(f"{module}\n" for module in order))
    _output(["sh", "-c", f"find . | cpio -o -H newc --quiet | gzip -9n > {top}/initrd.gz"], root)
    remove_tree(root)


def _output(command: list[str], where: Path) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise LabError(f"guest: {command[0]} failed with {done.returncode}: {' '.join(last)}")
    return done.stdout
