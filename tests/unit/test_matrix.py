"""The demo's matrices: files written by hand, what is refused, what is printed; and the examples, which are tags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab import demo, matrix
from lab.matrix import Cell, Matrix
from lab.paths import LabError
from slash32.tag import parse_domain

EXAMPLES = Path(__file__).parents[2] / "examples"
UUID = "<uuid>11111111-2222-3333-4444-555555555555</uuid>"
TWO = "a a no no no\na b yes no yes  # comment\nb a no no no\nb b no yes no\n"


def test_a_table() -> None:
    table = matrix.parse(TWO, "two")
    assert table["a", "b"] == {"icmp", "5432"}
    assert table["b", "b"] == {"80"}
    wanted = matrix.expected(table, {"x": "a", "y": "b", "z": "b"})
    assert len(wanted.cells()) == 3 * 2 * 3 * 2
    assert {cell for cell in wanted.open if cell.family == 6} == {
        Cell("x", "y", "icmp", 6),
        Cell("x", "y", "5432", 6),
        Cell("x", "z", "icmp", 6),
        Cell("x", "z", "5432", 6),
        Cell("y", "z", "80", 6),
        Cell("z", "y", "80", 6),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no line for anybody"),
        ("a a no no\n", "want FROM TO"),
        ("a\n", "want FROM TO"),
        ("a a no no perhaps\n", "want FROM TO"),
        (TWO + "a b no no no\n", "twice"),
        (TWO.replace("b a no no no\n", ""), "no line for b to a"),
    ],
)
def test_a_table_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(LabError, match=said):
        matrix.parse(text, "two")


def test_wrong_cells_are_found_and_shown() -> None:
    wanted = matrix.expected(matrix.parse(TWO, "two"), {"x": "a", "y": "b"})
    missing, surplus = Cell("x", "y", "5432", 6), Cell("y", "x", "80", 4)
    assert matrix.complaints(wanted, wanted) == []
    observed = Matrix(wanted.names, (wanted.open - {missing}) | {surplus})
    assert matrix.complaints(wanted, observed) == [
        "x -> y tcp/5432 by IPv6: closed, expected open",
        "y -> x tcp/80 by IPv4: open, expected closed",
    ]
    shown = matrix.render(observed, wanted)
    assert [line.split()[-2:] for line in shown[1:]] == [["-", "i.4!"], [".4.!", "-"]]
    assert not any("!" in line for line in matrix.render(wanted, wanted))
    colored = matrix.render(observed, wanted, before=wanted, color=True)
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in colored] == shown
    assert sum("\x1b[1;37;41m" in line for line in colored) == 2


@pytest.mark.parametrize("name", [*demo.ROLES, demo.LATE[1]])
def test_the_examples_are_what_the_demo_says(name: str) -> None:
    text = (EXAMPLES / f"{name}.xml").read_text()
    driver = "qemu" if "<domain type='qemu'>" in text else "lxc"
    domain = parse_domain(text.replace("<name>", f"{UUID}<name>", 1).encode(), driver)
    assert domain.name == name
    role = {**demo.ROLES, demo.LATE[1]: demo.LATE[2]}[name]
    assert [endpoint.labels.get("role") for endpoint, _ in domain.endpoints] == ([] if role == "none" else [role])
    assert len(domain.ethernet()) == 1
    assert text.count("s32.addr") == 2


@pytest.mark.parametrize("file", [demo.NO_POLICY, demo.THREE_TIER])
def test_the_matrices_know_every_role(file: str) -> None:
    matrix.expected(matrix.read(EXAMPLES / file), demo.ROLES)
