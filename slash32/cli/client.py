# Owns: the CLI's side of the operators' API: HTTP + JSON, to wherever place.py says. Every failure is one line.
from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any
from urllib.parse import quote as url_quote

from slash32.errors import Slash32Error, printable, quoted, visible

from .place import Connection, Place, PlaceError, UnixPlace

Json = dict[str, Any]
Response = http.client.HTTPResponse
MAX_ANSWER = 256 * 1024 * 1024


class CallError(Slash32Error):
    """The dispatcher refused or did not answer. `lines` are for the user, one complaint each."""

    def __init__(self, lines: list[str], status: int = 0) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.status = status  # HTTP; 0: no answer


class Client:
    def __init__(self, where: str | Callable[[], Place], timeout: float = 30.0) -> None:
        """`where`: the path of a Unix socket, or what is called once somebody asks: many commands ask nobody."""
        self._where = where
        self.timeout = timeout

    @cached_property
    def place(self) -> Place:
        return UnixPlace(self._where) if isinstance(self._where, str) else self._where()

    def get(self, *parts: str, wait: float = 0.0, query: str = "") -> Json:
        return self._answer(*self._call("GET", _url(parts, query), None, wait))

    def items(self, *parts: str, query: str = "") -> list[Json]:
        found = self.get(*parts, query=query).get("items")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise CallError([f"{self.place}: answered {'/'.join(parts)} without a list of items"])
        return found

    def content(self, *parts: str, wait: float) -> bytes:
        """As it came."""
        status, content = self._call("GET", _url(parts, ""), None, wait)
        if not 200 <= status < 300:
            self._answer(status, content)
        return content

    def post(self, *parts: str, body: Mapping[str, object] | bytes, query: str = "", wait: float = 0.0) -> Json:
        """`body`: plain data, or JSON that is made already."""
        payload = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
        return self._answer(*self._call("POST", _url(parts, query), payload, wait))

    def delete(self, *parts: str) -> Json:
        return self._answer(*self._call("DELETE", _url(parts, ""), None, 0.0))

    def open(self, *parts: str, query: str, headers: Mapping[str, str], silence: float) -> Response:
        """An answer that goes on: whoever asked reads it, and closes it. `silence`: seconds to wait for more of it."""
        every = self._headers
        connection = self._connect()
        try:
            connection.sock.settimeout(silence)
            connection.request("GET", _url(parts, query), headers={**every, **headers, "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                self._answer(response.status, response.read(MAX_ANSWER))
                raise CallError([f"{self.place}: answered {response.status} in place of events"], response.status)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise CallError([f"{self.place}: {self.lost(error)}"]) from None
        except CallError:
            connection.close()
            raise
        if connection.sock is not None:
            connection.sock.close()  # once the response, which still reads from it, is closed
        return response

    def _call(self, method: str, url: str, payload: bytes | None, wait: float) -> tuple[int, bytes]:
        headers = {**self._headers, **({"Content-Type": "application/json"} if payload else {})}
        connection = self._connect()
        try:
            connection.sock.settimeout(self.timeout + wait)
            connection.request(method, url, payload, headers)
            response = connection.getresponse()
            status, content = response.status, response.read(MAX_ANSWER)
            if response.length:  # what is still missing
                raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            unknown = "" if method == "GET" else "; it may have done it or not: run this again"
            raise CallError([f"{self.place}: {self.lost(error, wait)}{unknown}"]) from None
        finally:
            connection.close()
        return status, content

    @cached_property
    def _headers(self) -> dict[str, str]:
        try:
            return self.place.headers()
        except PlaceError as error:
            raise CallError([str(error)]) from None

    def _connect(self) -> Connection:
        try:
            return self.place.connect(self.timeout)
        except PlaceError as error:
            raise CallError([f"{self.place}: {error}"]) from None

    def lost(self, error: Exception, wait: float = 0.0) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer for {self.timeout + wait:.0f} s"
        if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | ConnectionError):
            return "it ended before it had answered"
        if isinstance(error, http.client.HTTPException):
            return f"whoever listens there is no dispatcher ({printable(str(error))[:100] or type(error).__name__})"
        return printable(str(error))

    def _answer(self, status: int, content: bytes) -> Json:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise CallError([f"{self.place}: answered {status} with something that is not JSON"], status)
        if 200 <= status < 300:
            return answer
        errors = answer.get("errors")
        lines = [visible(str(line)) for line in errors] if isinstance(errors, list) and errors else []
        raise CallError(lines or [f"{self.place}: answered {status} and no reason"], status)


def _url(parts: tuple[str, ...], query: str) -> str:
    for part in parts:
        if not part or not part.isprintable() or part in (".", ".."):
            raise CallError([f"{quoted(part, 64)}: nothing has such a name"])
    path = "/v1/" + "/".join(url_quote(part, safe="") for part in parts)
    return f"{path}?{query}" if query else path
