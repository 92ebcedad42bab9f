# Owns: a dispatcher whose database is on a small disk of its own, that fills up, or breaks down. Touches: a mount
# namespace and a loop device that it makes.
from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from dispatcher_rig import REPO, Dispatcher, until

SIZE = 4 << 20


class SmallDisk:
    """A file system that only this object's namespace has. `kind`: tmpfs, which is full at once and exactly; ext4,
    which can break down."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._kind = kind
        self.inside = folder / "disk"
        self.inside.mkdir()
        self._image = folder / "image"
        self._ballast = 0
        if kind == "ext4":
            with self._image.open("wb") as file:
                file.truncate(SIZE)
            run("mkfs.ext4", "-q", str(self._image))
        self._holder = subprocess.Popen(["unshare", "-m", "sleep", "infinity"])
        until(self._apart)
        self.enter = ["nsenter", "-t", str(self._holder.pid), "-m", f"--wd={REPO}", "--"]
        self._mount()

    def _mount(self) -> None:
        what = ["-o", "loop", str(self._image)]
        if self._kind == "tmpfs":
            what = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs"]
        run(*self.enter, "mount", *what, str(self.inside))

    def _apart(self) -> bool:
        link = Path(f"/proc/{self._holder.pid}/ns/mnt")
        return link.readlink() != Path("/proc/self/ns/mnt").readlink()

    @property
    def outside(self) -> Path:
        """The same folder, for who is not in the namespace."""
        return Path(f"/proc/{self._holder.pid}/root{self.inside}")

    def fill(self) -> None:
        """To the last byte."""
        with (self.outside / f"ballast{self._ballast}").open("wb", buffering=0) as file:
            self._ballast += 1
            piece = bytes(64 << 10)
            while piece:
                try:
                    file.write(piece)
                except OSError:
                    piece = piece[: len(piece) // 2]

    def empty(self) -> None:
        for path in self.outside.glob("ballast*"):
            path.unlink()

    def break_down(self) -> None:
        """As ext4 does when its disk fails: nothing more is written there, whoever has files open."""
        run(*self.enter, "mount", "-o", "remount,abort", str(self.inside))

    def repair(self) -> None:
        """By whoever looks after the machine, with the dispatcher stopped."""
        run(*self.enter, "umount", str(self.inside))
        subprocess.run(["e2fsck", "-fy", str(self._image)], check=False, capture_output=True)
        self._mount()

    def close(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait(10)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


class OnSmallDisk(Dispatcher):
    def __init__(self, folder: Path, disk: SmallDisk) -> None:
        super().__init__(folder)
        self._disk = disk
        inside = disk.inside / "d.db"
        self.config.write_text(self.config.read_text().replace(str(self.database), str(inside)))
        self.database = disk.outside / "d.db"

    def command(self, verb: str) -> list[str]:
        return [*self._disk.enter, *super().command(verb)]
