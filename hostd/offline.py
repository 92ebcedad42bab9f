# Owns: the answers to "what should the kernel hold, what would change?" from the last state on disk, beside a running
# hostd or without one. Changes nothing. Touches: reads the journal and the kernel.
from __future__ import annotations

from collections.abc import Iterator, Sequence

from slash32.net import format_address

from .change.plan import DelChain, DelClass, Limits, describe
from .change.settle import Settler
from .compiler.calc import Calculation
from .compiler.desired import ClassChains, Desired, Tap
from .compiler.forwarding import Route, TapAddress
from .compiler.names import height, is_derived
from .compiler.world import world_of
from .config import Config
from .dataplane.choice import chosen
from .dataplane.filter import IPTABLES
from .dataplane.host import Machine, boot_id, guard_of
from .dataplane.nft.admission import Admission
from .dataplane.nft.render import Content, render
from .journal import Journal
from .memory import Memory


def compiled(config: Config) -> str:
    """The packet filter as its own tools take it, then links, neighbours and routes as `ip` commands."""
    desired = _calculation(config).desired
    taps = [desired.taps[index] for index in sorted(desired.taps)]
    numbers = {chains: config.group_base + 1 + at for at, chains in enumerate(_classes(desired))}
    content = Content(
        sets=dict(sorted(desired.sets.items())),
        members={name: list(desired.members(name)) for name in desired.sets},
        chains=dict(sorted(desired.chains.items(), key=lambda item: (height(item[0]), item[0]))),
        classes={group: (chains.egress, chains.ingress) for chains, group in numbers.items()},
        admissions=[Admission(t.ifindex, t.mac, t.addresses, t.prefixes) for t in taps],
    )
    ruleset = _rendered(config, content, taps)
    return ruleset + "".join(f"# ip {line}\n" for line in _ip_commands(taps, desired, numbers))


def _rendered(config: Config, content: Content, taps: Sequence[Tap]) -> str:
    if chosen(config.packet_filter) == IPTABLES:
        from .dataplane.iptables.render import render as render_iptables

        return render_iptables(guard_of(config), content, {tap.ifindex: tap.name for tap in taps})
    return render(guard_of(config), content)


def pending(config: Config) -> list[str]:
    """What a resync would do now, one line each; but for classes that wait for their next guest, or to be collected."""
    calc = _calculation(config)
    machine = Machine(config)
    settler = Settler(machine.kernel, calc, Limits(config.group_base), config.guard_prefixes)
    guard = [] if machine.kernel.table.stands() else ["write the guard's chains and sets"]
    return guard + [describe(op) for op in settler.pending() if not _spare(op)]


def _spare(op: object) -> bool:
    return isinstance(op, DelClass) or (isinstance(op, DelChain) and is_derived(op.name))


def _calculation(config: Config) -> Calculation:
    memory = Memory(Journal(config.state_dir / "hostd.state"), boot_id())
    memory.recall(read_only=True)
    return Calculation.build(config.host, world_of(memory.replica), memory.locals)


def _classes(desired: Desired) -> list[ClassChains]:
    return sorted({tap.chains for tap in desired.taps.values()})


def _ip_commands(taps: Sequence[Tap], desired: Desired, numbers: dict[ClassChains, int]) -> Iterator[str]:
    names = {tap.ifindex: tap.name for tap in taps}
    for tap in taps:
        gateway = TapAddress(tap.ifindex)
        yield f"address replace {format_address(gateway.address)}/{gateway.length} dev {tap.name} nodad"
        for address in tap.addresses:
            yield f"neighbour replace {format_address(address)} lladdr {tap.mac.hex(':')} dev {tap.name} nud permanent"
    for route in sorted(desired.routes.values()):
        yield f"route replace {_way(route, names)} proto 132"
    for tap in taps:
        yield f"link set {tap.name} group {numbers[tap.chains]}"


def _way(route: Route, names: dict[int, str]) -> str:
    words = [str(route.prefix)]
    if route.via is not None:
        words += ["via", format_address(route.via)]
    if route.oif:
        words += ["dev", names.get(route.oif, "lo")]
    return " ".join(words + ["onlink"] * route.onlink)
