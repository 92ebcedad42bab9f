# Owns: `slash32-hostd status` as people and programs read it. Touches: the status file that the daemon writes.
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def show(path: Path, output: str) -> int:
    """1 where there is no daemon, or where something is wrong with what it reports."""
    try:
        said: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        print("slash32-hostd: no status: the daemon has not run; `systemctl status slash32-hostd`", file=sys.stderr)
        return 1
    said["running"] = _runs(said["pid"])
    if output == "json":
        print(json.dumps(said, indent=2, sort_keys=True))
    elif output == "yaml":
        import yaml

        print(yaml.safe_dump(said, sort_keys=True), end="")
    else:
        for line in _lines(said, wide=output == "wide"):
            print(line)
    return 0 if said["running"] and not said["failures"] and not said["held"] else 1


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _lines(said: dict[str, Any], wide: bool) -> list[str]:
    head = [
        f"host {said['host']}: {'running' if said['running'] else 'NOT RUNNING: what follows is its last word'}",
        f"dispatcher: {said['dispatcher'] or 'none configured'}"
        + (f", in sync at revision {said['revision']}" if said["in_sync"] else f", last revision {said['revision']}"),
    ]
    if said["held"]:
        head.append(f"HELD: {said['held']}")
    rows = [("DOMAIN", "TAP", "STATE", "ADDRESSES", *(("LABELS", "MAC", "UUID") if wide else ()))]
    for e in said["endpoints"]:
        state = "connected" if e["connected"] else e["phase"] if e["phase"] != "live" else "isolated"
        labels = ",".join(f"{k}={v}" for k, v in sorted(e["labels"].items()))
        row = (ascii(e["domain"])[1:-1], e["tap"] or "-", state, ",".join(e["addresses"] + e["prefixes"]))
        rows.append((*row, *((labels, e["mac"], e["uuid"]) if wide else ())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{ascii(e['domain'])[1:-1]}: {e['problem']}" for e in said["endpoints"] if e["problem"]]
    notes += [f"refused: {line}" for line in said["failures"]]
    notes += [f"exempt from the guard: {line} (/etc/slash32/guard-exempt)" for line in said["exempt"]]
    return head + table + notes
