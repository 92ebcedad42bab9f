# Owns: what labels must have for a selector to match at all, so that selectors and labels find each other through an
# index. Pure. An anchor is a label with its value, or a label's name: labels that a selector matches have at least
# one of its anchors.
from __future__ import annotations

from collections.abc import Callable, Mapping

from slash32.selector import All, Compare, Has, InSet, Node, Not, Selector, Several

Anchor = tuple[str, str] | str
Anchors = frozenset[Anchor]
Weigh = Callable[[Anchors], int]  # how much stands under these anchors: of `&&` the lightest side is enough


def anchors_of(selector: Selector, weigh: Weigh) -> Anchors | None:
    """None: there is no such condition, it may match whatever the labels; empty: it matches nothing."""
    return _anchors(selector.root, False, weigh)


def anchors_in(labels: Mapping[str, str]) -> list[Anchor]:
    """All that these labels have."""
    return [*labels.items(), *labels]


def _anchors(node: Node, negated: bool, weigh: Weigh) -> Anchors | None:
    match node:
        case Not(operand):
            return _anchors(operand, not negated, weigh)
        case All():
            return frozenset() if negated else None
        case Has(label):
            return None if negated else frozenset((label,))
        case Compare():
            return _of_comparison(node, negated)
        case InSet(label, negate, values):
            return frozenset((label, value) for value in values) if negate is negated else None
        case Several(operator, operands):
            sides = [_anchors(operand, negated, weigh) for operand in operands]
            known = [side for side in sides if side is not None]
            if (operator == "&&") is not negated:
                return min(known, key=weigh, default=None)
            return frozenset().union(*known) if len(known) == len(sides) else None
    raise AssertionError(f"a node of an unknown kind: {node}")


def _of_comparison(node: Compare, negated: bool) -> Anchors | None:
    if node.operator == "!=":
        return frozenset(((node.label, node.value),)) if negated else None
    if negated:
        return None
    return frozenset(((node.label, node.value),) if node.operator == "==" else (node.label,))
