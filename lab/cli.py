"""The command line lab/rack: up, down, status, exec, guest, logs, base. Owns its arguments, messages and exit codes
(0 done, 1 failed, 2 usage; exec and guest: the command's own); everything else is lab/rack.py's.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lab import base, guest, rack
from lab.access import guest_result
from lab.node import Node
from lab.paths import LabError, racks, say

EXAMPLES = """\
examples:
  lab/rack up --hosts 2 --dispatcher        h1, h2 (hypervisors) and d1 (dispatcher), in about a second
  lab/rack status
  lab/rack exec h1 -- virsh list --all      run a command on a node
  lab/rack exec h1 -- bash                  or a shell
  lab/rack guest h1 web1 -- probe 10.65.0.3 run a command inside a guest (probe, frames, stream, busybox)
  lab/rack logs h1 libvirtd                 the journal of a node, or of one of its units
  lab/rack down

Nodes are real Debian systems with systemd and libvirtd, in namespaces of this machine: h1 is 10.99.0.11 and fd99::11,
d1 is 10.99.0.10 and fd99::10, the top-of-rack router 10.99.0.1 and fd99::1; nothing leaves the machine. The first
command builds a base (about a minute, with progress); later ones use it. Run as root.
"""
CODES = "exit codes: 0 done, 1 failed, 2 usage; exec and guest: what the command itself says"


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    about = "A rack of hypervisors in one machine."
    all_of_it = f"{EXAMPLES}\n{CODES}"
    top = argparse.ArgumentParser("lab/rack", description=about, epilog=all_of_it, formatter_class=formatter)
    top.add_argument("--name", default="lab", help="which rack (default: lab); several can be up at once")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start a rack")
    up.add_argument("--hosts", type=int, default=2, metavar="N", help="hypervisors h1..hN (default: 2)")
    up.add_argument("--dispatcher", type=int, nargs="?", const=1, default=0, metavar="N", help="dispatchers d1..dN (1)")
    up.add_argument("--suite", default="bookworm", help="Debian release of the nodes: bookworm or trixie")
    up.add_argument("--host-deb", type=Path, action="append", default=[], metavar="FILE", help="install on hypervisors")
    up.add_argument("--dispatcher-deb", type=Path, action="append", default=[], metavar="FILE", help="on dispatchers")
    up.add_argument("--legacy", action="append", default=[], metavar="HOST", help="HOST has iptables-legacy")
    down = commands.add_parser("down", help="stop a rack and remove every trace of it")
    down.add_argument("--all", action="store_true", help="all racks of this machine")
    commands.add_parser("status", help="the nodes of a rack")
    run = commands.add_parser("exec", help="run a command on a node")
    run.add_argument("node")
    run.add_argument("argv", nargs="+", metavar="-- COMMAND")
    inside = commands.add_parser("guest", help="run a command inside a guest")
    inside.add_argument("node")
    inside.add_argument("guest")
    inside.add_argument("argv", nargs="+", metavar="-- COMMAND")
    logs = commands.add_parser("logs", help="the journal of a node")
    logs.add_argument("node")
    logs.add_argument("unit", nargs="?", help="only this unit")
    logs.add_argument("-n", type=int, default=200, dest="lines", help="last lines (default: 200)")
    built = commands.add_parser("base", help="build what nodes and guests are made of, if it is not there yet")
    built.add_argument("--suite", default="bookworm")
    for name, command in commands.choices.items():
        lines = [line for line in EXAMPLES.splitlines() if line.startswith(f"  lab/rack {name}")]
        command.epilog = "\n".join(["examples:", *(lines or [f"  lab/rack {name}"]), "", CODES])
        command.formatter_class = formatter  # --name is welcome after the command too
        command.add_argument("--name", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if os.geteuid() != 0:
        print("lab/rack: run as root: it makes namespaces and mounts", file=sys.stderr)
        return 1
    try:
        return _do(options)
    except LabError as error:
        print(f"lab/rack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab/rack: interrupted, cleaned up", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up is not to be interrupted in turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _do(options: argparse.Namespace) -> int:
    match options.command:
        case "up":
            return _up(options)
        case "down":
            for name in rack.names() if options.all else [options.name]:
                rack.Rack(name, tied=False).down()
                say(f"rack {name}: gone")
        case "status":
            print("\n".join(rack.status(options.name)))
        case "exec":
            return rack.shell(_node(options), options.argv)
        case "guest":
            result = guest_result(_node(options), options.guest, options.argv, timeout=60)
            sys.stdout.write(result.stdout)
            sys.stderr.write(result.stderr)
            return result.returncode
        case "logs":
            node = _node(options)
            print(node.journal(options.unit, options.lines) if node.running else node.console(options.lines))
        case "base":
            print(base.root(options.suite))
            print(guest.layer())
    return 0


def _node(options: argparse.Namespace) -> Node:
    return rack.Rack.attach(options.name).node(options.node)


def _up(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, _interrupt)
    debs = {"host_debs": options.host_deb, "dispatcher_debs": options.dispatcher_deb}
    kinds = {"suite": options.suite, "legacy": options.legacy}
    made = rack.Rack(options.name, options.hosts, options.dispatcher, **kinds, tied=False, **debs)
    ready = (racks() / options.name / "ready").exists()
    if ready and all(node.running for node in rack.Rack.attach(options.name).nodes):
        print(f"lab/rack: rack {options.name} is already up (lab/rack down ends it)", file=sys.stderr)
        return 0
    made.up()
    return 0
