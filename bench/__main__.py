# Runs all benchmarks, one after the other, each in a process of its own.   python -m bench [--json] [--quick]
# Exit code 1: a bar is missed, or a benchmark failed.
from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ALL = {
    "hook": ["-n", "50"],
    "endpoint": ["-n", "20", "--present", "1,100"],
    "bulk": ["-n", "10", "--members", "10000", "--routes", "100"],
    "iptables": ["-n", "10", "--present", "1,100", "--members", "10000", "--policies", "50"],
    "packets": ["-n", "7", "--present", "2,100"],
    "labels": ["-n", "50", "--present", "1000,10000"],
    "diff": ["-n", "3", "--endpoints", "1000"],
    "hostd": ["-n", "5", "--few", "10", "--many", "100"],
    "fanout": ["-n", "5", "--storms", "1", "--hosts", "10,100", "--endpoints", "1000,10000"],
}  # and how to run it quickly, for a first look: such figures prove nothing


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--quick", action="store_true", help="few runs at a small scale")
    given = parser.parse_args()
    bad = []
    for name, quick in ALL.items():
        print(f"bench: {name}", file=sys.stderr, flush=True)
        options = ["--json"] * given.json + quick * given.quick
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *options], cwd=REPO, check=False).returncode:
            bad.append(name)
    if bad:
        print(f"bench: a bar is missed, or it failed: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
