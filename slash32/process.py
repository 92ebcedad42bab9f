# Owns: what this process uses, for its metrics. Touches: /proc/self, its clocks.
from __future__ import annotations

import os
import resource
import time

from .metrics import Usage

_STARTED = time.time()
_PAGE = os.sysconf("SC_PAGE_SIZE")


def usage() -> Usage:
    with open("/proc/self/statm", "rb") as statm:
        pages = int(statm.read().split()[1])
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (of 1,000 connections: no Path each)
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Usage(pages * _PAGE, time.process_time(), files, most, _STARTED)
