# Owns: the line to the fleet's dispatchers: one of them at a time, the next at once when that one is lost, silent or
# refuses, with the next key first. Touches: the sockets of dealer.py, the key files. Belongs to one thread; `now` is
# monotonic seconds.
from __future__ import annotations

import os
import random
import select
from collections.abc import Sequence
from pathlib import Path

import zmq

from slash32.keys import KeyPair

from .dealer import ALONE, SEVERAL, Dealer, Place, Turn
from .identity import Identity
from .rounds import Rounds

NOBODY = "not connected yet"


class Line:
    """`step` makes the next connection; `leave` ends the present one with the next `step`."""

    def __init__(self, places: Sequence[Place], key_file: Path, context: zmq.Context[zmq.Socket[bytes]] | None) -> None:
        """Raises KeyFileError."""
        self.identity = Identity(key_file)
        self.several = len(places) > 1
        self._places = places
        self._rounds = Rounds(len(places), random.random)
        self._context = context or zmq.Context()
        self._own_context = context is None
        self._dealer: Dealer | None = None
        self._keys: list[KeyPair] = []  # still to be tried with the present dispatcher
        self._begun = self._accepted = 0.0
        self._reached = False
        self._leaving = ""
        self._troubles: dict[Place, str] = {}  # since a dispatcher accepted us
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)

    def close(self) -> None:
        self._hang_up()
        self._poll.close()
        os.close(self._wake)
        if self._own_context:
            self._context.term()

    def fileno(self) -> int:
        return self._poll.fileno()

    @property
    def is_open(self) -> bool:
        return self._dealer is not None and self._dealer.is_open and not self._leaving

    @property
    def endpoint(self) -> str:
        return self._dealer.place.endpoint if self._dealer is not None else ""

    @property
    def trouble(self) -> str:
        """Why nobody has accepted us, for people."""
        if not self.several:
            return next(iter(self._troubles.values()), NOBODY)
        return "; ".join(f"{place.endpoint}: {why}" for place, why in self._troubles.items()) or NOBODY

    def patience(self, now: float) -> float:
        """Seconds until `step` has something to do that no descriptor tells."""
        return max(0.0, self._rounds.due - now) if self._dealer is None else 1.0

    # -- the present connection -----------------------------------------------------------------------------------

    def send(self, frame: bytes) -> bool:
        """False: nothing can be sent now."""
        if self._dealer is None or not self._dealer.send(frame):
            return False
        if self._dealer.readable:
            self.wake()  # sending may take the descriptor's edge: what came in still counts
        return True

    def receive(self) -> list[bytes] | None:
        return None if self._dealer is None or self._leaving else self._dealer.receive()

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._wake, 1)

    def awake(self) -> None:
        if self._woken:  # else another descriptor it was
            self._woken = False
            os.eventfd_read(self._wake)

    def accepted(self, now: float) -> None:
        """Its dispatcher knows this host by the key that was used."""
        assert self._dealer is not None
        self._accepted = now
        self._troubles.clear()
        self.identity.accepted(self._dealer.keys)

    def leave(self, why: str) -> None:
        """The first reason is the reason."""
        if not self._leaving and self._dealer is not None:
            self._leaving = why
            self.wake()

    def watch(self, now: float) -> bool:
        """What became of the connection. True: a new one is open."""
        opened = False
        while self._dealer is not None and (turn := self._dealer.turn()) is not None:
            opened = turn is Turn.OPEN or (opened and turn is not Turn.LOST)
            match turn:
                case Turn.REACHED:
                    self._reached, self._begun = True, now
                case Turn.OPEN:
                    self._reached = False
                case Turn.KEY_REFUSED if self._keys:
                    self._hang_up()
                    self._knock(now)  # with the other key
                case Turn.KEY_REFUSED:
                    self.leave("the dispatcher refuses this host's key: register it as Host.spec.publicKey")
                case Turn.UNREACHABLE:
                    self.leave("it cannot be reached")
                case Turn.LOST if self._dealer.was_open:
                    self.leave("the connection to the dispatcher is lost")
                case Turn.NO_HANDSHAKE | Turn.NO_CURVE | Turn.LOST:
                    self.leave(self._stranger())
        return opened

    def _stranger(self) -> str:
        assert self._dealer is not None
        return (
            f"no handshake: it hangs, or its key is not dispatcher_key {self._dealer.place.key}: compare with what "
            "`slash32-dispatcher key` prints there"
        )

    # -- from one to the next -------------------------------------------------------------------------------------

    def step(self, now: float) -> str:
        """Why the connection was given up, if it was."""
        dealer = self._dealer
        if dealer is not None and not dealer.is_open:
            allowed = dealer.pace.handshake + 1000 if self._reached else 2 * dealer.pace.connect  # zmq's come before
            if now - self._begun > allowed / 1000:
                self.leave("no answer")
        why = self._leaving
        if dealer is not None and why:
            self._troubles.pop(dealer.place, None)  # the newest comes last
            self._troubles[dealer.place] = why
            self._hang_up()
            self._rounds.failed(now, now - self._accepted if self._accepted else 0.0)
            self._keys = []
        if self._dealer is None and now >= self._rounds.due:
            self._knock(now)
        return why

    def another_key(self, now: float) -> bool:
        """Whether there is one now to be tried before the one in use; then a new connection with that is made."""
        if self._dealer is None or self.identity.offered()[0] == self._dealer.keys:
            return False
        self._hang_up()
        self._keys = []
        self._knock(now)
        return True

    def _knock(self, now: float) -> None:
        """Raises ValueError for a place that zmq does not take: at the beginning, or never."""
        place = self._places[self._rounds.present]
        self._keys = self._keys or self.identity.offered()
        self._begun, self._accepted, self._reached = now, 0.0, False
        pace = SEVERAL if self.several else ALONE
        self._dealer = Dealer(self._context, place, self._keys.pop(0), pace)
        for fd in self._dealer.filenos():
            self._poll.register(fd, select.EPOLLIN)

    def _hang_up(self) -> None:
        self._leaving = ""
        if self._dealer is not None:
            for fd in self._dealer.filenos():
                self._poll.unregister(fd)
            self._dealer.close()
            self._dealer = None
