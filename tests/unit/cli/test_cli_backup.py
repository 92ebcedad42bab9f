# `slash32 backup` and `restore`: the file is whole, its owner's only, and never overwritten by mistake.
from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slash32.cli.backup import check
from tests.unit.cli.canned import Dispatcher, Run, on_a_socket, runs

DOCUMENT: dict[str, Any] = {
    "slash32Backup": 1, "epoch": "e1", "revision": 812, "made": "2026-11-23T18:47:30Z",
    "records": [["resource", ["Tier", "t"], "e30="], ["host", ["h1"], ""]],
}  # fmt: skip


@pytest.fixture
def dispatcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    monkeypatch.setenv("SLASH32_SOCKET", str(tmp_path / "api.sock"))
    with on_a_socket(tmp_path / "api.sock", Dispatcher()) as fake:
        fake.answers["GET", "/v1/backup"] = (200, DOCUMENT)
        fake.answers["POST", "/v1/restore"] = (200, {"revision": 812})
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runs(capsys)


def test_backup(dispatcher: Dispatcher, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "room" / "b.json"
    file.parent.mkdir()
    assert run("backup", file) == (0, f"{file}: revision 812, 2 records\n", "")
    assert json.loads(file.read_bytes()) == DOCUMENT and file.stat().st_mode & 0o777 == 0o600
    file.write_text("mine")
    code, out, err = run("backup", file)
    assert (code, out, err) == (1, "", f"{file}: is there already; give another name, or --force\n")
    assert file.read_text() == "mine"
    assert run("backup", file, "--force")[0] == 0 and json.loads(file.read_bytes()) == DOCUMENT
    assert file.stat().st_mode & 0o777 == 0o600 and [*file.parent.iterdir()] == [file]


def test_backup_to_stdout(dispatcher: Dispatcher, capfdbinary: Any) -> None:
    from slash32.cli.__main__ import main

    assert main(["backup", "-"]) == 0
    assert json.loads(capfdbinary.readouterr().out) == DOCUMENT


def test_what_must_not_be_written_over(dispatcher: Dispatcher, run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("elsewhere")
    for name, why in (
        (tmp_path, "is there, and is not a file"),
        ("/dev/null", "is there, and is not a file"),
        (tmp_path / "loop", "is there, and is not a file"),
        (tmp_path / "no" / "b.json", "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        for more in ([], ["--force"]):
            code, out, err = run("backup", name, *more)
            assert (code, out) == (1, "") and err.endswith(f"{why}; nothing was saved\n") and len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api.sock", "loop"]


def test_somebody_was_faster(dispatcher: Dispatcher, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "b.json", os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        file.write_text("theirs")

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run("backup", file)
    assert (code, err) == (1, f"{file}: File exists; nothing was saved\n") and file.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api.sock", "b.json"]


def test_half_an_answer_is_no_backup(dispatcher: Dispatcher, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    dispatcher.answers["GET", "/v1/backup"] = (200, json.dumps(DOCUMENT).encode()[:-9])
    code, _, err = run("backup", file)
    assert code == 1 and "is no backup, or only a part of one" in err and not file.exists()
    dispatcher.answers["GET", "/v1/backup"] = (503, {"errors": ["the store is away"]})
    assert run("backup", file)[::2] == (1, "the store is away\n") and not file.exists()


def test_restore(dispatcher: Dispatcher, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b.json"
    file.write_text(json.dumps(DOCUMENT))
    code, out, err = run("restore", file, "--yes")
    assert (code, err) == (0, "") and out.splitlines() == [
        "restored: revision 812, made 2026-11-23T18:47:30Z, 2 records; the dispatcher is at revision 812",
        "hosts that have seen a later revision, or another store, hold what they have until slash32 adopt",
    ]
    assert run("restore", file, "--yes", "--replace")[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert run("restore", "-", "--yes")[0] == 0
    urls = ["/v1/restore?replace=0", "/v1/restore?replace=1", "/v1/restore?replace=0"]
    assert dispatcher.asked == [("POST", url, DOCUMENT) for url in urls]
    assert run("restore", file)[0] == 2, "there is no terminal"


def test_restore_is_refused_where_something_is(dispatcher: Dispatcher, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    file.write_text(json.dumps(DOCUMENT))
    dispatcher.answers["POST", "/v1/restore"] = (409, {"errors": ["the store is at revision 9."]})
    code, out, err = run("restore", file, "--yes")
    assert (code, out) == (1, "")
    assert err == "the store is at revision 9; to give up what it has: slash32 restore --replace\n"


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not JSON"),
    "half": (json.dumps(DOCUMENT).encode()[:50], "only a part"),
    "gzip": (b"\x1f\x8b\x08", "gunzip"),
    "deep": (b"[" * 100_000, "it is not JSON"),
    "list": (b"[]", "it does not say slash32Backup"),
    "policies": (b'{"kind": "List"}', "it does not say slash32Backup"),
    "later": (json.dumps({**DOCUMENT, "slash32Backup": 2}).encode(), '"2" is not known here; 1 is'),
    "evil": (json.dumps({**DOCUMENT, "slash32Backup": "\x1b[31m" * 99}).encode(), r"\x1b[31m"),
    "no epoch": (json.dumps({**DOCUMENT, "epoch": None}).encode(), "epoch: is missing"),
    "true": (json.dumps({**DOCUMENT, "revision": True}).encode(), "revision: is missing, or of another kind"),
    "negative": (json.dumps({**DOCUMENT, "revision": -1}).encode(), "revision: is negative"),
    "record": (json.dumps({**DOCUMENT, "records": [*DOCUMENT["records"], ["x"]]}).encode(), "records[2]"),
    "key": (json.dumps({**DOCUMENT, "records": [["host", "h1", ""]]}).encode(), "records[0]"),
    "no key": (json.dumps({**DOCUMENT, "records": [["host", [], ""]]}).encode(), "records[0]"),
    "number": (json.dumps({**DOCUMENT, "records": [["host", [1], ""]]}).encode(), "records[0]"),
    "base64": (json.dumps({**DOCUMENT, "records": [["host", ["h1"], "e30"]]}).encode(), "records[0]"),
    "not ascii": (json.dumps({**DOCUMENT, "records": [["host", ["h1"], "é"]]}).encode(), "records[0]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_nobody_is_asked(
    dispatcher: Dispatcher, run: Run, tmp_path: Path, name: str
) -> None:
    content, piece = BAD[name]
    (tmp_path / "b.json").write_bytes(content)
    code, out, err = run("restore", tmp_path / "b.json", "--yes")
    assert (code, out) == (1, "") and piece in err and err.startswith(f"{tmp_path}/b.json: ")
    assert len(err.splitlines()) == 1 and len(err) < 400 and err[:-1].isprintable() and dispatcher.asked == []
    assert check(json.dumps(DOCUMENT).encode(), "the control").records == 2


def test_a_file_that_is_not_there(dispatcher: Dispatcher, run: Run, tmp_path: Path) -> None:
    for name, why in ((tmp_path / "no", "No such file or directory"), (tmp_path, "Is a directory")):
        assert run("restore", name, "--yes")[::2] == (1, f"{name}: {why}; nothing was restored\n")
