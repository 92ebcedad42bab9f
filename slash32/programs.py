# Owns: the rules that an end of a flow is asked, compiled: traffic as bits (slash32.traffic), peers as numbered
# questions about an address. Equal programs are one number, whichever world they come from. Pure.
# slash32.verdict says what it means; a test holds both to the same answers.
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Prefix
from slash32.policy import Action, Direction, Peer, Policy, Profile, Rule, Tier
from slash32.traffic import Key, Space, key_of


class Question(NamedTuple):
    """What a rule asks about an address."""

    nets: frozenset[Prefix]
    not_nets: frozenset[Prefix]
    selector: str | None
    not_selector: str | None


class Line(NamedTuple):
    action: Action
    key: Key
    source: int  # mask of at most one question
    destination: int


class Block(NamedTuple):
    """A tier, or the profiles. What no line decides: `otherwise`, Deny or Pass."""

    lines: tuple[Line, ...]
    otherwise: Action


class Program(NamedTuple):
    """Blocks in order; Pass goes to the next one, and after the last to `finally_allowed`."""

    blocks: tuple[Block, ...]
    finally_allowed: bool = False


@dataclass(slots=True)
class Compiler:
    """Numbers questions and programs. What is compiled must stay alive: it is known by identity."""

    questions: list[Question] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    _questions: dict[Question, int] = field(default_factory=dict)
    _programs: dict[Program, int] = field(default_factory=dict)
    _lines: dict[tuple[int, Direction], tuple[Line, ...]] = field(default_factory=dict)

    def guest(
        self, tiers: Iterable[tuple[Tier, Sequence[Policy]]], profiles: Iterable[Profile], direction: Direction
    ) -> int:
        """The tiers with the policies that apply, then the profiles."""
        blocks = [self._tier(tier, policies, direction) for tier, policies in tiers]
        lines = tuple(line for profile in profiles for line in self._of(profile, direction))
        return self.number(Program((*blocks, Block(lines, Action.DENY))))

    def forward(self, tiers: Iterable[tuple[Tier, Sequence[Policy]]], direction: Direction) -> int:
        """What a host endpoint asks of what is only forwarded: no profiles, and no policy is no question."""
        blocks = tuple(self._tier(tier, policies, direction) for tier, policies in tiers)
        return self.number(Program(blocks, finally_allowed=True))

    def number(self, program: Program) -> int:
        found = self._programs.get(program)
        if found is None:
            found = self._programs[program] = len(self.programs)
            self.programs.append(program)
        return found

    def keys(self) -> set[Key]:
        return {line.key for program in self.programs for block in program.blocks for line in block.lines}

    def _tier(self, tier: Tier, policies: Sequence[Policy], direction: Direction) -> Block:
        return Block(tuple(x for policy in policies for x in self._of(policy, direction)), tier.default_action)

    def _of(self, item: Policy | Profile, direction: Direction) -> tuple[Line, ...]:
        at = (id(item), direction)
        found = self._lines.get(at)
        if found is None:
            rules = (rule for rule in item.rules(direction) if rule.action is not Action.LOG)
            found = self._lines[at] = tuple(map(self.line, rules))
        return found

    def line(self, rule: Rule) -> Line:
        return Line(rule.action, key_of(rule), self._question(rule.source), self._question(rule.destination))

    def _question(self, peer: Peer) -> int:
        asked = Question(frozenset(peer.nets), frozenset(peer.not_nets), peer.selector, peer.not_selector)
        if not any((asked.nets, asked.not_nets, asked.selector is not None, asked.not_selector is not None)):
            return 0
        found = self._questions.get(asked)
        if found is None:
            found = self._questions[asked] = len(self.questions)
            self.questions.append(asked)
        return 1 << found


@dataclass(slots=True)
class Judge:
    """What programs allow between two addresses, by the questions that hold for them; each answer is found once."""

    programs: Sequence[Program]
    spaces: Mapping[int, Space]  # by IP version
    source: list[int] = field(default_factory=list)  # the questions that a program asks about sources,
    destination: list[int] = field(default_factory=list)  # and about destinations
    _known: dict[tuple[int, int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for program in self.programs:
            lines = [line for block in program.blocks for line in block.lines]
            self.source.append(_union(line.source for line in lines))
            self.destination.append(_union(line.destination for line in lines))

    def allowed(self, program: int, version: int, source: int, destination: int) -> int:
        """The traffic; `source` and `destination` are masks of the questions that hold."""
        known = (program, version, source & self.source[program], destination & self.destination[program])
        found = self._known.get(known)
        if found is None:
            found = self._known[known] = self._run(*known)
        return found

    def _run(self, program: int, version: int, source: int, destination: int) -> int:
        space = self.spaces[version]
        blocks, finally_allowed = self.programs[program]
        allowed, asked = 0, space.whole
        for block in blocks:
            passed = 0
            for action, key, from_, to in block.lines:
                if from_ & ~source or to & ~destination:
                    continue
                mask = space.mask(key) & asked
                asked &= ~mask
                if action is Action.ALLOW:
                    allowed |= mask
                elif action is Action.PASS:
                    passed |= mask
                if not asked:
                    break
            asked = passed | (asked if block.otherwise is Action.PASS else 0)
        return allowed | asked if finally_allowed else allowed


def _union(masks: Iterable[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
