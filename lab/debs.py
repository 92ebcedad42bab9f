"""The .debs under test as one more overlay layer: apt-get install in a chroot over the base, cached by their content.

Owns cache/debs-HASH. The chroot runs in mount, pid and network namespaces of its own: no service starts, nothing is
fetched, no mount is left. What a package makes for one machine alone (keys) it must make when its service starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.base import remove_tree, run_slow
from lab.paths import LabError, cache, digest, locked, say

INSTALL = "apt-get -q install -y --no-install-recommends -o Dpkg::Options::=--force-confdef"

SCRIPT = r"""
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"
mount -t proc proc "$4/proc"; mount -t tmpfs tmpfs "$4/run"; mount -t tmpfs tmpfs "$4/tmp"; mount --rbind /dev "$4/dev"
printf '#!/bin/sh\nexit 101\n' > "$4/usr/sbin/policy-rc.d"; chmod +x "$4/usr/sbin/policy-rc.d"
mkdir "$4/tmp/debs"; cp "$5"/*.deb "$4/tmp/debs"
chroot "$4" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive sh -c '__INSTALL__ /tmp/debs/*.deb'
rm -rf "$4/usr/sbin/policy-rc.d" "$4"/var/cache/apt/*.bin
""".replace("__INSTALL__", INSTALL)


def layer(debs: Sequence[Path], lower: Sequence[Path]) -> Path:
    """The layer with DEBS installed over LOWER (uppermost first), made if there is none yet (some seconds)."""
    for deb in debs:
        if not deb.is_file():
            raise LabError(f"{deb}: no such .deb: run 'make deb'")
    contents = [deb.read_bytes() for deb in sorted(debs, key=lambda each: each.name)]
    done = cache() / f"debs-{digest(SCRIPT, *(path.name for path in lower), *contents)}"
    if not done.exists():
        with locked("debs"):
            if not done.exists():
                _build(debs, lower, done)
    return done


def _build(debs: Sequence[Path], lower: Sequence[Path], done: Path) -> None:
    say(f"debs: installing {' '.join(deb.name for deb in debs)} into a layer")
    temporary = done.with_suffix(".tmp")
    remove_tree(temporary)
    parts = [temporary / name for name in ("up", "work", "root", "debs")]
    for part in parts:
        part.mkdir(parents=True)
    for deb in debs:
        (parts[3] / deb.name).symlink_to(deb.resolve())
    arguments = [":".join(str(each) for each in lower), *(str(part) for part in parts)]
    isolated = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    run_slow([*isolated, "bash", "-eux", "-c", SCRIPT, "layer", *arguments], cache() / f"{done.name}.log", "debs")
    parts[0].rename(done)
    remove_tree(temporary)
