# Where the dispatcher is: sockets and servers, on the command line and in the environment; TLS that is always checked.
from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli.canned import Dispatcher, Run, behind_tls, on_a_socket, runs

TOKEN = "s32_abc.DEF-123"
KINDS = {"items": []}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For 127.0.0.1 and localhost; its own authority."""
    folder = tmp_path_factory.mktemp("tls")
    for name, who in (("good", "IP:127.0.0.1,DNS:localhost"), ("other", "DNS:elsewhere.example")):
        words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        words += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        openssl = ["openssl", *words, "-addext", f"subjectAltName={who}"]
        subprocess.run(openssl, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def fake() -> Dispatcher:
    fake = Dispatcher()
    fake.answers["GET", "/v1/endpoints"] = (200, KINDS)
    return fake


@pytest.fixture
def server(signed: Path, fake: Dispatcher) -> Iterator[str]:
    with behind_tls(signed / "good.pem", signed / "good.key", fake) as port:
        yield f"https://127.0.0.1:{port}"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("SOCKET", "SERVER", "TOKEN_FILE", "CA"):
        monkeypatch.delenv(f"SLASH32_{name}", raising=False)
    return runs(capsys)


def test_a_server_is_asked_with_the_token(run: Run, server: str, token: Path, signed: Path, fake: Dispatcher) -> None:
    words = ["--server", server, "--token-file", token, "--ca", signed / "good.pem"]
    assert run(*words, "get", "ep") == (0, "no Endpoint yet\n", "")
    assert fake.headers[0]["authorization"] == f"Bearer {TOKEN}"
    local = ["--server", server.replace("127.0.0.1", "LOCALHOST") + "/", *words[2:]]
    assert run(*local, "get", "ep")[0] == 0


def test_the_environment_is_asked_too(
    run: Run, server: str, signed: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = token.parent
    monkeypatch.setenv("SLASH32_SERVER", server)
    monkeypatch.setenv("SLASH32_TOKEN_FILE", str(token))
    monkeypatch.setenv("SLASH32_CA", str(signed / "good.pem"))
    assert run("get", "ep")[0] == 0
    there = Dispatcher()
    there.answers["GET", "/v1/endpoints"] = (200, {"items": [{"domain": "by-socket"}]})
    with on_a_socket(tmp_path / "api.sock", there):
        assert "by-socket" in run("--socket", tmp_path / "api.sock", "get", "ep")[1], "the command line wins"
        monkeypatch.setenv("SLASH32_SOCKET", str(tmp_path / "api.sock"))
        assert run("--server", server, "get", "ep")[1] == "no Endpoint yet\n"
        code, _, err = run("get", "ep")
        assert code == 2 and "SLASH32_SOCKET and SLASH32_SERVER are two places" in err
        assert run("validate", "-f", "/dev/null")[0] == 1, "asks nobody"


def test_a_certificate_that_is_not_trusted_ends_it(
    run: Run, server: str, token: Path, signed: Path, fake: Dispatcher
) -> None:
    words = ["--server", server, "--token-file", token]
    code, _, err = run(*words, "get", "ep")
    assert code == 1 and "its certificate is not trusted (self-signed certificate) by this machine" in err
    code, _, err = run(*words, "--ca", signed / "other.pem", "get", "ep")
    assert code == 1 and "is not trusted" in err and "other.pem" in err
    with behind_tls(signed / "other.pem", signed / "other.key", fake) as port:
        code, _, err = run("--server", f"https://127.0.0.1:{port}", *words[2:], "--ca", signed / "other.pem", "status")
        assert code == 1 and "is not valid for '127.0.0.1'" in err
    assert fake.headers == [], "the token went nowhere"
    assert len(err.splitlines()) == 1


def test_no_tls_there(run: Run, token: Path, tmp_path: Path) -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as plain:
        port = plain.getsockname()[1]

        def serve() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        code, _, err = run("--server", f"https://127.0.0.1:{port}", "--token-file", token, "status")
        thread.join()
    assert code == 1 and "no TLS can be spoken there" in err and len(err.splitlines()) == 1
    code, _, err = run("--server", f"https://127.0.0.1:{port}", "--token-file", token, "status")
    assert code == 1 and err == f'the dispatcher at "https://127.0.0.1:{port}": Connection refused\n'


@pytest.mark.parametrize(
    "server",
    [
        "http://h", "h:5533", "https://", "https://h:x", "https://h:99999", "https://u@h", "https://h/v1",
        "https://h?x=1", "https://[::1", "https://a b", "https://h\x1b[31m", "https://\u0430.example", "", " ",
    ],
)  # fmt: skip
def test_what_is_no_server_is_usage(run: Run, token: Path, server: str) -> None:
    code, out, err = run("--server", server, "--token-file", token, "status")
    assert (code, out) == (2, "") and "https://" in err and len(err.splitlines()) == 1 and err[:-1].isprintable()


def test_options_that_do_not_fit(run: Run, token: Path) -> None:
    for words, piece in (
        (["--server", "https://h"], "--server needs --token-file"),
        (["--server", "https://h", "--socket", "/x"], "--socket and --server are two places"),
        (["--token-file", token], "--token-file is for --server"),
        (["--socket", "/x", "--ca", "/y"], "--ca is for --server"),
    ):
        code, _, err = run(*words, "status")
        assert code == 2 and piece in err and len(err.splitlines()) == 1
        assert run(*words, "get", "--help")[0] == 0, "nobody is asked"


@pytest.mark.parametrize("content", ["", "\n", "two words", "a\nb", "\x1b", "\xe9", "x" * 5000])
def test_a_file_without_a_token(run: Run, server: str, token: Path, content: str) -> None:
    token.write_text(content, encoding="latin-1")
    code, _, err = run("--server", server, "--token-file", token, "status")
    assert code == 1 and "holds no token" in err and len(err.splitlines()) == 1


def test_a_token_that_others_can_read(run: Run, server: str, token: Path, tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o620):
        token.chmod(mode)
        code, _, err = run("--server", server, "--token-file", token, "status")
        assert code == 1 and f"mode {mode:04o} lets others read the token: chmod 600 it" in err
    for name, why in (
        (tmp_path / "no", "No such file"),
        (tmp_path, "Is a directory"),
        ("/dev/null", "is not a file"),
    ):
        code, _, err = run("--server", server, "--token-file", name, "status")
        assert code == 1 and why in err and len(err.splitlines()) == 1


def test_a_token_from_a_pipe(run: Run, server: str, signed: Path, fake: Dispatcher) -> None:
    read, write = os.pipe()
    os.write(write, TOKEN.encode())
    os.close(write)
    words = ["--server", server, "--token-file", f"/dev/fd/{read}", "--ca", signed / "good.pem"]
    fake.answers["GET", "/v1/status"] = fake.answers["GET", "/v1/hosts"] = (200, KINDS)
    assert run(*words, "status")[0] == 0, "asks twice, reads once"
    os.close(read)


def test_a_file_without_certificates(run: Run, server: str, token: Path, tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("none")
    for name, why in ((tmp_path / "ca", "holds no certificate"), (tmp_path / "no", "No such file")):
        code, _, err = run("--server", server, "--token-file", token, "--ca", name, "status")
        assert code == 1 and why in err and len(err.splitlines()) == 1


def test_a_refused_token_is_one_line(run: Run, server: str, token: Path, signed: Path, fake: Dispatcher) -> None:
    fake.answers["GET", "/v1/status"] = (401, {"errors": ["the token is not known"]})
    words = ["--server", server, "--token-file", token, "--ca", signed / "good.pem"]
    assert run(*words, "status")[::2] == (1, "the token is not known\n")
