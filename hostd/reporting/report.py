# Owns: `slash32-hostd status` as people and programs read it. Touches: the status file that the daemon writes, and the
# daemon's socket, to have it written now.
from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from ..guests.inbox import STATUS, VERSION

PATIENCE = 3.0  # seconds for a running daemon to answer
LAST_WORD = "the kernel stays as it is, new guests are isolated; what follows is the daemon's last word"
STATES = {
    "running": "running",
    "stopped": f"NOT RUNNING: {LAST_WORD}",
    "silent": f"NOT ANSWERING: {LAST_WORD}",
}
SEE = "see systemctl status slash32-hostd"


def show(folder: Path, output: str) -> int:
    """1 where there is no daemon, or where something is wrong with what it reports."""
    try:
        state = bring_up_to_date(folder / "hook.sock")
        said: dict[str, Any] = json.loads((folder / "hostd.status").read_text())
    except FileNotFoundError:
        return _nothing(f"no status: the daemon has not run since this host was booted; {SEE}")
    except PermissionError:
        return _nothing("permission denied; run this as root")
    except ValueError:
        return _nothing(f"{folder / 'hostd.status'}: not what the daemon writes; restart slash32-hostd")
    said |= {"state": state, "running": state == "running"}
    if output == "json":
        print(json.dumps(said, indent=2, sort_keys=True))
    elif output == "yaml":
        import yaml

        print(yaml.safe_dump(said, sort_keys=True), end="")
    else:
        for line in _lines(said, wide=output == "wide"):
            print(line)
    return 0 if said["running"] and not said["failures"] and not said["held"] else 1


def _nothing(why: str) -> int:
    print(f"slash32-hostd: {why}", file=sys.stderr)
    return 1


def bring_up_to_date(path: Path) -> str:
    """The daemon brings its file up to date before it answers; one of STATES."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.connect(str(path))
            connection.sendall("\1".join([VERSION, "hostd", "-", STATUS, "now"]).encode() + b"\0")
            connection.shutdown(socket.SHUT_WR)
            return "running" if connection.recv(1) else "silent"
        except TimeoutError:
            return "silent"
        except (FileNotFoundError, ConnectionError):
            return "stopped"


def _lines(said: dict[str, Any], wide: bool) -> list[str]:
    head = [
        f"host {said['host']}: {STATES[said['state']]}",
        f"dispatcher: {said['dispatcher'] or 'none configured'}"
        + (f" to {said['dispatcher_endpoint']}" if said["connected"] else "")
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
