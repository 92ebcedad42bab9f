# Owns: when what is decided. Inputs that may change something wait here; while no proposal is under way, those that
# wait are decided together and become one commit. Where another dispatcher's comes first, they are decided anew. Pure.
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from ..store.commits import Commit, Failed, Foreign, Head, Landed, Outcome, Replaced, Store
from .ledger import Ledger

AT_ONCE = 2000  # inputs that one commit takes together
PATIENCE = 1.0  # seconds until hosts' inputs are tried again with a store that failed


class Input(Protocol):
    """Something that may change the content."""

    patient: bool  # a host's: kept until the store takes it; else (an operator's) it fails at once

    def decide(self) -> None:
        """Writes to the ledger what it changes. May be called again, when the content is another one."""

    def landed(self) -> None:
        """What it decided is durable."""

    def failed(self, why: Failed) -> None:
        """It could not be written. Never called where it decided to write nothing."""


class Turns:
    def __init__(
        self, store: Store, ledger: Ledger, clock: Callable[[], float], publish: Callable[[Commit, float, bool], None]
    ) -> None:
        """`publish` gets each commit, when it was begun, and whether it is another dispatcher's."""
        self.store, self.ledger, self.clock = store, ledger, clock
        self.failing = ""  # why the last proposal failed
        self.failures = 0  # proposals that failed
        self.conflicts = 0  # that came second
        self._publish = publish
        self._waiting: tuple[deque[Input], deque[Input]] = (deque(), deque())  # patient ones, others
        self._batch: list[tuple[Input, bool]] = []  # decided and proposed, and whether they wrote something
        self._begun = 0.0
        self._not_before = 0.0  # the store failed: until then nobody patient is decided
        self._heads: deque[Callable[[], None]] = deque()
        self._looking = False  # whether the store takes commits again

    def add(self, given: Input) -> None:
        self._waiting[not given.patient].append(given)

    def forget(self, unwanted: Callable[[Input], bool]) -> None:
        """Of the patient ones: nobody waits for these any more, and a store may fail for long."""
        patient = self._waiting[0]
        kept = [each for each in patient if not unwanted(each)]
        patient.clear()
        patient.extend(kept)

    def waiting(self) -> int:
        return len(self._batch) + sum(map(len, self._waiting))

    def ask_head(self, then: Callable[[], None]) -> None:
        """Calls it when everything that is committed now has been followed."""
        self._heads.append(then)
        self.store.ask_head()

    @property
    def deadline(self) -> float:
        """When `turn` has something to do by itself."""
        ready = self._waiting[0] and not self._batch and not self.store.trouble
        return self._not_before if ready else float("inf")

    def turn(self) -> None:
        """Follows the store, then decides what waits."""
        self._follow(self.store.take())
        while not self._batch and (inputs := self._next()):
            self._decide(inputs)
            self._follow(self.store.take())

    def look_again(self) -> None:
        """A failure that nobody tries again is not told for ever, nor forgotten before the store is well."""
        if self.failing and not self.waiting() and not self._looking and self.clock() >= self._not_before:
            self._looking, failures = True, self.failures
            self.ask_head(lambda: self._looked(failures))

    def _looked(self, failures: int) -> None:
        self._looking = False
        if self.failures == failures:
            self.failing = ""

    def cancel(self, reason: str) -> None:
        """Nothing is decided any more: who waits is told."""
        proposed = [each for each, _ in self._batch]
        for each in (*proposed, *self._waiting[1]):
            if not each.patient:
                each.failed(Failed(reason, unknown=each in proposed))
        self._waiting[1].clear()

    def _next(self) -> Collection[Input]:
        patient, others = self._waiting
        ready = [patient.popleft() for _ in range(min(len(patient), AT_ONCE))] if self._may_write() else []
        while others and len(ready) < AT_ONCE:
            ready.append(others.popleft())
        return ready

    def _may_write(self) -> bool:
        return not self.store.trouble and self.clock() >= self._not_before

    def _decide(self, inputs: Collection[Input]) -> None:
        self._begun = self.clock()
        writes = self.ledger.writes
        for each in inputs:
            before = len(writes)
            each.decide()
            self._batch.append((each, len(writes) > before))
        if not writes:
            self._settle()
        elif self.store.trouble:
            self._fail(Failed(self.store.trouble))
        else:
            self.store.propose(Commit(self.ledger.revision + 1, tuple(writes)))

    def _settle(self) -> None:
        batch, self._batch = self._batch, []
        for each, _ in batch:
            each.landed()

    def _follow(self, outcomes: Collection[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Landed(revision):
                    self.failing = ""
                    self._publish(self.ledger.landed(revision), self._begun, False)
                    self._settle()
                case Foreign(commit):
                    self._undo()
                    self.ledger.follow(commit)
                    self._publish(commit, self.clock(), True)
                case Replaced(saved):
                    self._undo()
                    commit = self.ledger.difference(saved)
                    self.ledger.follow(commit)
                    self._publish(commit, self.clock(), True)
                case Failed():
                    self._fail(outcome)
                case Head():
                    self._heads.popleft()()  # each question has its own answer: what was asked later knows more

    def _undo(self) -> None:
        """Another was faster: what was decided is decided again, first."""
        if self._batch:
            self.conflicts += 1
        self._again(self._batch)

    def _fail(self, why: Failed) -> None:
        self.failures += 1
        self.failing = why.reason
        self._not_before = self.clock() + PATIENCE
        failed = [each for each, wrote in self._batch if wrote and not each.patient]
        self._again([(each, wrote) for each, wrote in self._batch if not wrote or each.patient])
        for each in failed:
            each.failed(why)

    def _again(self, batch: Collection[tuple[Input, bool]]) -> None:
        self.ledger.undo()
        self._batch = []
        for each, _ in reversed(list(batch)):
            self._waiting[not each.patient].appendleft(each)
