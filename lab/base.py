"""The root of every lab node: a Debian hypervisor made once by mmdebstrap, kept as a read-only overlay layer.

Owns cache/base-SUITE-HASH and cache/*.log; reads the machine's own apt sources and touches nothing else of it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from lab.paths import LabError, cache, digest, locked, say

_PACKAGES = """
systemd systemd-sysv dbus udev openssh-server openssh-client ca-certificates sudo
iproute2 iputils-ping procps kmod nftables iptables ipset conntrack tcpdump strace sqlite3 bird2 dnsmasq-base
libvirt-daemon-system libvirt-clients libvirt-daemon-driver-lxc libvirt-daemon-driver-qemu qemu-system-x86
python3 python3-apt python3-libvirt python3-pyroute2 python3-zmq python3-lxml python3-msgpack python3-yaml
python3-click python3-aiohttp python3-attr python3-cattr python3-rich python3-prometheus-client python3-iptables
python3-lark python3-nftables
"""
PACKAGES = _PACKAGES.split()

# Units that make no sense in a node (no hardware) or would wake up during a test.
_MASKED = """
systemd-machined.service systemd-udevd.service systemd-udev-trigger.service systemd-udevd-kernel.socket
systemd-udevd-control.socket apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer getty@tty1.service
console-getty.service e2scrub_reap.service e2scrub_all.timer fstrim.timer logrotate.timer
systemd-tmpfiles-clean.timer
"""
MASKED = _MASKED.split()

SSH_CONFIG = r"Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"

# Each line runs with $1 = the new root. machined is diverted: with cgroup v1, libvirt-lxc asks it for a machine that it
# does not know and every container start fails.
HOOKS = [
    'mkdir -m700 -p "$1/root/.ssh"; ssh-keygen -qt ed25519 -N "" -C slash32-lab -f "$1/root/.ssh/id_ed25519"',
    'cp "$1/root/.ssh/id_ed25519.pub" "$1/root/.ssh/authorized_keys"',
    f'printf "{SSH_CONFIG}" > "$1/root/.ssh/config"',
    'sed -i "s/^#UseDNS.*/UseDNS no/" "$1/etc/ssh/sshd_config"',
    'chroot "$1" dpkg-divert --local --rename --add /usr/share/dbus-1/system-services/org.freedesktop.machine1.service',
    f'chroot "$1" systemctl mask {" ".join(MASKED)}',
    'chroot "$1" systemctl disable bird.service libvirt-guests.service nftables.service',
    ': > "$1/etc/machine-id"; mkdir -p "$1/opt/guest"',
]

OPTIONS = [
    "--mode=root",
    "--variant=minbase",
    "--format=directory",
    "--aptopt=APT::Install-Recommends false",
    "--aptopt=Acquire::Languages none",
    "--dpkgopt=force-unsafe-io",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
]

APT_KEYS = ("Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::http::Proxy", "Acquire::https::Proxy")


def root(suite: str = "bookworm") -> Path:
    """The hypervisor root for SUITE, built if its recipe has no cached result (about 50 s)."""
    sources = _sources(suite)
    recipe = digest(suite, sources, *PACKAGES, *HOOKS, *OPTIONS)
    done = cache() / f"base-{suite}-{recipe}"
    if not done.exists():
        with locked("base"):
            if not done.exists():
                _build(suite, sources, done)
    return done


def ssh_key(suite: str = "bookworm") -> Path:
    """The private key that opens root on every node (made with the base, used only inside the lab)."""
    return root(suite) / "root/.ssh/id_ed25519"


def _sources(suite: str) -> str:
    """The machine's own Debian sources, as text, with its release replaced by SUITE."""
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M)
    here = release.group(1) if release else "bookworm"
    folder = Path("/etc/apt/sources.list.d")
    usual = folder / "debian.sources"
    others = sorted({*folder.glob("*.sources"), *folder.glob("*.list")} - {usual})
    for path in (usual, Path("/etc/apt/sources.list"), *others):  # one file: deb822 and plain lines do not mix
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
            text = "\n".join(lines).strip() + "\n"
            if re.search(rf"\b{here}\b", text) and re.search(r"\bmain\b", text):
                return re.sub(rf"\b{here}\b", suite, text)
    raise LabError(f"no Debian apt source for {here} in /etc/apt/sources.list or {folder}: add one, then run again")


def _apt_options() -> list[str]:
    """Proxy and date settings of this machine's apt, which mmdebstrap does not read by itself."""
    dump = subprocess.run(["apt-config", "dump", *APT_KEYS], capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r'^([\w:-]+) "([^"]+)";$', dump, re.M)
    return [f'--aptopt={key} "{value}"' for key, value in pairs if key in APT_KEYS]


def _build(suite: str, sources: str, done: Path) -> None:
    if not shutil.which("mmdebstrap"):
        raise LabError("mmdebstrap is missing: run 'make deps'")
    temporary = done.with_suffix(".tmp")
    remove_tree(temporary)
    listing = cache() / (f"{done.name}.sources" if "Types:" in sources else f"{done.name}.list")
    listing.write_text(sources)
    hooks = [f"--customize-hook={hook}" for hook in HOOKS]
    # a mount namespace of its own: whatever happens to mmdebstrap, its mounts go with it
    command = ["unshare", "--mount", "--propagation", "private", "mmdebstrap", *OPTIONS, *_apt_options(), *hooks]
    command += [f"--include={','.join(PACKAGES)}", suite, str(temporary), str(listing)]
    say(f"base: building the Debian {suite} hypervisor root (once, about 50 s)")
    run_slow(command, cache() / f"{done.name}.log", "base")
    for name in ("var/lib/apt/lists", "var/cache/apt"):
        remove_tree(temporary / name, keep=True)
    temporary.rename(done)
    listing.unlink()
    say("base: built")


def run_slow(command: list[str], log: Path, what: str) -> None:
    """Run COMMAND with its output in LOG, a progress line every 5 s; its whole process group dies with us."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        last = time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                say(f"{what}: {_last_line(log)}")
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
        raise
    if process.returncode:
        raise LabError(f"{what}: {command[0]} failed with {process.returncode}: {_last_line(log)} (see {log})")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    full = [line.strip() for line in lines if line.strip()]
    return full[-1][-100:] if full else "starting"


def remove_tree(path: Path, keep: bool = False) -> None:
    """Delete PATH and all below it (with KEEP all below it), never crossing into a mounted file system."""
    if not path.exists():
        return
    below = ["-mindepth", "1"] if keep else []
    subprocess.run(["find", str(path), "-xdev", "-depth", *below, "-delete"], check=True)
