# Owns: server-sent events: their text, and following them over restarts of the dispatcher. Touches: the dispatcher, by
# the client that it is given.
from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from .client import CallError, Client, Response

LINE_LIMIT = 64 << 20  # bytes of one line; one commit may hold ten thousand documents
SILENCE = 45.0  # seconds; there is a comment every 15
AGAIN, SELDOM = 0.2, 5.0  # seconds between two tries to come back: at first, and at most


class Event(NamedTuple):
    id: str
    name: str
    data: str


class Lost(Exception):
    """One line: why no more events come over this connection."""


def parse(lines: Iterable[bytes]) -> Iterator[Event]:
    """Each line with its end. An event that its blank line has not finished is none."""
    last, name, data = "", "", list[str]()
    for line in lines:
        if len(line) >= LINE_LIMIT:
            raise CallError(["a line without an end: whoever listens there is no dispatcher"])
        if not line.endswith(b"\n"):
            return
        field, _, value = line.rstrip(b"\r\n").decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        match field:
            case "id" if "\0" not in value:
                last = value
            case "event":
                name = value
            case "data":
                data.append(value)
            case "" if not value and line in (b"\n", b"\r\n"):
                if data:
                    yield Event(last, name or "message", "\n".join(data))
                name, data = "", []


def follow(client: Client, since: int, tell: Callable[[str], None]) -> Iterator[Event]:
    """All after revision `since`, for ever. A dispatcher that is lost is asked again, from the last event on; `tell`
    hears of it once. Raises CallError where it cannot be asked at first, or refuses."""
    headers, query, pause = {"Accept": "text/event-stream"}, f"since={since}", 0.0
    response = client.open("watch", query=query, headers=headers, silence=SILENCE)
    while True:
        try:
            for event in _events(client, response):
                pause = 0.0
                if event.id.isascii() and event.id.isdigit():
                    headers["Last-Event-ID"], query = event.id, ""
                yield event
        except Lost as lost:
            if not pause:
                tell(f"{client.place}: {lost}; it is asked again")
        finally:
            response.close()
        again = None
        while again is None:
            pause = min(SELDOM, max(AGAIN, pause * 2))
            time.sleep(pause)
            again = _again(client, query, headers)
        response = again


def _again(client: Client, query: str, headers: Mapping[str, str]) -> Response | None:
    try:
        return client.open("watch", query=query, headers=headers, silence=SILENCE)
    except CallError as error:
        if 0 < error.status < 500:
            raise  # asking once more would not help
        return None


def _events(client: Client, response: Response) -> Iterator[Event]:
    try:
        yield from parse(iter(lambda: response.readline(LINE_LIMIT), b""))
    except TimeoutError:
        raise Lost(f"no word for {SILENCE:.0f} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Lost(client.lost(error)) from None
    raise Lost("it ended")
