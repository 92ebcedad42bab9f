# Owns: how taps come from one class of policies to another so that at no moment a packet passes that neither the old
# policy nor the new one allows. A class that all its taps leave for the same new one is turned: its device group says
# so in the very transaction that changes everything else. A tap that leaves alone is parked meanwhile, in a group that
# is no class: what is established goes on, what is new is dropped. Pure.
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..compiler.desired import Actual, ClassChains, Tap
from ..compiler.forwarding import SetGroup

PARKED = 0xFFFF  # above the base of our device groups; no class gets it


def turned(taps: Mapping[int, Tap], actual: Actual, new: Collection[ClassChains]) -> dict[ClassChains, int]:
    """Of new classes those that take over the device group of one that all taps leave for them."""
    leaving: dict[int, set[ClassChains]] = {}
    for ifindex, have in actual.taps.items():
        if have.group in actual.classes and ifindex in taps:
            leaving.setdefault(have.group, set()).add(taps[ifindex].chains)
    stay = {tap.chains for tap in taps.values()}
    unknown = (have.group for ifindex, have in actual.taps.items() if ifindex not in taps)
    for group in {*actual.foreign_groups.values(), *unknown, *(g for g in leaving if actual.classes[g] in stay)}:
        leaving.pop(group, None)  # somebody is in it, or comes
    return {only: group for group, (only, *more) in leaving.items() if not more and only in new}


def parking(opening: Sequence[object], actual: Actual, group_base: int, alone: bool) -> list[SetGroup]:
    """For the taps that get another class by `opening`. `alone`: nothing else changes what a packet meets."""
    groups = {op.ifindex: actual.taps[op.ifindex].group for op in opening
              if isinstance(op, SetGroup) and op.ifindex in actual.taps}  # fmt: skip
    moving = [ifindex for ifindex, group in groups.items() if group in actual.classes]
    return [] if alone and len(moving) == 1 else [SetGroup(ifindex, group_base | PARKED) for ifindex in moving]
