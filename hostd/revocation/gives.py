# Owns: whether a chain allows all that another does, seen by its rules alone: where it is the other with rules between
# that can only accept. Most guests that join something come so into a class that takes nothing from them. Pure.
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..compiler.ruleset import Jump, Log, Rule, Verdict

Rules = Callable[[str], Sequence[Rule] | None]  # of a chain; None: not known for sure

_DEEP = 8  # jumps; deeper is not looked


def only_gives(before: Sequence[Rule], after: Sequence[Rule], chains: Rules) -> bool:
    """Every packet that `before` accepts `after` accepts, and what `before` leaves open is accepted or open in it.
    Chains that both ask must be the same before and after, but for members that only give. False: one cannot tell."""
    waiting, more = iter(before), list[Rule]()
    due = next(waiting, None)
    for rule in after:
        if rule == due:
            due = next(waiting, None)
        else:
            more.append(rule)
    return due is None and _only_accept(more, chains, _DEEP, own=False)


def _only_accept(rules: Iterable[Rule], chains: Rules, deep: int, own: bool) -> bool:
    """`own`: they are a chain of their own that is jumped to: to leave it takes nothing."""
    for rule in rules:
        match rule.verdict:
            case Verdict.ACCEPT | Verdict.CONTINUE | Log():
                continue
            case Verdict.RETURN if own:
                continue
            case Jump(chain) if deep:
                found = chains(chain)
                if found is None or not _only_accept(found, chains, deep - 1, own=True):
                    return False
            case _:
                return False
    return True
