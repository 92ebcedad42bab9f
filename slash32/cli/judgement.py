# Owns: how the answers of `slash32 explain` look, to people and to programs. Pure.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slash32.errors import printable
from slash32.net import Address, format_address, version
from slash32.policy import ANY_INTERFACE
from slash32.rules import PROTOCOLS
from slash32.verdict import Note, Packet, Stage, Verdict

_NAMES = {number: name for name, number in PROTOCOLS.items()}
_WAY = ("egress", "host_egress", "host_ingress", "ingress")  # in the order in which they are asked


@dataclass(frozen=True, slots=True)
class End:
    """Of a flow, as it was asked for."""

    name: str
    addresses: Mapping[int, Address] = field(default_factory=dict)  # by IP version
    host: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    source: End
    destination: End
    packet: Packet
    verdict: Verdict
    notes: list[Note]

    @property
    def family(self) -> int:
        return version(self.packet.source)


def as_data(answers: Sequence[Answer], verbose: bool = False) -> dict[str, object]:
    """verdict, egress and ingress; `host_egress`, `host_ingress` where host endpoints were asked; `other_family` is the
    same of IPv6 where the first is of IPv4 and both were judged."""
    first, *others = (_data(answer, verbose) for answer in answers)
    return {**first, "other_family": others[0]} if others else first


def _data(answer: Answer, verbose: bool) -> dict[str, object]:
    packet, verdict = answer.packet, answer.verdict
    found: dict[str, object] = {"verdict": _word(verdict.allowed)}
    found |= {"egress": _stage(verdict.egress), "ingress": _stage(verdict.ingress)}
    for name, stage in (("host_egress", verdict.host_egress), ("host_ingress", verdict.host_ingress)):
        if stage is not None:
            found[name] = _stage(stage)
    found["source"] = _end(answer.source, packet.source)
    found["destination"] = _end(answer.destination, packet.destination)
    found |= {"family": answer.family, "protocol": packet.protocol}
    if packet.icmp:
        found["icmp"] = packet.icmp._asdict()
    if packet.destination_port is not None:
        found |= {"source_port": packet.source_port, "destination_port": packet.destination_port}
    if verbose:
        found["notes"] = [{**note._asdict(), "direction": note.direction.value.lower()} for note in answer.notes]
    return found


def _word(allowed: bool) -> str:
    return "allow" if allowed else "deny"


def _stage(stage: Stage | None) -> dict[str, object]:
    """`policy` and `rule` are null where a profile (named then), a tier's default action, or nobody decided."""
    if stage is None:
        return {"verdict": "allow", "tier": None, "policy": None, "rule": None, "by": "nobody"}
    found: dict[str, object] = {"verdict": _word(stage.allowed), "tier": stage.tier or None}
    found |= {"policy": stage.name if stage.kind == "policy" else None, "rule": stage.rule, "by": stage.kind}
    found["endpoint"] = stage.domain
    if stage.kind in ("profile", "failsafe"):
        found[stage.kind] = stage.name
    return found


def _end(end: End, address: Address) -> dict[str, object]:
    return {"name": end.name, "address": format_address(address), "host": end.host or None}


def as_text(answers: Sequence[Answer], verbose: bool = False) -> str:
    """One paragraph for each IP version; one for both where the same decided."""
    first, others = answers[0], answers[1:]
    if all((other.verdict, other.notes) == (first.verdict, first.notes) for other in others):
        return _paragraph(first, verbose, others)
    return "\n\n".join(_paragraph(answer, verbose) for answer in answers)


def _paragraph(answer: Answer, verbose: bool, same: Sequence[Answer] = ()) -> str:
    ends = [
        _named(end, [getattr(each.packet, side) for each in (answer, *same)])
        for end, side in ((answer.source, "source"), (answer.destination, "destination"))
    ]
    families = " and ".join(f"IPv{each.family}" for each in (answer, *same))
    verdict = "allowed" if answer.verdict.allowed else "denied"
    lines = [f"{ends[0]} to {ends[1]}, {_traffic(answer.packet)}, {families}: {verdict}"]
    notes = list(answer.notes) if verbose else []
    for way in _WAY:
        stage: Stage | None = getattr(answer.verdict, way)
        if stage is not None:
            here = [note for note in notes if (note.direction, note.domain) == (stage.direction, stage.domain)]
            lines.append(f"  {_where(way, stage)}: {_decision(stage)}")
            lines += [f"    before: {_note(note)}" for note in here]
            notes = [note for note in notes if note not in here]
        elif not way.startswith("host") and getattr(answer.verdict, f"host_{way}") is None:
            end = answer.source if way == "egress" else answer.destination
            lines.append(f"  {way} of {end.name}: not asked, no Endpoint has this address")
    lines += [f"  {note.direction.value.lower()} of {note.domain}: {_note(note)}" for note in notes]
    return "\n".join(printable(line) for line in lines)


def _named(end: End, addresses: Sequence[Address]) -> str:
    shown = ", ".join(map(format_address, addresses))
    about = [*([shown] if end.name != shown else []), *([f"on {end.host}"] if end.host else [])]
    return f"{end.name} ({', '.join(about)})" if about else end.name


def _traffic(packet: Packet) -> str:
    name = _NAMES.get(packet.protocol, f"protocol {packet.protocol}")
    if packet.icmp:
        return f"{name} type {packet.icmp.type} code {packet.icmp.code}"
    return name if packet.destination_port is None else f"{name} port {packet.destination_port}"


def _where(way: str, stage: Stage) -> str:
    if way == "host_egress":
        return f"leaving by host endpoint {stage.domain}"
    if stage.name == ANY_INTERFACE and stage.kind == "default":
        return f"arriving at host {stage.domain}"
    return f"arriving by host endpoint {stage.domain}" if way == "host_ingress" else f"{way} of {stage.domain}"


def _decision(stage: Stage) -> str:
    word = "allowed" if stage.allowed else "denied"
    if stage.kind == "policy":
        return f"{word} by GlobalNetworkPolicy {stage.name} rule {stage.rule} (tier {stage.tier})"
    if stage.kind == "profile":
        return f"{word} by Profile {stage.name} rule {stage.rule}"
    if stage.kind == "tier":
        return f"{word} at the end of tier {stage.tier}: policies of it apply, and no rule of theirs matched"
    if stage.kind == "failsafe":
        return f"{word}, always: {stage.name}"
    if stage.allowed:
        return f"{word}: every tier passed it on"
    if stage.name:
        return f'{word}: host {stage.domain} is closed to its own guests, it has no HostEndpoint of interface "*"'
    return f"{word}: no policy and no profile allows it"


def _note(note: Note) -> str:
    kind = "policy" if note.tier else "Profile"
    who = f"{kind} {note.policy} rule {note.rule}" if note.policy else "the default action"
    where = f" (tier {note.tier})" if note.tier else ""
    done = {"log": "logged", "pass": "passed", "would allow": "staged, would allow", "would drop": "staged, would drop"}
    return f"{done.get(note.what, 'staged, would pass')} by {who}{where}"
