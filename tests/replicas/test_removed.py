# A dispatcher that an operator removed, and that is there all the same: still running, started again, started with
# another key, with another name. The others hear of its hosts exactly while it is one of them.
from __future__ import annotations

from dispatcher_rig import guest, policy
from trio import One, Trio

from slash32.keys import load_or_create_key


def listed(one: One) -> dict[str, str]:
    return {item["name"]: item["publicKey"] for item in one.get("/v1/dispatchers")["items"]}


def remove(trio: Trio, name: str) -> None:
    status, body = trio.all[0].call("DELETE", f"/v1/dispatchers/{name}")
    assert status == 200, body
    trio.follow(body["revision"])


def works(trio: Trio, one: One, name: str) -> None:
    """What is done at it is on every host, and every dispatcher knows that."""
    revision = one.apply(policy(name, "all()", f'role == "{name}"'))
    trio.follow(revision)
    for each in trio.all:
        trio.wait_live(each, revision)


def test_one_that_runs_sends_its_hosts_away_until_it_is_started_again(trio: Trio) -> None:
    hosts = trio.begin(4)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.settle()
    one, two, three = trio.all
    remove(trio, "d3")
    trio.until(lambda: all(host.at in (one, two) for host in hosts))
    assert all(host.snapshots == 1 and not host.was_held for host in hosts)
    status, body = three.call("GET", "/health")
    assert status == 503 and "removed by an operator" in body["problems"][0]
    assert [each.call("GET", "/health")[0] for each in (one, two)] == [200, 200], "the control"
    trio.wait_live(one, three.apply(policy("there", "all()", "all()")))
    three.kill()
    three.start()
    trio.until(lambda: all(set(listed(each)) == {"d1", "d2", "d3"} for each in trio.all))
    assert three.call("GET", "/health")[0] == 200
    one.stop()
    two.stop()
    trio.until(lambda: all(host.at is three for host in hosts))


def test_one_that_comes_back_is_one_again(trio: Trio) -> None:
    trio.begin(3, spread=True)
    trio.settle()
    one, _, three = trio.all
    third = trio.hosts[2]
    three.stop()
    remove(trio, "d3")
    assert set(listed(one)) == {"d1", "d2"}
    three.start()
    trio.until(lambda: third.at is three and "d3" in listed(one))
    works(trio, three, "same")

    three.stop()
    remove(trio, "d3")
    (three.folder / "d.key").unlink()
    three.public_key = load_or_create_key(three.folder / "d.key").public
    third.stop()
    third.places = (three.place,)
    three.start()
    third.start()
    trio.until(lambda: third.at is three and listed(one).get("d3") == three.public_key)
    works(trio, three, "another-key")

    three.stop()
    three.config.write_text(three.config.read_text().replace('name = "d3"', 'name = "d4"'))
    three.start()  # without a word of an operator: its address and its key say who it is
    trio.until(lambda: third.at is three and set(listed(one)) == {"d1", "d2", "d4"})
    works(trio, three, "another-name")
