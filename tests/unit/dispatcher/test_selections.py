# What the index of selectors and labels finds is what asking everybody finds, and it asks only few.
from __future__ import annotations

import os
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.registry.anchors import anchors_in, anchors_of
from dispatcher.registry.changes import Changes
from dispatcher.registry.selections import Bearer, Selections
from slash32 import selector as selectors
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.wire import Delete, Members, Put

EXAMPLES = 600 if os.environ.get("SLASH32_COUNTS") == "full" else 120

KEYS, VALUES = st.sampled_from(["role", "env", "zone"]), st.sampled_from(["web", "db", "prod", ""])
LEAF = st.one_of(
    st.builds(lambda k, o, v: f'{k} {o} "{v}"', KEYS, st.sampled_from(["==", "!=", "contains", "starts with"]), VALUES),
    st.builds(lambda k: f"has({k})", KEYS),
    st.builds(
        lambda k, o, vs: f"{k} {o} {{{', '.join(f'{v!r}' for v in vs)}}}",
        KEYS, st.sampled_from(["in", "not in"]), st.lists(VALUES, max_size=3),
    ),
    st.just("all()"),
)  # fmt: skip
SELECTOR = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda one: f"!({one})", inner),
        st.builds(lambda op, all_: f"({op.join(all_)})", st.sampled_from([" && ", " || "]),
                  st.lists(inner, min_size=2, max_size=3)),
    ),
    max_leaves=6,
)  # fmt: skip
LABELS = st.dictionaries(KEYS, VALUES, max_size=3)


@given(SELECTOR, LABELS, st.randoms(use_true_random=False))
@settings(max_examples=4 * EXAMPLES, deadline=None)
def test_labels_that_are_selected_have_an_anchor(text: str, labels: dict[str, str], chance: object) -> None:
    """Whichever side of `&&` is taken."""
    selector = selectors.parse(text)
    anchors = anchors_of(selector, lambda _: chance.randrange(9))  # type: ignore[attr-defined]
    if selector.matches(labels) and anchors is not None:
        assert anchors & set(anchors_in(labels))


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("all()", None),
        ("!all()", set()),
        ('a == "x"', {("a", "x")}),
        ('!(a == "x")', None),
        ('a != "x"', None),
        ('!(a != "x")', {("a", "x")}),
        ('a in {"x", "y"}', {("a", "x"), ("a", "y")}),
        ('a not in {"x"}', None),
        ('!(a not in {"x", "y"})', {("a", "x"), ("a", "y")}),
        ("a in {}", set()),
        ("has(a)", {"a"}),
        ("!has(a)", None),
        ('a contains "x"', {"a"}),
        ('a == "x" && b == "y"', {("b", "y")}),
        ('a == "x" || b == "y"', {("a", "x"), ("b", "y")}),
        ('a == "x" || b != "y"', None),
        ('a == "x" && b != "y"', {("a", "x")}),
        ('!(a != "x" || b == "y")', {("a", "x")}),
        ('!(a != "x" && b != "y")', {("a", "x"), ("b", "y")}),
        ('has(a) && (b == "y" || c in {"z"})', {("b", "y"), ("c", "z")}),
    ],
)
def test_anchors(text: str, anchors: set[object] | None) -> None:
    crowded = Counter({("a", "x"): 5, "a": 9})
    found = anchors_of(selectors.parse(text), lambda some: sum(crowded[anchor] for anchor in some))
    assert found == anchors


class World:
    """Selections, and beside it the same by asking everybody about everything."""

    def __init__(self) -> None:
        self.wants: Counter[tuple[str, ObjectKey]] = Counter()
        self.changes = Changes()
        self.selections = Selections(self.changes, self.want)
        self.bearers: dict[int, Bearer] = {}
        self.applied: dict[ObjectKey, str] = {}
        self.used: Counter[str] = Counter()
        self.told: dict[str, AddressSet] = {}  # sets as the changes tell them

    def want(self, host: str, key: ObjectKey, by: int) -> None:
        self.wants[host, key] += by

    def selected(self, text: str) -> list[Bearer]:
        chosen = selectors.parse(text)
        return [b for b in self.bearers.values() if chosen.matches(dict(b.labels))]

    def check(self) -> None:
        for change in self.changes.take(lambda key: self.selections.members(str(key.name))):
            match change:
                case Put(_, name, AddressSet() as value):
                    self.told[str(name)] = value
                case Delete(_, name):
                    del self.told[str(name)]
                case Members(name, add, remove):
                    have = self.told[name].addresses
                    assert remove.addresses <= have and not add.addresses & have
                    self.told[name] = AddressSet(have - remove.addresses | add.addresses)
        sets = {text: AddressSet({m for b in self.selected(text) for m in b.members}) for text in +self.used}  # type: ignore[misc]
        assert self.told == sets
        wanted = {(b.host, key) for key, text in self.applied.items() for b in self.selected(text) if b.host}
        assert {pair for pair, reasons in self.wants.items() if reasons} == wanted
        assert min(self.wants.values(), default=0) >= 0


STEP = st.one_of(
    st.tuples(st.just("bear"), st.integers(0, 9), LABELS, st.sampled_from(["", "h1", "h2"]), st.integers(1, 3)),
    st.tuples(st.just("relabel"), st.integers(0, 9), LABELS),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("apply"), st.integers(0, 4), SELECTOR),
    st.tuples(st.just("use"), SELECTOR),
    st.tuples(st.just("unuse"), st.integers(0, 20)),
    st.tuples(st.just("check")),
)


def step(world: World, what: str, *a: object) -> None:
    match what, *a:
        case "bear", int(n), dict(labels), str(host), int(address):
            step(world, "leave", n)
            world.bearers[n] = Bearer(frozenset(labels.items()), (bytes((10, 0, 0, address)),), host)
            world.selections.enter(world.bearers[n])
        case "relabel", int(n), dict(labels):
            if n in world.bearers:
                world.selections.relabel(world.bearers[n], frozenset(labels.items()))
        case "leave", int(n):
            if n in world.bearers:
                world.selections.leave(world.bearers.pop(n))
        case "apply", int(n), str(text):
            key = ObjectKey(Kind.POLICY, str(n))
            if key in world.applied:
                world.selections.unapply(world.applied.pop(key), key)
            else:
                world.applied[key] = str(selectors.parse(text))
                world.selections.apply(world.applied[key], key)
        case "use", str(text):
            canonical = str(selectors.parse(text))
            world.used[canonical] += 1
            world.selections.use(canonical)
        case "unuse", int(n):
            texts = sorted(+world.used)
            if texts:
                world.used[texts[n % len(texts)]] -= 1
                world.selections.unuse(texts[n % len(texts)])
        case _:
            world.check()


@given(st.lists(STEP, min_size=10, max_size=60))
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_index_finds_what_asking_everybody_finds(steps: list[tuple[object, ...]]) -> None:
    world = World()
    for what in [*steps, ("check",)]:
        step(world, *what)  # type: ignore[arg-type]
    for n in list(world.bearers):
        step(world, "leave", n)
    for key, text in world.applied.items():
        world.selections.unapply(text, key)
    for text in world.used.elements():
        world.selections.unuse(text)
    assert len(world.selections) == 0, "something is left behind"


def test_neither_side_asks_everybody() -> None:
    asked = count()

    class Counting:
        def __init__(self, inner: selectors.Selector) -> None:
            self.inner = inner

        def matches(self, labels: dict[str, str]) -> bool:
            next(asked)
            return self.inner.matches(labels)

    world = World()
    for n in range(100):
        world.selections.use(str(selectors.parse(f'env == "prod" && role == "r{n}"')))
    for selection in world.selections._selections.values():
        selection.selector = Counting(selection.selector)  # type: ignore[assignment]
    for n in range(100):
        step(world, "bear", n, {"env": "prod", "role": f"r{n}", "name": f"vm{n}"}, "h1", 1)
    assert next(asked) <= 201, "each asks its own, and the first selector stands under the label that all have"
    before = next(asked)
    step(world, "relabel", 5, {"env": "prod", "role": "r50", "name": "vm5"})
    assert next(asked) - before <= 3
    classes = [c.labels for c in world.selections._classes.values()]
    world.selections.use('(env == "prod" && name in {"vm7", "vm8"})')
    (fresh,) = (s for s in world.selections._selections.values() if "vm7" in s.text)
    assert fresh.anchors == {("name", "vm7"), ("name", "vm8")} and len(fresh.classes) == 2 < len(classes)
