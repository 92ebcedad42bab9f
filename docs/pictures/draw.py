#!/usr/bin/python3
# Owns: the pictures of docs/. Run it to write them anew; tests/unit/test_docs.py compares. Each has its own background,
# light or dark as the reader's browser asks for.
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

COLOURS = {  # light, dark
    "ground": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"), "faint": ("#59636e", "#9198a1"),
    "box": ("#f6f8fa", "#161b22"), "edge": ("#818b98", "#656c76"), "yes": ("#116329", "#56d364"),
    "no": ("#a40e26", "#ff7b72"), "on": ("#0550ae", "#79c0ff"),
}  # fmt: skip


def style() -> str:
    def rules(shade: int) -> list[str]:
        of = {name: pair[shade] for name, pair in COLOURS.items()}
        found = [f"text {{ fill: {of['ink']} }}", f".ground, .row {{ fill: {of['ground']} }}"]
        found += [f".box {{ fill: {of['box']} }}", f".box, .row {{ stroke: {of['edge']} }}"]
        for name in ("faint", "yes", "no", "on"):
            found.append(f"text.{name}, .tip-{name} {{ fill: {of[name]} }} .line-{name} {{ stroke: {of[name]} }}")
        return found

    fixed = [
        "text { font: 13px sans-serif } text.head { font-weight: bold }",
        ".line { fill: none; stroke-width: 1.5 }",
    ]
    dark = ["@media (prefers-color-scheme: dark) {", *(f"  {rule}" for rule in rules(1)), "}"]
    return "\n".join(f"    {line}" for line in [*fixed, *rules(0), *dark])


TIP = '  <marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">' + (
    '<path class="tip-{0}" d="M0 0 8 4 0 8z"/></marker>'
)


def text(x: int, y: int, words: str, kind: str = "", anchor: str = "start") -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'  <text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(x: int, y: int, width: int, height: int, kind: str = "box") -> str:
    return f'  <rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>'


def arrow(way: str, kind: str) -> str:
    """`skip`: dashed."""
    dashes = ' stroke-dasharray="5 4"' if kind == "skip" else ""
    kind = "on" if kind == "skip" else kind
    return f'  <path d="{way}" class="line line-{kind}" marker-end="url(#{kind})"{dashes}/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    tips = [TIP.format(kind) for kind in ("yes", "no", "on")]
    ground = f'  <rect width="{width}" height="{height}" class="ground"/>'
    return "\n".join(
        [head, f"  <title>{title}</title>", f"  <style>\n{style()}\n  </style>", *tips, ground, *parts, "</svg>\n"]
    )


def tier(x: int, heads: tuple[str, str], rows: list[tuple[str, str]], end: str) -> list[str]:
    """A box with policies (name, what its rules may say) and what happens at its end."""
    parts = [box(x, 60, 200, 74 + 44 * len(rows)), text(x + 12, 82, heads[0], "head")]
    parts.append(text(x + 12, 98, heads[1], "faint"))
    for number, (name, rules) in enumerate(rows):
        y = 108 + 44 * number
        parts += [box(x + 10, y, 180, 38, "row"), text(x + 20, y + 16, name), text(x + 20, y + 31, rules, "faint")]
    return [*parts, text(x + 12, 124 + 44 * len(rows), end, "faint")]


def tiers() -> str:
    parts = [
        *tier(90, ("tier security", "order 10"), [
            ("policy quarantine", "Allow, Log, Deny, Pass"), ("policy blocklist", "Deny"),
        ], "else: Deny, or Pass"),
        *tier(350, ("tier default", "order 1000000"), [
            ("policy web", "Allow"), ("policy log-the-rest", "Log"),
        ], "else: Deny"),
        *tier(610, ("profiles", "of the guest's tag"), [
            ("profile base", "Allow, Log, Deny"), ("profile open", "Allow"),
        ], "else, or Pass: dropped"),
        text(8, 180, "a packet", ""), arrow("M8 160 H86", "on"),
        arrow("M290 160 H346", "on"), text(318, 152, "Pass", "on", "middle"),
        arrow("M550 160 H606", "on"), text(578, 152, "Pass", "on", "middle"),
        arrow("M40 158 V34 H450 V56", "skip"), arrow("M450 34 H710 V56", "skip"),
        text(50, 26, "a tier of which no policy applies to this guest in this direction is skipped", "on"),
    ]  # fmt: skip
    for x in (190, 450, 710):
        parts += [
            arrow(f"M{x - 50} 222 V272", "yes"), text(x - 58, 254, "Allow", "yes", "end"),
            arrow(f"M{x + 50} 222 V272", "no"), text(x + 58, 254, "Deny", "no"),
        ]  # fmt: skip
    parts += [
        box(90, 276, 720, 34),
        text(250, 298, "the packet passes this end", "yes", "middle"),
        text(650, 298, "the packet is dropped", "no", "middle"),
        text(450, 298, "whichever comes first", "faint", "middle"),
    ]
    return picture(830, 324, "One end of a packet: tiers, policies, profiles", parts)


def asked(x: int, words: tuple[str, str, str], strong: int) -> list[str]:
    lines = [text(x + 10, 108 + 17 * n, word, "head" if n == strong else "faint" if n else "") for n, word in
             enumerate(words)]  # fmt: skip
    return [box(x, 84, 90, 70, "row"), *lines]


def way() -> str:
    parts = [
        box(10, 50, 250, 120),
        text(22, 72, "host h1", "head"),
        *asked(24, ("guest web1", "egress", "policies"), 1),
        *asked(160, ("eth0", "host", "endpoint"), 9),
        box(430, 50, 250, 120),
        text(442, 72, "host h2", "head"),
        *asked(442, ("eth0", "host", "endpoint"), 9),
        *asked(578, ("guest db1", "ingress", "policies"), 1),
        *(arrow(f"M{a} 118 H{b}", "yes") for a, b in ((114, 156), (250, 438), (532, 574))),
        text(345, 110, "the first packet of a flow", "", "middle"),
        text(345, 30, "All who are asked must allow. Host endpoints are asked only where there are any.", "", "middle"),
        arrow("M620 158 V196 H70 V158", "skip"),
        text(345, 190, "answers pass without being asked", "on", "middle"),
    ]
    return picture(690, 212, "The way of a packet from guest to guest", parts)


PICTURES: dict[str, Callable[[], str]] = {"tiers.svg": tiers, "way.svg": way}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw())
