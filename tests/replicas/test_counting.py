# Which hosts a change is counted and waited for, with three dispatchers: those that it concerns, wherever they are.
from __future__ import annotations

from dispatcher_rig import guest, policy
from trio import Trio


def roles(trio: Trio) -> None:
    """h1 at d1 ... h6 at d3; what is said to role r1 concerns h1 only."""
    trio.begin(6, spread=True)
    for n, host in enumerate(trio.hosts, 1):
        host.claim(guest(n, f"r{n}"))
    trio.settle()


def to(role: str) -> dict[str, object]:
    return policy(f"only-{role}", f'role == "{role}"', f'role == "{role}"')


def test_only_whom_it_concerns_is_counted(trio: Trio) -> None:
    """h2 acknowledges late: at each dispatcher the times are its alone, whoever else is well."""
    roles(trio)
    for one in trio.all:
        late = trio.hosts[1]
        late.acknowledges = False
        revision = one.apply({**to("r2"), "metadata": {"name": f"p-{one.name}"}})
        for each in trio.all:
            trio.follow(revision)
            trio.until(lambda each=each, n=revision: each.get(f"/v1/revisions/{n}")["pending"] == ["h2"])
            assert each.get(f"/v1/revisions/{revision}")["counted"] == 0
        trio.for_a_while(0.3)
        late.acknowledges = True
        assert late.feed
        late.feed.ack(late.replica.revision)
        for each in trio.all:
            found = trio.wait_live(each, revision)
            trio.until(lambda each=each, n=revision: each.get(f"/v1/revisions/{n}")["counted"] == 1)
            found = each.get(f"/v1/revisions/{revision}")
            assert found["p50"] == found["p99"] >= 200
            assert found["live"] == found["hosts"] == 6


def test_all_are_counted_where_it_concerns_all(trio: Trio) -> None:
    """The control."""
    roles(trio)
    revision = trio.all[0].apply(policy("everybody", "all()", "all()"))
    for each in trio.all:
        trio.follow(revision)
        trio.until(lambda each=each, n=revision: each.get(f"/v1/revisions/{n}")["counted"] == 6)


def test_a_dispatcher_that_hangs_delays_no_change_that_is_not_for_its_hosts(trio: Trio) -> None:
    """d3 says nothing since before the change: its hosts are not waited for, but with the next that is theirs."""
    roles(trio)
    one, two, three = trio.all
    three.pause()
    try:
        revision = one.apply(to("r1"))
        for each in (one, two):
            trio.until(lambda each=each: each.revision >= revision)
            trio.until(lambda each=each, n=revision: each.get(f"/v1/revisions/{n}")["counted"] == 1)
        found = one.get(f"/v1/revisions/{revision}")
        late = one.get(f"/v1/revisions/{one.apply(to('r3'))}")
        assert "h3" in late["pending"]
        # Its roll counts for three seconds: a machine that is too slow for that sees hosts that nobody serves.
        assert found["pending"] == [] or set(found["disconnected"]) == {"h3", "h6"} == set(found["pending"])
    finally:
        three.resume()
    trio.settle()
