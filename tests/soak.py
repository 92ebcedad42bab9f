# Owns: `make soak`: three verdicts on random worlds for a time, or on so many; it says which seeds it judges, and stops
# at the first that differs, with its smallest form. Needs root.
from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "kernel")]


def main() -> int:
    from three import KINDS, Figures, outcomes

    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--worlds", type=int, default=0, help="instead of a time")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9), help="the first one")
    parser.add_argument("--filter", choices=KINDS, action="append", dest="kinds", help="only this packet filter")
    parser.add_argument("--jobs", type=int, default=0)
    asked = parser.parse_args()
    begun, said = time.monotonic(), 0.0

    def seeds() -> Iterator[int]:
        seed = asked.seed
        while seed - asked.seed < asked.worlds / 2 if asked.worlds else time.monotonic() - begun < asked.seconds:
            yield seed
            seed += 1

    figures = Figures()
    print(f"soak: from seed {asked.seed} on", flush=True)
    for one in outcomes(seeds(), asked.kinds or KINDS, asked.jobs):
        figures.add(one)
        if one.finding:
            print(one.finding, flush=True)
            return 1
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"soak: {said - begun:5.0f} s, up to seed {one.seed}: {figures}", flush=True)
    print(f"soak: all agree; seeds {asked.seed} on: {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
