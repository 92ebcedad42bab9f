# slash32 apply and adopt against a real dispatcher process with hosts made of the real feed: what is changed, where it
# is live, and who waits for a word.
from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from cli_rig import LIVE, Fleet, one_line, text_of
from dispatcher_rig import WEB, FakeHost, policy

from slash32.wire import Failure

# --- apply -----------------------------------------------------------------------------------------------------------


def test_apply_creates_configures_and_leaves_unchanged(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text_of(policy("a", WEB, WEB)))
    before = fleet.revision()
    assert fleet.ok("apply", "-f", file, "--dry-run") == "GlobalNetworkPolicy a created (dry run)\n"
    assert fleet.revision() == before and fleet.run("get", "gnp", "a")[0] == 1
    assert fleet.ok("apply", "-f", file) == f"GlobalNetworkPolicy a created\nrevision {before + 1}\n"
    assert fleet.ok("apply", "-f", file) == f"GlobalNetworkPolicy a unchanged\nrevision {before + 1}\n"
    file.write_text(text_of(policy("a", WEB, 'role == "db"')))
    assert fleet.ok("apply", "-f", file, "--dry-run") == "GlobalNetworkPolicy a configured (dry run)\n"
    assert fleet.ok("apply", "-f", file).startswith("GlobalNetworkPolicy a configured\n")
    assert fleet.ok("delete", "-f", file) == f"GlobalNetworkPolicy a deleted (revision {before + 3})\n"


def test_apply_wait_says_where_it_is_live(fleet: Fleet) -> None:
    out = fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("live", WEB, WEB)))
    said = LIVE.fullmatch(out.removeprefix("GlobalNetworkPolicy live created\n"))
    assert said and said.group(2, 3) == ("3", "3") and int(said[1]) == fleet.revision()
    assert "live" in fleet.hosts[0].objects(fleet_kind())
    assert LIVE.search(fleet.ok("apply", "-f", "-", "--wait", text=text_of(policy("live", WEB, WEB)))), "unchanged"
    fleet.ok("delete", "gnp", "live")


def fleet_kind() -> Any:
    from slash32.pack import Kind

    return Kind.POLICY


def test_apply_wait_names_the_host_that_failed(fleet: Fleet, h3: FakeHost) -> None:
    h3.failures = [Failure("policy broken", "the kernel\nsays no")]
    text = text_of(policy("broken", 'role == "db"', WEB))
    code, out, err = fleet.run("apply", "-f", "-", "--wait", text=text)
    assert code == 1 and out == "GlobalNetworkPolicy broken created\n"
    assert err.splitlines()[-1] == "host h3 failed: policy broken: the kernel\\nsays no"
    assert "h3" in fleet.ok("status") and "the kernel\\nsays no" in fleet.ok("get", "hosts", "-o", "wide")
    fleet.ok("delete", "gnp", "broken")


def test_apply_wait_names_the_dead_host(fleet: Fleet, h3: FakeHost) -> None:
    dead = FakeHost(fleet.dispatcher, "h4")  # known, and never seen
    fleet.dispatcher.apply(dead.resource())
    h3.acknowledges = False
    text = text_of(policy("late", "all()", WEB))
    code, out, err = fleet.run("apply", "-f", "-", "--wait", "--timeout", "0.5", text=text)
    assert (code, out) == (1, "GlobalNetworkPolicy late created\n")
    live = f"revision {fleet.revision()} live on 2 of 4 hosts"
    assert re.fullmatch(rf"{live} after \d+ s; missing: h3( \(\d+ m?s behind\))?, h4 \(not connected\)\n", err)
    out = fleet.ok("status")
    assert re.search(r"^connected: +3 of 4 hosts$", out, re.M) and re.search(r"^not connected: +h4$", out, re.M)
    assert re.search(r"^not in sync: +h3$", out, re.M)
    fleet.ok("delete", "gnp", "late")
    fleet.ok("delete", "host", "h4")


def test_apply_wait_outlives_a_restart_of_the_dispatcher(fleet: Fleet, h3: FakeHost) -> None:
    h3.acknowledges = False
    applying = fleet.popen("apply", "-f", "-", "--wait", "--timeout", "15", stdin=subprocess.PIPE)
    assert applying.stdin
    before = fleet.revision()
    applying.stdin.write(text_of(policy("again", "all()", WEB)))
    applying.stdin.close()
    applying.stdin = None
    fleet.until(lambda: fleet.revision() > before)
    fleet.dispatcher.kill()
    h3.acknowledges = True
    fleet.dispatcher.start()
    code, out, err = fleet.ended(applying)
    assert (code, err) == (0, ""), (out, err)
    assert f"revision {before + 1} live on 3 of 3 hosts" in out
    fleet.ok("delete", "gnp", "again")


def test_one_bad_document_of_fifty_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    many = [policy(f"m{n}", WEB, WEB) for n in range(50)]
    many[30]["spec"]["ingress"][0]["protocol"] = "TPC"
    file = tmp_path / "many.yaml"
    file.write_text(text_of(*many))
    before = fleet.revision()
    code, out, err = fleet.run("apply", "-f", file)
    assert out == "" and "GlobalNetworkPolicy m30: spec.ingress[0].protocol" in one_line(code, out, err)
    assert fleet.revision() == before and '"m1' not in fleet.ok("get", "gnp", "-o", "json")
    other = fleet.hosts[0].resource(publicKey=fleet.hosts[1].keys.public)  # what only the dispatcher can see
    file.write_text(text_of(*many[:30], other))
    code, out, err = fleet.run("apply", "-f", file)
    assert out == "" and "that of host h2 already" in one_line(code, out, err)
    assert err.endswith("; nothing was applied\n") and fleet.revision() == before
    file.write_text(text_of(*many[:30]))  # the positive control
    assert fleet.ok("apply", "-f", file).count("created") == 30 and fleet.revision() == before + 1
    assert fleet.ok("delete", "-f", file).count("deleted") == 30


def test_adopt(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        h1, h2 = fleet.begin(2)
        assert fleet.ok("adopt", "--all") == "adopted: no host waits\n"
        fleet.dispatcher.stop()
        for path in tmp_path.glob("d.db*"):
            path.unlink()
        fleet.dispatcher.start()
        fleet.ok("apply", "-f", "-", text=text_of(h1.resource(), h2.resource()))
        fleet.until(lambda: len(fleet.dispatcher.get("/v1/status")["held"]) == 2)
        assert re.search(r"^held until adopted: +h1, h2$", fleet.ok("status"), re.M)
        waited = ("apply", "-f", "-", "--wait", "--timeout")
        code, _, err = fleet.run(*waited, "0.2", text=text_of(policy("p", WEB, WEB)))
        assert code == 1 and re.search(r"missing: h1\b.*, h2\b.*\n", err)
        assert fleet.run("adopt", "h1", "nobody")[::2] == (
            1, 'Host "nobody": there is none; `slash32 get hosts` lists them\n'
        )  # fmt: skip
        assert fleet.ok("adopt", "h1") == "adopted: h1\n"
        fleet.until(lambda: h1.in_sync and not h2.in_sync)
        assert fleet.ok("adopt", "--all") == "adopted: h2\n"
        fleet.until(lambda: h2.in_sync)
        assert LIVE.search(fleet.ok(*waited, "20", text=text_of(policy("p", WEB, WEB))))
    finally:
        fleet.end()
