# A host's key and the one that is to replace it: which is tried, and that at any moment a kill leaves one that works.
from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import hostd.__main__
from hostd.session.identity import Identity
from slash32.keys import KeyFileError, discard_next, load_next, load_or_create_key, next_file, replace_key


class Killed(BaseException):
    """Nothing that runs after it is the program's."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "hostd.key"


def say(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    config = file.parent.parent / "hostd.toml"
    config.write_text(f'state_dir = "{file.parent}"\n')
    assert hostd.__main__.main(["--config", str(config), "key", *words]) == 0
    return capsys.readouterr().out.strip()


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = say(file, capsys)
    following = say(file, capsys, "--next")
    assert len(first) == len(following) == 40 and first != following
    assert say(file, capsys, "--next") == following and say(file, capsys) == first, "asked twice: the same"
    assert next_file(file).stat().st_mode & 0o777 == 0o600
    assert say(file, capsys, "--discard-next") == "discarded" and say(file, capsys, "--discard-next") == "there is none"
    assert not next_file(file).exists() and say(file, capsys) == first
    assert say(file, capsys, "--next") != following, "what was discarded does not come back"


def test_next_first_and_one_after_it_was_accepted(file: Path) -> None:
    identity = Identity(file)
    first = identity.present
    assert identity.offered() == [first]
    following = load_or_create_key(next_file(file))
    assert identity.offered() == [following, first]
    assert not identity.accepted(first) and identity.offered() == [following, first]
    assert identity.accepted(following)
    assert identity.offered() == [following] and not next_file(file).exists()
    assert Identity(file).offered() == [following]


def test_another_next_was_made_while_one_was_accepted(file: Path) -> None:
    identity = Identity(file)
    accepted = load_or_create_key(next_file(file))
    discard_next(file)
    another = load_or_create_key(next_file(file))
    assert identity.accepted(accepted) and identity.offered() == [another, accepted]
    assert load_or_create_key(file) == accepted and load_next(file) == another


@pytest.mark.parametrize("damage", ["mode", "text", "empty", "folder"])
def test_a_bad_next_key_harms_nothing(file: Path, damage: str) -> None:
    identity = Identity(file)
    if damage == "folder":
        next_file(file).mkdir()
    else:
        load_or_create_key(next_file(file))
        if damage == "mode":
            next_file(file).chmod(0o644)
        else:
            next_file(file).write_text("x" if damage == "text" else "")
    assert identity.offered() == [identity.present]
    assert str(next_file(file)) in identity.trouble and identity.trouble.isprintable()
    if damage != "folder":
        discard_next(file)
        following = load_or_create_key(next_file(file))
        assert identity.offered() == [following, identity.present] and not identity.trouble


def test_a_disk_that_takes_no_new_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Identity(file)
    first, following = identity.present, load_or_create_key(next_file(file))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", full)
        assert not identity.accepted(following)
    assert "No space left" in identity.trouble and identity.offered() == [following, first]
    assert identity.accepted(following) and not identity.trouble and Identity(file).offered() == [following]


STEPS = ("link", "unlink", "rename", "replace", "fsync", "open", "fdopen")


def killed_before(number: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there was a call of the system with this number that changes the disk: nothing ran after it."""
    left = itertools.count(-number)

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            if next(left) >= 0:
                raise Killed
            return real(*args, **more)

        return call

    with monkeypatch.context() as killing:
        for name in STEPS:
            killing.setattr(os, name, counted(getattr(os, name)))
        try:
            run()
        except Killed:
            return True
    return False


def test_killed_at_any_step_of_the_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher has accepted the next key, and takes no other any more."""
    for number in range(100):
        file = tmp_path / str(number) / "hostd.key"
        old, new = load_or_create_key(file), load_or_create_key(next_file(file))
        killed = killed_before(number, lambda at=file, key=new: replace_key(at, key), monkeypatch)
        identity = Identity(file)
        assert identity.offered() in ([new, old], [new])
        identity.accepted(new)
        assert Identity(file).offered() == [new] and not next_file(file).exists()
        if not killed:
            break
    assert 2 <= number < 99


def test_killed_at_any_step_of_making_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        file = tmp_path / str(number) / "hostd.key"
        present = load_or_create_key(file)
        killed = killed_before(number, lambda at=file: load_or_create_key(next_file(at)), monkeypatch)
        found = load_next(file)  # none, or a whole one
        assert load_or_create_key(file) == present
        assert load_or_create_key(next_file(file)) == (found or load_next(file))
        if not killed:
            break
    assert 4 <= number < 99 and found is not None


def test_a_key_that_cannot_be_read_is_one_line(file: Path) -> None:
    load_or_create_key(file)
    file.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Identity(file)
