# Owns: how the answers of `slash32 diff` look, to people and to programs. Pure.
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from slash32.classes import outermost
from slash32.compare import Change, Comparison, Flow
from slash32.edits import Edit, Field
from slash32.errors import printable
from slash32.naming import Names
from slash32.policy import PortRange
from slash32.resources import API_VERSION
from slash32.rules import PROTOCOLS, encode_port
from slash32.traffic import Traffic

from . import text

CAP = 20  # rows of what is gained, and as many of what is lost
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_FIELD_CAP, _FIELD_WIDTH = 30, 160
_WORDS = {True: "allow", False: "deny"}


@dataclass(frozen=True, slots=True)
class Differences:
    edits: Sequence[Edit]
    comparison: Comparison
    notes: Sequence[str] = field(default_factory=tuple)


def as_text(found: Differences, everything: bool = False) -> str:
    parts = ["\n".join(_edited(edit) for edit in found.edits)] if found.edits else []
    names = Names(found.comparison.found)
    for allowed in (True, False):
        changes = [change for change in found.comparison.changes if change.allowed is allowed]
        if changes:
            parts.append(_table(names, changes if everything else changes[:CAP]))
            if len(changes) > CAP and not everything:
                parts[-1] += f"\n... and {len(changes) - CAP} more ({_WORDS[allowed]} after); --all shows them"
    notes = [f"note: {printable(note)}" for note in found.notes]
    return "\n\n".join([*parts, "\n".join([*notes, summary(found)])])


def summary(found: Differences) -> str:
    number = sum(edit.change != "unchanged" for edit in found.edits)
    changes = text.count(number, "resource") + (" changes" if number == 1 else " change")
    said = found.comparison
    if not said.changes:
        return f"{changes}; no verdict changes"
    gain = _what(said, True, f"{text.count(said.gaining, 'pair')} {'gains' if said.gaining == 1 else 'gain'}")
    lose = _what(said, False, f"{text.count(said.losing, 'pair')} {'loses' if said.losing == 1 else 'lose'}")
    return f"{changes}; {gain}; {lose}"


def _what(said: Comparison, allowed: bool, who: str) -> str:
    kinds = {_flows(change.flows) for change in said.changes if change.allowed is allowed}
    return f"{who} {kinds.pop()}" if len(kinds) == 1 else who


def _edited(edit: Edit) -> str:
    lines = [f"{edit.kind} {printable(edit.name)} {edit.change}"]
    lines += [f"  {line}" for each in edit.fields[:_FIELD_CAP] for line in _field(each)]
    if len(edit.fields) > _FIELD_CAP:
        lines.append(f"  ... and {len(edit.fields) - _FIELD_CAP} more fields")
    return "\n".join(lines)


def _field(each: Field) -> list[str]:
    if each.before is not None and each.after is not None:
        return [f"~ {printable(each.path)}: {_short(each.before)} -> {_short(each.after)}"]
    sign, value = ("+", each.after) if each.before is None else ("-", each.before)
    return [f"{sign} {printable(each.path)}: {_short(value)}"]


def _short(value: object) -> str:
    """JSON, which is YAML too."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = printable(shown) if isinstance(value, str) else shown
    return shown if len(shown) <= _FIELD_WIDTH else shown[:_FIELD_WIDTH] + "..."


def _table(names: Names, changes: Sequence[Change]) -> str:
    rows = []
    for change in changes:
        traffic = _flows(change.flows) + (f" on {change.where}" if change.where else "")
        ends = names.of(change.sources), names.of(change.destinations)
        words = _WORDS[not change.allowed], _WORDS[change.allowed]
        rows.append((*ends, traffic, *words, change.pairs))
    return text.table(["FROM", "TO", "TRAFFIC", "BEFORE", "AFTER", "PAIRS"], rows)


def _flows(flows: Sequence[Flow]) -> str:
    return ", ".join(said(flow) for flow in flows)


def said(flow: Flow) -> str:
    """tcp/80,443; udp/53 from port 1024-65535; icmp type 8; all traffic; anything but tcp."""
    return _traffic(flow.traffic) + (f" (IPv{flow.version})" if flow.version else "")


def _traffic(traffic: Traffic) -> str:
    if traffic.protocol is None:
        return f"all but {', '.join(map(_protocol, traffic.but))}" if traffic.but else "all traffic"
    shown = _protocol(traffic.protocol)
    shown += f"/{_ranges(traffic.ports)}" if traffic.ports else ""
    shown += f" from port {_ranges(traffic.source_ports)}" if traffic.source_ports else ""
    shown += f" type {_ranges(traffic.types)}" if traffic.types else ""
    return shown + (f" code {_ranges(traffic.codes)}" if traffic.codes else "")


def _protocol(number: int) -> str:
    return _NAMES[number].lower() if number in _NAMES else f"protocol {number}"


def _ranges(ranges: Sequence[PortRange]) -> str:
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def as_data(found: Differences) -> dict[str, object]:
    """Stable: fields may be added, none goes or changes its meaning. `groups` are addresses that no rule tells apart;
    `from` and `to` name them by id."""
    said_ = found.comparison
    names = Names(said_.found)
    return {
        "apiVersion": API_VERSION,
        "kind": "Diff",
        "resources": [_edit_data(edit) for edit in found.edits],
        "changes": [_change_data(names, change) for change in said_.changes],
        "groups": [_group_data(names, number) for number in _mentioned(said_)],
        "notes": list(found.notes),
        "summary": {
            "resources": sum(edit.change != "unchanged" for edit in found.edits),
            "pairsGaining": said_.gaining,
            "pairsLosing": said_.losing,
            "verdictsChange": bool(said_.changes),
        },
    }


def _mentioned(said_: Comparison) -> list[int]:
    return sorted({number for change in said_.changes for number in (*change.sources, *change.destinations)})


def _edit_data(edit: Edit) -> dict[str, object]:
    fields = [{"path": each.path, "before": each.before, "after": each.after} for each in edit.fields]
    return {"kind": edit.kind, "name": edit.name, "change": edit.change, "fields": fields}


def _change_data(names: Names, change: Change) -> dict[str, object]:
    return {
        "before": _WORDS[not change.allowed],
        "after": _WORDS[change.allowed],
        "from": {"description": names.of(change.sources), "groups": list(change.sources)},
        "to": {"description": names.of(change.destinations), "groups": list(change.destinations)},
        "where": change.where or "anywhere",
        "traffic": [_flow_data(flow) for flow in change.flows],
        "pairs": change.pairs,
    }


def _flow_data(flow: Flow) -> dict[str, object]:
    traffic = flow.traffic
    found: dict[str, object] = {"description": said(flow)}
    if flow.version:
        found["ipVersion"] = flow.version
    if traffic.protocol is not None:
        found["protocol"] = _NAMES.get(traffic.protocol, traffic.protocol)
    named = {"notProtocols": [_NAMES.get(number, number) for number in traffic.but]}
    ranges = {"ports": traffic.ports, "sourcePorts": traffic.source_ports}
    ranges |= {"icmpTypes": traffic.types, "icmpCodes": traffic.codes}
    named |= {key: [encode_port(each) for each in value] for key, value in ranges.items()}
    return found | {key: value for key, value in named.items() if value}


def _group_data(names: Names, number: int) -> dict[str, object]:
    group = names.found.groups[number]
    found: dict[str, object] = {"id": number, "kind": group.kind, "description": names.of((number,))}
    if group.kind != "outside":
        found["members"] = [owner.name for owner in group.members]
    if group.kind in ("outside", "behind"):
        covering, missing = outermost(names.found.regions, (owner.region for owner in group.members))
        found |= {"nets": list(map(str, covering)), "notNets": list(map(str, missing))}
    return found
