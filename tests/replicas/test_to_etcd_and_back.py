# From the store on one machine to etcd and back, and etcd with TLS: hosts notice nothing.
from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatcher_rig import REPO, guest, policy
from etcd_rig import Etcd, Tls
from trio import One, Trio, content

from dispatcher.store.commits import Table


def facts(one: One) -> dict[str, Any]:
    """What is stored, but for the dispatchers themselves."""
    found = content(one.get("/v1/backup"))
    return {**found, "records": [each for each in found["records"] if f"['{Table.DISPATCHER.value}'" not in each]}


def refused(run: subprocess.CompletedProcess[str], why: str) -> None:
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("slash32-dispatcher: ") and why in line


def run_alone(one: One) -> subprocess.CompletedProcess[str]:
    return subprocess.run(one.command("run"), check=False, cwd=REPO, capture_output=True, text=True, timeout=30)


def test_to_etcd_and_back(trio: Trio) -> None:
    one, *others = trio.all
    one.store("sqlite")
    one.start()
    hosts = trio.enter(3, at=[one])
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    revision = one.apply(policy("p", "all()", 'role == "web"'))
    trio.wait_live(one, revision)
    trio.until(lambda: one.get("/v1/status")["endpoints"] == 3)
    trio.wait_live(one, one.revision)
    before, audit = facts(one), one.get("/v1/audit")["items"]
    refused(one.migrate("etcd"), "database is locked): another dispatcher uses it")

    one.stop()
    moved = one.migrate("etcd")
    assert moved.returncode == 0 and f"revision {before['revision']} with " in moved.stdout, moved.stderr
    assert 'store = "etcd" in dispatcher.toml' in moved.stdout
    refused(one.migrate("etcd"), "its content was moved to etcd (http://")
    refused(run_alone(one), "its content was moved to etcd (http://")
    other = others[0]
    refused(other.migrate("etcd"), "it is not empty")
    for each in trio.all:
        each.store("etcd")
    trio.start()
    assert all(facts(each)["records"] == before["records"] for each in trio.all)
    assert one.get("/v1/status")["epoch"] == before["epoch"]
    assert one.get("/v1/audit")["items"] == audit
    trio.wait_live(one, one.revision)
    last = one.apply(policy("q", "all()", 'role == "web"'))
    assert last == before["revision"] + 4, "three dispatchers made themselves known"
    trio.wait_live(others[1], last)
    assert all((host.snapshots, host.was_held) == (1, False) for host in hosts)

    refused(one.migrate("sqlite"), "answers at tcp://127.0.0.1:")
    one.stop()
    one.door.close()  # it takes connections for a dispatcher that is not there
    refused(one.migrate("sqlite"), f"dispatcher {other.name} answers at tcp://127.0.0.1:")
    before, audit = facts(other), other.get("/v1/audit")["items"]
    for each in others:
        each.stop()
        each.door.close()
    refused(one.migrate("sqlite"), "there is a database already")
    one.database.rename(one.folder / "old.db")
    moved = one.migrate("sqlite")
    assert moved.returncode == 0 and f"revision {before['revision']} with " in moved.stdout, moved.stderr
    refused(run_alone(one), "its content was moved to")
    refused(other.migrate("sqlite"), "its content was moved to")
    one.store("sqlite")
    one.start()
    assert facts(one) == before and one.get("/v1/audit")["items"] == audit
    trio.wait_live(one, one.revision)
    trio.wait_live(one, one.apply(policy("r", "all()", "all()")))
    assert all((host.snapshots, host.was_held) == (1, False) for host in hosts)


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Trio]:
    cluster = Etcd(tmp_path / "etcd", tls=Tls(tmp_path / "tls"))
    trio = Trio(cluster, tmp_path, "/tls/")
    try:
        cluster.start()
        yield trio
    finally:
        trio.end()
        cluster.stop()


def test_etcd_with_tls(secret: Trio) -> None:
    hosts = secret.begin(3)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    secret.settle()
    for one in secret.all:
        secret.wait_live(one, one.apply(policy(f"p-{one.name}", "all()", "all()")))
    one = secret.all[0]
    one.stop()
    one.config.write_text("".join(x for x in one.config.read_text().splitlines(True) if not x.startswith("etcd_c")))
    assert "etcd_key" in one.config.read_text()
    run = run_alone(one)
    assert run.returncode != 0 and "etcd_cert and etcd_key belong together" in run.stderr
    one.config.write_text("".join(x for x in one.config.read_text().splitlines(True) if not x.startswith("etcd_k")))
    refused_by = run_alone(one).stderr
    assert "its certificate is not accepted" in refused_by and "etcd_ca" in refused_by, refused_by
