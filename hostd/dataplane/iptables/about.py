# Owns: whether an error (ICMP) that a guest sends is about a flow of its own: classic BPF on the packet that the error
# quotes. That was sent to the guest itself, or to what lies behind it. Pure.
from __future__ import annotations

from collections.abc import Iterable

from slash32.net import Prefix

from .lines import ACCEPT, ICMP, Line, goto, is_one, named

ABOUT = "s32-about"  # in forward
ABOUT_HOST = "s32-about-host"  # to the host
BEHIND_CHAINS = {"s32-about-behind": goto("s32-onto"), "s32-behind-host": ACCEPT}

# From the network header on. v4: X = its length; [X + 24] is the quoted destination, [12] the source. v6: ICMPv6 must
# follow at once; 8 and 72. The last two instructions are always yes and no.
_QUOTED = {4: 24, 6: 72}


def of_itself(version: int, act: tuple[str, ...]) -> Line:
    """The quoted packet's destination is this packet's source."""
    if version == 4:
        code = ["32 0 0 12", "2 0 0 0", "177 0 0 0", f"64 0 0 {_QUOTED[4]}", "97 0 0 0", "29 0 1 0"]
    else:
        words = [
            (f"32 0 0 {8 + 4 * n}", "7 0 0 0", f"32 0 0 {_QUOTED[6] + 4 * n}", f"29 0 {13 - 4 * n} 0") for n in range(4)
        ]
        code = ["48 0 0 6", "21 0 17 58", *(instruction for word in words for instruction in word)]
    return Line(_program(version, code), act)


def of_behind(behind: Iterable[tuple[str, Prefix]], version: int, act: tuple[str, ...]) -> list[Line]:
    """The quoted packet was sent to a prefix behind this tap."""
    return [
        Line((*named(True, tap), *_program(version, _within(prefix))), act, f"behind {tap}")
        for tap, prefix in sorted(behind)
        if prefix.version == version and is_one(tap)
    ]


def _within(prefix: Prefix) -> list[str]:
    width = len(prefix.network)
    mask = ((1 << 8 * width) - (1 << 8 * width - prefix.length)).to_bytes(width, "big")
    tests = []
    for at in range(0, width, 4):
        some, wanted = (int.from_bytes(of[at : at + 4], "big") for of in (mask, prefix.network))
        if some:
            tests.append((at, some, wanted))
    version = prefix.version
    head = ["177 0 0 0"] if version == 4 else ["48 0 0 6", f"21 0 {3 * len(tests) + 1} 58"]
    load = 64 if version == 4 else 32
    code = head
    for number, (at, some, wanted) in enumerate(tests, 1):
        to_no = 3 * (len(tests) - number) + 1
        code += [f"{load} 0 0 {_QUOTED[version] + at}", f"84 0 0 {some}", f"21 0 {to_no} {wanted}"]
    return code


def _program(version: int, code: Iterable[str]) -> tuple[str, ...]:
    whole = [*code, "6 0 0 1", "6 0 0 0"]
    return (*ICMP[version], "-m", "bpf", "--bytecode", f"{len(whole)},{','.join(whole)}")
