# Owns: the list of untagged guests that ran when slash32 was first installed: they are let be, and reported, until an
# operator removes them from it. Touches: that one file.
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slash32.model import EndpointKey
from slash32.net import parse_mac

PATH = Path("/etc/slash32/guard-exempt")
_HEAD = """\
# Untagged guests that ran when slash32 was installed: their taps are not isolated. One per line: uuid, MAC, name.
# Tag them, or shut them down, and remove their lines; then `systemctl restart slash32-hostd`.
"""


def listed(path: Path = PATH) -> dict[EndpointKey, str]:
    """(uuid, MAC) -> the guest's name. A line that cannot be read is no exemption."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        words = line.split(maxsplit=2)
        if len(words) >= 2 and not line.startswith("#"):
            try:
                found[EndpointKey(words[0].lower(), parse_mac(words[1]))] = words[2] if len(words) > 2 else ""
            except ValueError:
                continue  # nothing is exempted by mistake
    return found


def write(guests: Iterable[tuple[EndpointKey, str]], path: Path = PATH) -> None:
    lines = [f"{key.uuid} {key.mac} {ascii(name)[1:-1]}\n" for key, name in guests]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEAD + "".join(lines))
