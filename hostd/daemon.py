# Owns: hostd as a process: its parts, its one loop, start and end. Everything is decided elsewhere (agent.py); here
# descriptors become calls. Touches: selectors, the clock, signals, the status file, systemd's notification socket.
from __future__ import annotations

import gc
import json
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable

from slash32 import __version__
from slash32.errors import Slash32Error, visible
from slash32.journal import fields
from slash32.metrics import CONTENT_TYPE
from slash32.notify import notify
from slash32.process import usage
from slash32.sync import Applied, Held

from .agent import Agent
from .change.plan import Limits
from .change.settle import Settler
from .compiler.absorb import absorb
from .compiler.calc import Calculation
from .compiler.world import world_of
from .config import Config, listening
from .dataplane import monitor as kernel_says
from .dataplane.filter import IPTABLES
from .dataplane.host import Machine, boot_id
from .dataplane.monitor import Monitor
from .dataplane.netlink import Overrun
from .dataplane.witness import Witness
from .guests.ear import Ear
from .guests.exempt import listed
from .guests.inbox import STATUS, Inbox, Request
from .journal import Journal
from .memory import Memory
from .reporting import metrics, status
from .reporting.answers import Answers
from .reporting.logs import Logs
from .reporting.scrape import Page, Scrape
from .reporting.staged import StagedCounts
from .session.feed import Asked, ClaimAnswer, Connected, Disconnected, Feed, FeedConfig, FeedEvent, Missed, Place

log = logging.getLogger("slash32.hostd")

TICK = 0.5  # seconds
AUDIT = 60.0  # seconds between looks at what sends no notification
POLL = 0.25  # seconds between looks at a packet filter that sends none
MAX_TOLD = 100  # lines about dispatchers that are not there
COUNT = 5.0  # seconds between looks at what staged policies have counted
WRITE = 5.0  # seconds between two status files that nobody asked for: with hundreds of guests one takes milliseconds


class Daemon:
    """Built in order: state from disk, the kernel in step with it, then whoever may speak to us."""

    def __init__(self, config: Config) -> None:
        gc.disable()  # until all is read: it stays, so that there is nothing to collect
        self.config = config
        self.machine = Machine(config)
        kernel = self.machine.kernel  # watched before its first read: what changes meanwhile is told afterwards
        self.monitor = Monitor(kernel.rtnl.port, kernel.table.port)
        kernel.table.heard_by(self.monitor.hear_ruleset)
        self.memory = Memory(Journal(config.state_dir / "hostd.state"), boot_id())
        self.memory.recall()
        self.memory.locals.verify(lambda tap, ifindex: kernel.rtnl.name(ifindex) == tap)
        calc = Calculation.build(config.host, world_of(self.memory.replica), self.memory.locals)
        knows = bool(self.memory.replica.epoch)
        limits = Limits(config.group_base, prune=knows, scanned=False)
        self.settler = Settler(kernel, calc, limits, config.guard_prefixes)
        self.settler.clock = time.monotonic
        self.settler.owes, self.settler.dispatcher_port = self.memory.owes, kernel.guard.dispatcher_port
        if self.memory.owed:  # hostd was killed between a change and the end of the flows that it forbids
            self.settler.force.owe_all(calc.desired.taps)
        self.machine.prepare()
        self.settler.resync()
        self._supplant()
        self.feed = self._feed()
        self.agent = Agent(calc, self.settler, self.feed, config.guard_prefixes)
        self.agent.exempt.listed = set(listed())
        self.agent.remember = self.memory.changed
        self.agent.knows = bool(self.memory.replica.epoch or self.memory.locals.by_key)
        self.ear = Ear(config.libvirt, self.agent, self._allow_pruning)
        self.inbox = Inbox(config.run_dir / "hook.sock")
        self.logs = Logs(self.agent, kernel.rtnl.name)
        self.staged = StagedCounts()
        self.answers = Answers(lambda: Witness(self.machine.packet_filter), self._answer)
        self.measured = metrics.Measured()
        self.ear.scan_took = self.measured.scanned
        self.scrape = Scrape(listening(config.metrics_listen), self._page) if config.metrics_listen else None
        self._selector = selectors.DefaultSelector()
        self._audited = self._retried = self._counted = self._polled = self._wrote = self._ticked = time.monotonic()
        self._pause = POLL if self.machine.packet_filter == IPTABLES else TICK
        self._said: tuple[object, ...] = ()
        self._told: set[str] = set()  # about dispatchers, since one was followed
        self._running = True

    # -- life -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until SIGTERM or SIGINT. The kernel stays as it is: nothing is withdrawn at the end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self.inbox.register(self._selector)
        self._register(self.ear.fileno(), self.ear.hear)
        for fd in self.monitor.filenos():
            self._register(fd, self._hear_kernel)
        self._register(self.logs.fileno(), self.logs.hear)
        self.logs.tick(time.monotonic())  # heard from the first packet on
        self._register(self.answers.fileno(), self.answers.ready)
        if self.feed is not None:
            self._register(self.feed.fileno(), self._hear_dispatcher)
        if self.scrape is not None:
            self.scrape.register(self._selector, time.monotonic())
        gc.freeze()
        gc.enable()
        notify("READY=1")
        self._write_status()
        log.info("in step with the kernel: %d endpoints", len(self.settler.calc.desired.taps))
        self.ear.watcher.start()
        try:
            while self._running:
                self._turn()
            self._write_status()
        finally:
            notify("STOPPING=1")
            self._close()

    def _close(self) -> None:
        self.ear.close()
        self.inbox.close()
        self.logs.close()
        self.answers.close()
        if self.scrape is not None:
            self.scrape.close()
        if self.feed is not None:
            self.feed.close()
        self.memory.close()

    def _register(self, fd: int, hear: Callable[[float], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, hear)

    def _stop(self, *_: object) -> None:
        self._running = False

    def _turn(self) -> None:
        feed, now = self.feed, time.monotonic()
        ready = self._selector.select(self._pause if feed is None else min(self._pause, feed.patience(now)))
        now = time.monotonic()
        for key, _ in ready:
            if isinstance(key.data, Inbox):
                for request in key.data.ready(key, now):
                    self._asked(request, now)
            else:
                key.data(now)
        if feed is not None and (now - self._ticked >= TICK or not feed.patience(now)):
            self._ticked = now
            self._dispatched(feed.tick(now), now)
        self.agent.tick(now)
        self.agent.settle()
        if now - self._polled >= POLL:
            self._polled = now
            self._look_at_filter()
        if now - self._retried >= TICK:
            self._retried = now
            self._slow(now)

    def _asked(self, request: Request, now: float) -> None:
        if request.operation == STATUS:
            self.agent.settle()
            self._count_staged(now)
            self._write_status()
            request.answer(0)
        else:
            self.ear.operations.hook(metrics.Timed(request, self.measured, time.monotonic), now)

    def _slow(self, now: float) -> None:
        """What need not be done in every turn."""
        self.inbox.expire(now)
        notify("WATCHDOG=1")
        if self.settler.retry_due(now):
            self.settler.retry(now)
        self._allow_pruning()
        self._supplant()
        self.logs.tick(now)
        if self.scrape is not None:
            self.scrape.tick(now)
        if now - self._counted >= COUNT:
            self._count_staged(now)
        if now - self._wrote >= WRITE:
            self._write_status()
        if now - self._audited >= AUDIT:
            self._audited = now
            self.agent.dirty.merge(self.settler.audit())
            self.agent.dirty.merge(self.settler.calc.collect_classes())
            self.machine.keep()
            if self.machine.packet_filter == IPTABLES:
                self.agent.resync()  # rules and members that took others' places: no size tells

    # -- the dispatcher -------------------------------------------------------------------------------------------

    def _hear_dispatcher(self, now: float) -> None:
        assert self.feed is not None
        self._dispatched(self.feed.ready(now), now)

    def _dispatched(self, events: Iterable[FeedEvent], now: float) -> None:
        """In order, but for what the replica already took: that is one change of the kernel, before any answer."""
        batch = [event for event in events if isinstance(event, Applied)]
        if batch:
            self._told.clear()
            self.memory.applied(batch)
            self.agent.applied(batch[-1].revision, absorb(self.settler.calc, batch))
            self._allow_pruning()
        for event in events:
            match event:
                case Connected(endpoint):
                    self._tell(logging.INFO, f"connected to the dispatcher at {endpoint}")
                    self.agent.connected(now)
                case Disconnected(reason, away):
                    level = logging.INFO if away else logging.WARNING
                    self._tell(level, f"no dispatcher: {reason}: the last state stays in force")
                    self.agent.disconnected()
                case Missed(endpoint, reason):
                    self._tell(logging.WARNING, f"dispatcher {endpoint}: {reason}")
                case ClaimAnswer(seq, refused):
                    self.measured.claims_refused += len(refused)
                    self.agent.answered(seq, {r.key: r.message for r in refused}, now)
                case Asked(seq, question):
                    if now - self._counted >= POLL:  # however many ask
                        self._count_staged(now)
                    self.answers.ask(seq, question, self.settler.calc.desired.taps, self.staged.report())
                case Held(reason):
                    log.error("held: %s: check the dispatcher, then run `slash32 adopt`", reason)
                    self.agent.held = reason

    def _tell(self, level: int, line: str) -> None:
        """Each line once, until a dispatcher is followed again: it is knocked at every few seconds."""
        if line not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(line)
            log.log(level, "%s", visible(line))

    def _allow_pruning(self) -> None:
        """Who remembers nothing may delete only when everything is known: all drivers scanned, the dispatcher heard.
        Else guests that run would be cut off until their claims are answered."""
        if self.settler.limits.prune and self.settler.limits.scanned and self.agent.knows:
            return  # it stays so
        if self.ear.complete:
            self.settler.limits = self.settler.limits._replace(scanned=True)
            self.agent.everything_seen(time.monotonic())
        if not self.settler.limits.prune and self.ear.complete and self.agent.knows_all():
            self.settler.limits = self.settler.limits._replace(prune=True)
            self.agent.resync()

    def _answer(self, seq: int, text: str) -> None:
        if self.feed is not None:
            self.feed.answer(seq, text)

    # -- the kernel -----------------------------------------------------------------------------------------------

    def _hear_kernel(self, _now: float) -> None:
        try:
            events = self.monitor.read()
        except Overrun:
            self.agent.notifications_lost()
            return
        for event in events:
            if isinstance(event, kernel_says.RulesetChanged):
                before = self.settler.counters.healed
                self.agent.resync()
                repairs = self.settler.counters.healed - before
                about = fields(program=event.program, pid=event.process, repairs=repairs)
                words = event.program, event.process, repairs
                log.warning("%s (pid %d) changed our tables: %d repairs", *words, extra=about)
                break
        for event in events:
            self._kernel_said(event)
        taps = self.settler.calc.desired.taps
        if any(isinstance(event, kernel_says.NetconfChanged) and event.ifindex not in taps for event in events):
            self.machine.keep()  # once: where forwarding is switched on, each of a thousand taps says so

    def _look_at_filter(self) -> None:
        """iptables and ipset tell nobody of changes; of nf_tables some may not have been heard."""
        table, before = self.machine.kernel.table, self.settler.counters.healed
        try:
            if not table.changed():
                return
        except OSError as error:
            log.warning("the packet filter cannot be looked at: %s", error)
            return
        self.agent.resync()
        table.settled()
        repairs = self.settler.counters.healed - before
        if repairs or self.machine.packet_filter == IPTABLES:
            log.warning("somebody changed our tables or sets: %d repairs", repairs, extra=fields(repairs=repairs))

    def _supplant(self) -> None:
        """The other packet filter's time is over as soon as all that it held is in this one."""
        if not self.machine.follows or self.settler.refused or not self.settler.limits.prune:
            return
        try:
            self.machine.supplant()
        except (Slash32Error, OSError) as error:
            log.error("the packet filter used before cannot be removed: %s", error)
        else:
            log.info("%s is in force, what stood in the other packet filter is gone", self.machine.packet_filter)

    def _kernel_said(self, event: kernel_says.Event) -> None:
        dirty, settler = self.agent.dirty, self.settler
        match event:
            case kernel_says.LinkSeen(link):
                dirty.merge(settler.link_seen(link))
                guarded = link.name.startswith(self.config.guard_prefixes) and not link.master
                if guarded and self.agent.locals.carried_by(link.ifindex) is None:
                    self.ear.stranger(link.ifindex)
            case kernel_says.LinkGone():
                self.ear.link_gone(event.ifindex)
                self.agent.link_gone(event.ifindex)
            case kernel_says.RouteGone(route):
                dirty.merge(settler.route_gone(route))
            case kernel_says.RouteSeen(route):
                dirty.merge(settler.route_seen(route))
            case kernel_says.RouteOverwritten(prefix):
                dirty.merge(settler.route_lost(prefix))
            case kernel_says.NeighbourSeen(neighbour):
                dirty.merge(settler.neighbour_seen(neighbour))
            case kernel_says.NeighbourGone(neighbour):
                dirty.merge(settler.neighbour_gone(neighbour))
            case kernel_says.AddressGone(address):
                dirty.merge(settler.gateway_gone(address.ifindex))
            case kernel_says.NetconfChanged(ifindex):
                dirty.merge(settler.sysctls_changed(ifindex))

    def _count_staged(self, now: float) -> None:
        self._counted = now
        desired = self.settler.calc.desired
        try:
            counted = self.machine.kernel.table.counters({chain for chain, _ in desired.staged})
        except OSError as error:
            log.warning("what staged policies have counted cannot be read: %s", error)
            return
        as_desired = {name: rules for name, rules in counted.items() if len(rules) == len(desired.chains.get(name, ()))}
        self.staged.saw(desired.staged, as_desired)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _feed(self) -> Feed | None:
        config = self.config
        if not config.dispatcher:
            return None
        places = tuple(Place(*each) for each in config.dispatchers())
        about = {"version": __version__, "filter": self.machine.packet_filter}
        return Feed(FeedConfig(places, config.key_file, config.addresses, config.host, about), self.memory.replica)

    def _page(self, path: str) -> Page | None:
        """What `metrics_listen` shows."""
        logged, untold = self.logs.counts
        filtered, libvirt = self.machine.packet_filter, self.ear.connected
        now = metrics.Present(filtered, libvirt, self.staged.report(), logged, untold, self.memory.trouble)
        if path == "/metrics":
            return Page(200, CONTENT_TYPE, metrics.exposition(self.agent, self.measured, now, usage()))
        if path == "/health":
            health = metrics.health(self.agent, now)
            return Page(200 if health["status"] == "ok" else 503, "application/json", json.dumps(health) + "\n")
        return None

    def _write_status(self) -> None:
        self._wrote = time.monotonic()
        staged = self.staged.report()
        now = status.signature(self.agent, self.memory.trouble, staged)
        if now != self._said:
            self._said = now
            path = self.config.run_dir / "hostd.status"
            fresh = path.with_suffix(".new")
            said = status.of(self.agent, os.getpid(), self.memory.trouble)
            said |= {"staged": staged, "packet_filter": self.machine.packet_filter}
            fresh.write_text(json.dumps(said, sort_keys=True))
            fresh.replace(path)
