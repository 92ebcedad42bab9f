# The file of tokens: what is taken of it, what is refused whole, how one is made.
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

import dispatcher.__main__
from dispatcher.api.tokens import TokenError, Tokens, make, read

DIGEST = hashlib.sha256(b"secret").hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_made_and_found(file: Path) -> None:
    ro, admin = make(file, "ci", "ro"), make(file, "ops", "admin")
    tokens = Tokens(file)
    assert (found := tokens.find(ro)) and (found.name, found.role) == ("ci", "ro")
    assert (found := tokens.find(admin)) and (found.name, found.role) == ("ops", "admin")
    assert not tokens.find("") and not tokens.find(ro[:-1]) and not tokens.find(ro + " ") and not tokens.find("\udcff")
    assert ro not in file.read_text() and file.stat().st_mode & 0o777 == 0o644
    with pytest.raises(TokenError, match="a token ci already"):
        make(file, "ci", "admin")
    with pytest.raises(TokenError, match="no name"):
        make(file, "a b", "ro")
    assert len(read(file)) == 2 and len(list(file.parent.iterdir())) == 1


def test_what_is_there_stays_as_it_was(file: Path) -> None:
    file.write_text(f"# mine\n\n  x ro {DIGEST} # until June")
    file.chmod(0o600)
    make(file, "y", "ro")
    assert file.read_text().startswith(f"# mine\n\n  x ro {DIGEST} # until June\ny ro ")
    assert file.stat().st_mode & 0o777 == 0o600
    assert (found := Tokens(file).find("secret")) and found.name == "x"


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        ("x ro", "line 1: is not NAME"),
        (f"\n# a\nx ro {DIGEST} more", "line 3: is not NAME"),
        (f"x root {DIGEST}", '"root" is not one of ro, admin'),
        (f"x ro {DIGEST[:-1]}", "third word"),
        (f"x ro {DIGEST.upper()}", "third word"),
        (f"x ro {DIGEST}\nx admin {DIGEST}", "line 2: x is there twice"),
        (f"-x ro {DIGEST}", "is no name"),
        (b"\xff", "not UTF-8 text, at byte 0"),
        ("x" * (2 << 20), "is not a file of tokens"),
        (f"a ro {DIGEST}\n\x1b[2Jb ro {DIGEST}", "is no name"),
    ],
)
def test_one_bad_line_and_none_counts(content: str | bytes, piece: str, file: Path) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenError) as refused:
        Tokens(file).find("secret")
    assert piece in str(refused.value) and str(refused.value).isprintable() and len(str(refused.value)) < 300
    file.write_text(f"x ro {DIGEST}\n")  # the control
    assert Tokens(file).find("secret")


def test_nobody_else_may_write_it(file: Path) -> None:
    file.write_text(f"x ro {DIGEST}\n")
    tokens = Tokens(file)
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        with pytest.raises(TokenError, match="chmod go-w"):
            tokens.find("secret")
    file.chmod(0o640)
    assert tokens.find("secret")
    if os.getuid() == 0:
        os.chown(file, 12345, -1)
        with pytest.raises(TokenError, match="chown it to root"):
            tokens.find("secret")


def test_a_file_that_goes_takes_everybody_along(file: Path) -> None:
    file.write_text(f"x ro {DIGEST}\n")
    tokens = Tokens(file)
    assert tokens.find("secret")
    file.unlink()
    with pytest.raises(TokenError, match="nobody gets in"):
        tokens.find("secret")
    file.mkdir()
    with pytest.raises(TokenError):
        tokens.find("secret")
    file.rmdir()
    file.write_text(f"x ro {DIGEST}\n")
    assert tokens.find("secret")


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "dispatcher.toml"
    config.write_text(f'api_tokens = "{file}"\n')
    words = ["token", "ci", "--role", "ro", "--config", str(config)]
    assert dispatcher.__main__.main(words) == 0
    out, err = capsys.readouterr()
    assert Tokens(file).find(out.strip()) and out.count("\n") == 1 and out.strip() not in err
    assert dispatcher.__main__.main(words) == 1
    assert "there is a token ci already" in capsys.readouterr().err
    config.write_text("")
    assert dispatcher.__main__.main(words) == 1
    assert "api_tokens: is missing" in capsys.readouterr().err
