# Configuration files that are wrong: one line that names file, key and remedy, no traceback; exit code 1, of run 2,
# which systemd does not try again.
from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import dispatcher.__main__
import hostd.__main__
from hostd.config import Config, decode

KEY = "X]+9gId{iHrQk})+WQNPJAgaRnGzi)Xkt<[{]%:2"


def fleet(dispatcher: str = "tcp://10.0.0.1:5532", key: str = KEY) -> str:
    return f'dispatcher = "{dispatcher}"\ndispatcher_key = "{key}"\n'


def three(*others: int | str, port: int = 5532) -> str:
    """10.0.0.1 and others, and the key(s)."""
    key = next((other for other in others if isinstance(other, str)), f'"{KEY}"')
    numbers = [1, *(other for other in others if isinstance(other, int))]
    ports = [*[5532] * (len(numbers) - 1), port]
    endpoints = [f"tcp://10.0.0.{n}:{each}" for n, each in zip(numbers, ports, strict=True)]
    return f"dispatcher = {json.dumps(endpoints)}\ndispatcher_key = {key}\n"


HOSTD = [  # text, and a piece of the complaint
    ("[", "not TOML"),
    ("host", "not TOML"),
    ('host = "a"\nhost = "b"', "not TOML"),
    ('host = "\0"', "not TOML"),
    (b'host = "\xff"', "not UTF-8 text, at byte 8"),
    ("x" * 100_000, "not TOML"),
    ('hots = "h1"', "hots: no such setting; known are addresses"),
    ('"a\\nb" = 1', "a\\nb: no such setting"),
    (f'{"x" * 1000} = 1', "no such setting"),
    ('[hostd]\nhost = "a"', "hostd: no such setting"),
    ("host = 1", "host: give a string"),
    ('host = ""', "host:"),
    ('host = "Server 1"', "host:"),
    ('host = "a\\nb"', "host:"),
    (f'host = "{"x" * 300}"', "host:"),
    ('addresses = "10.0.0.1"', 'addresses: give a list of strings, like ["a", "b"]'),
    ("addresses = [1]", "addresses: give a list"),
    ('addresses = ["10.0.0.1/24"]', "addresses:"),
    ('addresses = ["10.0.0.300"]', "addresses:"),
    ('addresses = ["10.0.0.1", "10.0.0.2"]', "addresses: give at most one"),
    ('addresses = ["127.0.0.1"]', "other hosts cannot reach"),
    ('addresses = ["fe80::1"]', "other hosts cannot reach"),
    ('dispatcher = "tcp://10.0.0.1:5532"', "belong together"),
    (f'dispatcher_key = "{KEY}"', "belong together"),
    (fleet("10.0.0.1:5532"), "not like tcp://10.0.0.1:5532"),
    (fleet("tcp://10.0.0.1"), "not like tcp"),
    (fleet("tcp://10.0.0.1:99999"), "not like tcp"),
    (fleet("tcp://*:5532"), "not like tcp"),
    (fleet("tcp://10.0.0.1:5532\\nx"), "not like tcp"),
    (fleet(key="short"), "dispatcher_key:"),
    (fleet(key="~" * 40), "dispatcher_key:"),
    (fleet(key="#" * 40), "dispatcher_key:"),  # Z85 by its characters only
    ("dispatcher = 1", "dispatcher: give a string, or a list of strings"),
    ('dispatcher = ["tcp://10.0.0.1:5532", 2]', "dispatcher: give a string, or a list of strings"),
    (f'dispatcher = []\ndispatcher_key = "{KEY}"', "belong together"),
    (f'dispatcher = ["tcp://10.0.0.1:5532", ""]\ndispatcher_key = "{KEY}"', 'dispatcher: "" is not like'),
    (f'dispatcher = ["tcp://10.0.0.1:5532", "x\\ny"]\ndispatcher_key = "{KEY}"', "is not like tcp"),
    (three(2, 1), "is there twice"),
    (three(2, 2, port=5533), "ports 5532, 5533: give all dispatchers the same port"),
    (three(2, 3, f'["{KEY}", "{KEY}"]'), "dispatcher_key: 2 keys: give one key that all 3"),
    (three(2, 3, f'["{KEY}", "{KEY}", "short"]'), 'dispatcher_key: "short" is not a key'),
    (three(2, 3, "[]"), "belong together"),
    (three(*range(2, 17)), "dispatcher: 16 of them, more than 15"),
    ("guard_prefixes = []", "guard_prefixes:"),
    ('guard_prefixes = ["v"]', "guard_prefixes:"),
    ('guard_prefixes = ["vnet*"]', "guard_prefixes:"),
    ('group_base = "x"', "group_base: give a number"),
    ("group_base = 7", "group_base: 0x7"),
    ("group_base = -65536", "group_base:"),
    ("conn_limit = 0", "conn_limit:"),
    ("conn_limit = true", "conn_limit: give a number"),
    ('on_hostd_down = "open"', "on_hostd_down:"),
    ("table_owner = true", "table_owner: give a string"),
    ('packet_filter = "nft"', "packet_filter: \"nft\" is not one of auto"),
    ("libvirt = []", "libvirt:"),
    ('libvirt = ["system"]', "libvirt:"),
    ('state_dir = "here"', "state_dir:"),
    ('log_format = "xml"', 'log_format: "xml" is not one of text, json'),
    ("metrics_listen = 9533", "metrics_listen: give a string"),
    ('metrics_listen = "127.0.0.1:9533"', "is not like http://127.0.0.1:9533"),
    ('metrics_listen = "https://127.0.0.1:9533"', "metrics_listen:"),
    ('metrics_listen = "http://localhost:9533"', "metrics_listen:"),
    ('metrics_listen = "http://127.0.0.1:99999"', "metrics_listen:"),
    ('metrics_listen = "http://127.0.0.300:9533"', "metrics_listen:"),
    ('metrics_listen = "http://[::1:9533"', "metrics_listen:"),
    ('metrics_listen = "http://127.0.0.1:9533/metrics"', "metrics_listen:"),
]
DISPATCHER = [
    ("[", "not TOML"),
    (b"\xff", "not UTF-8 text"),
    ('lisen = "x"', "lisen: no such setting; known are listen"),
    ("[api]", "api: no such setting"),
    ("listen = 5532", "listen: give a string"),
    ('listen = ""', "listen:"),
    ('listen = "0.0.0.0:5532"', "listen:"),
    ('listen = "tcp://0.0.0.0"', "listen:"),
    ('listen = "tcp://0.0.0.0:99999"', "listen:"),
    ('listen = "tcp://0.0.0.0:http"', "listen:"),
    ('listen = "ipc:///run/x"', "listen:"),
    ('socket = "api.sock"', "socket:"),
    (f'socket = "/{"x" * 200}"', "socket: give a path of at most 107 bytes"),
    ("database = true", "database: give a string"),
    ('database = ""', "database:"),
    ('key_file = "k"', "key_file:"),
    ('key_file = "/var/lib/x\\ny"', "key_file:"),
    ('database = "/a"\nkey_file = "/a"', "three different paths"),
    ('store = "mysql"', '"mysql" is not one of sqlite, etcd'),
    ('store = "etcd"', "etcd: is missing; name etcd's members"),
    ('store = "etcd"\netcd = ["http://10.0.0.1:2379"]', "advertise: is missing"),
    ('etcd = "http://10.0.0.1:2379"', "etcd: give a list of strings"),
    ("etcd = [1]", "etcd: give a list of strings"),
    ('etcd = ["10.0.0.1:2379"]', "is not like http://10.0.0.1:2379"),
    ('etcd = ["http://10.0.0.1:2379/v3"]', "is not like http://10.0.0.1:2379"),
    ('etcd = ["http://10.0.0.1:2379", "https://10.0.0.2:2379"]', "give all members as https://"),
    ('etcd = ["http://10.0.0.1:2379", "http://10.0.0.1:2379/"]', "give each member once"),
    ('etcd_prefix = "slash32"', "etcd_prefix:"),
    ('etcd_prefix = "/a b/"', "etcd_prefix:"),
    ('etcd = ["http://10.0.0.1:2379"]\netcd_ca = "/ca"', "etcd_ca: is for TLS"),
    ('etcd = ["https://10.0.0.1:2379"]\netcd_cert = "/c"', "etcd_cert and etcd_key belong together"),
    ('name = "D 1"', "name:"),
    ('advertise = "tcp://0.0.0.0:5532"', "give an address that others can connect to"),
    ('advertise = "tcp://[::]:5532"', "give an address that others can connect to"),
    ('advertise = "10.0.0.1"', "advertise:"),
    ('socket_group = "a b"', "is not the name of a group"),
    ('api_listen = "http://0.0.0.0:5533"', "tokens go over TLS only"),
    ('api_listen = "0.0.0.0:5533"', "is not like https://0.0.0.0:5533"),
    ('api_listen = "https://0.0.0.0:5533/v1"', "is not like https://0.0.0.0:5533"),
    ('api_listen = "https://0.0.0.0:5533"', "api_cert: is missing"),
    ('api_listen = "https://0.0.0.0:5533"\napi_cert = "/c"\napi_key = "/k"', "api_tokens: is missing"),
    ('api_tokens = "tokens"', "give an absolute path"),
    ('metrics_listen = "https://127.0.0.1:9532"', "is not like http://127.0.0.1:9532"),
    ("metrics_listen = 9532", "metrics_listen: give a string"),
    ("name = []", "name: give a string"),
    ('etcd = ""', "etcd: give a list of strings"),
]


def write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def one_line(capsys: pytest.CaptureFixture[str], program: str, file: Path) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{program}: {file}: ") and err.endswith("\n"), err
    line = err[:-1]
    assert line.isprintable() and len(line) < 500
    return line


@pytest.mark.parametrize(("content", "piece"), HOSTD)
def test_hostd(content: str | bytes, piece: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "hostd.toml", content)
    assert hostd.__main__.main(["--config", str(tmp_path / "hostd.toml"), "run"]) == 2
    one_line(capsys, "slash32-hostd", tmp_path / "hostd.toml")
    assert hostd.__main__.main(["--config", str(tmp_path / "hostd.toml"), "status"]) == 1
    assert piece in one_line(capsys, "slash32-hostd", tmp_path / "hostd.toml")


@pytest.mark.parametrize(("content", "piece"), DISPATCHER)
def test_dispatcher(content: str | bytes, piece: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "dispatcher.toml", content)
    assert dispatcher.__main__.main(["run", "--config", str(tmp_path / "dispatcher.toml")]) == 2
    one_line(capsys, "slash32-dispatcher", tmp_path / "dispatcher.toml")
    assert dispatcher.__main__.main(["key", "--config", str(tmp_path / "dispatcher.toml")]) == 1
    assert piece in one_line(capsys, "slash32-dispatcher", tmp_path / "dispatcher.toml")


@pytest.mark.parametrize("name", ["missing", ".", "loop"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    file = tmp_path / name
    assert hostd.__main__.main(["run", "--config", str(file)]) == 2
    one_line(capsys, "slash32-hostd", file)
    assert dispatcher.__main__.main(["--config", str(file), "run"]) == 2
    one_line(capsys, "slash32-dispatcher", file)


def test_the_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Good files are taken: the commands go on to what they are to do."""
    state = tmp_path / "state"
    text = f'host = "h1.rack-2"\naddresses = ["10.0.0.11", "fd00::11"]\n{fleet("tcp://[fd00::1]:5532")}'
    write(tmp_path / "hostd.toml", f'{text}state_dir = "{state}"\n')
    assert hostd.__main__.main(["key", "--config", str(tmp_path / "hostd.toml")]) == 0
    tcp = 'api_listen = "https://[::]:5533"\napi_cert = "/c"\napi_key = "/k"\napi_tokens = "/t"\nname = "d1.x"\n'
    etcd = 'store = "etcd"\netcd = ["https://e1:2379", "https://e2:2379/"]\netcd_ca = "/ca"\n'
    etcd += 'advertise = "tcp://d1:5532"\n'
    write(tmp_path / "d.toml", f'listen = "tcp://*:5532"\nkey_file = "{state}/d.key"\n{tcp}{etcd}')
    assert dispatcher.__main__.main(["key", "--config", str(tmp_path / "d.toml")]) == 0
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [40, 40]


def test_one_dispatcher_or_several() -> None:
    def read(text: str) -> list[tuple[str, str]]:
        return list(decode(tomllib.loads(text)).dispatchers())

    other = KEY[::-1]
    assert read("") == read('dispatcher = ""\ndispatcher_key = ""') == []
    assert read(fleet()) == read(f'dispatcher = ["tcp://10.0.0.1:5532"]\ndispatcher_key = ["{KEY}"]')
    assert read(fleet()) == [("tcp://10.0.0.1:5532", KEY)]
    assert read(three(2, 3)) == [(f"tcp://10.0.0.{n}:5532", KEY) for n in (1, 2, 3)]
    assert [key for _, key in read(three(2, 3, json.dumps([KEY, other, KEY])))] == [KEY, other, KEY]
    assert decode(tomllib.loads(three(2))).guard(()).dispatcher_port == 5532


def test_the_guard_goes_up_whatever_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests of a host whose hostd.toml is broken are isolated, not open."""
    loaded: list[Config] = []

    class Machine:
        def __init__(self, config: Config) -> None:
            loaded.append(config)
            self.kernel, self.follows = self, False

        def load(self) -> None:
            loaded.append(loaded[-1])

    monkeypatch.setattr("hostd.dataplane.host.Machine", Machine)
    file = tmp_path / "hostd.toml"
    write(file, "[")
    assert hostd.__main__.main(["guard", "--config", str(file)]) == 1
    assert loaded == [Config(), Config()] and Config().guard_prefixes == ("vnet",)
    loaded.clear()
    write(file, 'guard_prefixes = ["tap"]')  # the control
    assert hostd.__main__.main(["guard", "--config", str(file)]) == 0
    assert [config.guard_prefixes for config in loaded] == [("tap",), ("tap",)]


@pytest.mark.parametrize("program", [hostd.__main__, dispatcher.__main__])
@pytest.mark.parametrize("words", [[], ["bogus"], ["run", "x\ny"], ["--conf", "x", "key"], ["key", "--config"]])
def test_a_wrong_command_line_is_one_line_and_2(
    program: object, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(words)  # type: ignore[attr-defined]
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and err[:-1].isprintable() and err.endswith(" --help\n")
