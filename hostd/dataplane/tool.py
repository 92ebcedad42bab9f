# Owns: asking the system's own tools (nft, iptables-legacy-save, ip) what they see. Touches: subprocesses.
from __future__ import annotations

import errno
import subprocess

_PATIENCE = 10  # seconds


def told(*command: str) -> subprocess.CompletedProcess[str]:
    """What it says, and its exit code. Raises OSError: it is not there, or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        words = f"{command[0]} does not answer within {_PATIENCE} s"
        raise OSError(errno.ETIMEDOUT, words) from None
