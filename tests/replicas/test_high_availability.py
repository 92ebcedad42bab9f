# docs/high-availability.md is true: etcd's members, the dispatchers and hosts run with the very lines of that page, but
# for addresses and folders; its commands are understood.
from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatcher_rig import REPO, guest, policy
from etcd_rig import Tls
from trio import Guest, One, Trio

import dispatcher.__main__
from dispatcher import config as dispatchers
from hostd import config as hosts
from slash32.cli.commands import cli

PAGE = (REPO / "docs" / "high-availability.md").read_text()
EXAMPLES = REPO / "examples" / "high-availability"
NET = "127.91.0."  # instead of 10.0.0.


def on(number: int, text: str) -> str:
    """As it is on the third, fourth, ... machine: its own name and address, but in lists of all."""
    lines = [
        line if line.count("10.0.0.") > 1 else line.replace("10.0.0.1", f"10.0.0.{number}")
        for line in text.replace("ETCD_NAME=d1", f"ETCD_NAME=d{number}").splitlines()
    ]
    return "\n".join(lines).replace('name = "d1"', f'name = "d{number}"') + "\n"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    try:
        yield fleet
    finally:
        fleet.end()


class Fleet:
    """Three machines, as the page has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tls = Tls(folder / "tls", names=",".join(["IP:127.0.0.1", *(f"IP:{NET}{n}" for n in (1, 2, 3))]))
        self.members: list[subprocess.Popen[bytes]] = []
        self.all: list[Machine] = []
        self.hosts: list[Guest] = []

    def local(self, text: str) -> str:
        return text.replace("10.0.0.", NET).replace("/etc/etcd/", f"{self.folder}/tls/")

    def start(self) -> None:
        for n in (1, 2, 3):
            lines = self.local(on(n, (EXAMPLES / "etcd").read_text())).splitlines()
            values = dict(line.split("=", 1) for line in lines)
            path = self.tls.made(f"server{n}")[0]
            values |= {k: v.replace("/server.", f"/server{n}.") for k, v in values.items() if "/server." in v}
            assert values["ETCD_CERT_FILE"] == str(path)
            env = {**values, "ETCD_DATA_DIR": str(self.folder / f"etcd{n}"), "PATH": "/usr/bin:/bin"}
            with (self.folder / f"etcd{n}.log").open("wb") as log:
                self.members.append(subprocess.Popen([shutil.which("etcd") or "etcd"], env=env, stdout=log, stderr=log))
        self.tls.made("client")

    def end(self) -> None:
        for host in self.hosts:
            host.stop()
        for machine in self.all:
            if machine.runs:
                machine.kill()
        for member in self.members:
            member.kill()
            member.wait(10)


class Machine(One):
    """A dispatcher with the page's configuration."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.folder = fleet.folder / f"d{number}"
        self.folder.mkdir()
        self.name, self.port, self.etcd, self.address = f"d{number}", 5532, [], f"{NET}{number}"
        self.config, self.log = self.folder / "dispatcher.toml", self.folder / "log"
        self.database, self.socket, self.process = self.folder / "d.db", self.folder / "api.sock", None
        text = fleet.local(on(number, (EXAMPLES / "dispatcher.toml").read_text()))
        text = text.replace("/etc/slash32/etcd/", f"{fleet.folder}/tls/")
        more = f'socket = "{self.socket}"\nkey_file = "{self.folder / "d.key"}"\ndatabase = "{self.database}"\n'
        self.config.write_text(text + more)
        self.public_key = self.run("key").stdout.strip()


def test_the_page_as_it_stands(fleet: Fleet, tmp_path: Path) -> None:
    for name in ("etcd", "dispatcher.toml", "hostd.toml"):
        assert (EXAMPLES / name).read_text() in PAGE
    fleet.start()
    fleet.all = [Machine(fleet, n) for n in (1, 2, 3)]
    trio = Trio.__new__(Trio)
    trio.all, trio.hosts, trio.folder = list(fleet.all), [], tmp_path
    trio.start()
    shown = hosts.load(_hostd(fleet, tmp_path))
    places = [(f"tcp://{machine.address}:5532", machine.public_key) for machine in fleet.all]
    assert list(shown.dispatchers()) == places
    host = Guest(trio, "h1", [])
    host.places = tuple(map(type(fleet.all[0].place), *zip(*places, strict=True)))
    trio.hosts = fleet.hosts = [host]
    trio.follow(fleet.all[0].apply(host.resource()))
    host.start()
    trio.until(lambda: host.in_sync)
    host.claim(guest(1))
    for one in fleet.all:
        trio.wait_live(one, one.apply(policy(f"p-{one.name}", "all()", "all()")))


def _hostd(fleet: Fleet, folder: Path) -> Path:
    """With the keys that the dispatchers have."""
    text = fleet.local((EXAMPLES / "hostd.toml").read_text())
    keys = re.findall(r'^ +"(.{40})",$', text, re.M)
    assert len(keys) == 3
    for key, machine in zip(keys, fleet.all, strict=True):
        text = text.replace(key, machine.public_key)
    (folder / "hostd.toml").write_text(text)
    return folder / "hostd.toml"


def test_the_files_are_read() -> None:
    found = dispatchers.load(EXAMPLES / "dispatcher.toml")
    assert (found.store, len(found.etcd), found.advertised) == ("etcd", 3, "tcp://10.0.0.1:5532")
    assert len(list(hosts.load(EXAMPLES / "hostd.toml").dispatchers())) == 3
    options = [line.split("=")[0] for line in (EXAMPLES / "etcd").read_text().splitlines()]
    assert len(options) == len(set(options)) and all(option.startswith("ETCD_") for option in options)


def test_the_commands_are_understood() -> None:
    seen = set()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S):
        for line in block.splitlines():
            program, *words = shlex.split(line)
            seen.add(program)
            if program == "slash32":
                cli.commands[words[0]].make_context(words[0], words[1:])
            elif program == "slash32-dispatcher":
                dispatcher.__main__._parser().parse_args(words)
            else:
                assert program in ("apt", "systemctl", "rm", "etcdctl")
    assert seen >= {"slash32", "slash32-dispatcher", "etcdctl"}
    assert cli.commands["dispatcher"].make_context("dispatcher", ["remove", "d3"])
