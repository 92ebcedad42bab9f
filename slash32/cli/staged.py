# Owns: what hosts' kernels counted for a staged policy, or for the end of a tier, added up for people.
# Touches: the dispatcher, by the client that it is given.
from __future__ import annotations

from collections import Counter
from typing import Any

from slash32 import questions
from slash32.errors import printable

from . import text
from .client import CallError, Client

AT_ONCE = 64  # hosts that one question may go to
_RULES = 10_000  # of a policy; a host says what it likes
Pairs = list[tuple[str, object]]


def counted(client: Client, policy: str, tier: str) -> Pairs:
    """What it would have dropped: in all, and by rule. `policy` "": at the end of the tier."""
    hosts = sorted(str(host.get("name")) for host in client.items("hosts") if host.get("connected"))
    packets: Counter[str] = Counter()
    missing: list[str] = []
    for start in range(0, len(hosts), AT_ONCE):
        try:
            body = {"hosts": hosts[start : start + AT_ONCE], "question": questions.staged()}
            said = client.post("ask", body=body)
        except CallError as error:
            return [("would have dropped", f"not known: {'; '.join(error.lines)}")]
        missing += said.get("silent") or ()
        for host, answer in (said.get("answers") or {}).items():
            lines = answer.get("staged") if isinstance(answer, dict) else None
            if isinstance(lines, list):
                packets.update(_of(lines, policy, tier))
            else:
                missing.append(host)
    about: Pairs = [("would have dropped", text.count(sum(packets.values()), "packet"))]
    about += [(f"  {rule}", text.count(number, "packet")) for rule, number in sorted(packets.items()) if rule]
    return [*about, ("not counted", f"by {text.names(sorted(map(printable, missing)))}")] if missing else about


def _of(lines: list[Any], policy: str, tier: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in lines:
        if isinstance(line, dict) and (line.get("policy"), line.get("tier")) == (policy, tier):
            rule, packets, way = line.get("rule"), line.get("packets"), line.get("direction")
            known = way in ("Ingress", "Egress") and isinstance(rule, int) and 0 <= rule < _RULES
            where = f"{str(way).lower()} rule {rule}" if known else ""
            found[where] += packets if isinstance(packets, int) and 0 <= packets < 1 << 64 else 0
    return found
