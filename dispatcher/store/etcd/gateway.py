# Owns: requests to etcd's JSON gateway (/v3): one of several endpoints at a time, and another when that one fails; what
# its errors mean. Touches: the network through aiohttp, files of certificates. Runs in one event loop.
from __future__ import annotations

import asyncio
import json
import os
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import aiohttp

from slash32.errors import printable

from ..commits import StoreError

ONE_REQUEST = 1.0  # seconds until a member's answer is given up
HEDGE = 0.25  # of that time until the other members are asked, too
# Without a leader a member says so at once, instead of waiting for one.
_HEADERS = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    endpoints: tuple[str, ...]  # http://HOST:PORT or https://HOST:PORT
    prefix: str = "/slash32/"
    ca: Path | None = None  # PEM files
    cert: Path | None = None
    key: Path | None = None

    @property
    def title(self) -> str:
        return f"etcd ({', '.join(self.endpoints)})"


class Failure(Exception):
    """`str()` is one line. `done`: it may have been carried out nevertheless."""

    def __init__(self, why: str, done: bool = False) -> None:
        super().__init__(why)
        self.done = done


class Hopeless(Failure):
    """Asking again does not help; somebody has to do something."""


class Full(Hopeless):
    """etcd takes no more."""


class Pair(NamedTuple):
    key: str
    value: bytes
    made: int  # etcd's revision that made it


# --- requests --------------------------------------------------------------------------------------------------------


def _text(data: str | bytes) -> str:
    return b64encode(data.encode() if isinstance(data, str) else data).decode()


def put(key: str, value: bytes) -> Json:
    return {"request_put": {"key": _text(key), "value": _text(value)}}


def get(key: str, end: str = "", limit: int = 0, keys_only: bool = False) -> Json:
    """One key, or those from `key` to before `end`. `limit` 0: all."""
    found: Json = {"key": _text(key), "limit": limit, "keys_only": keys_only}
    return {"request_range": {**found, "range_end": _text(end)} if end else found}


def delete(key: str, end: str = "") -> Json:
    found = {"key": _text(key)}
    return {"request_delete_range": {**found, "range_end": _text(end)} if end else found}


def is_made(key: str, made: int, end: str = "") -> Json:
    """A condition: the key was made at that revision of etcd's; 0: it is not there, nor any other to before `end`."""
    found = {"target": "CREATE", "result": "EQUAL", "key": _text(key), "create_revision": str(made)}
    return {**found, "range_end": _text(end)} if end else found


def is_there(key: str) -> Json:
    return {"target": "CREATE", "result": "GREATER", "key": _text(key), "create_revision": "0"}


def is_value(key: str, value: bytes) -> Json:
    return {"target": "VALUE", "result": "EQUAL", "key": _text(key), "value": _text(value)}


def txn(conditions: list[Json], then: list[Json], otherwise: list[Json] | None = None) -> bytes:
    return json.dumps({"compare": conditions, "success": then, "failure": otherwise or []}).encode()


def alone(request: Json) -> bytes:
    """For kv/range, kv/put, kv/deleterange: the request without a txn."""
    (found,) = request.values()
    return json.dumps(found).encode()


def pairs(answer: Json) -> list[Pair]:
    """Of a range, or of a txn's range response."""
    found = answer.get("response_range", answer)
    return [_pair(raw) for raw in found.get("kvs", ())]


def count(answer: Json) -> int:
    return int(answer.get("response_range", answer).get("count", 0))


def _pair(raw: Json) -> Pair:
    return Pair(
        b64decode(raw["key"]).decode("utf-8", "backslashreplace"),
        b64decode(raw.get("value", "")),
        int(raw["create_revision"]),
    )


# --- the gateway -----------------------------------------------------------------------------------------------------


def security(config: EtcdConfig) -> ssl.SSLContext | None:
    """Raises StoreError."""
    if not any(e.startswith("https://") for e in config.endpoints):
        return None
    at: tuple[str, Path | None] = ("etcd_ca", config.ca)
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.cert is not None:
            at = ("etcd_cert or etcd_key", config.cert)
            context.load_cert_chain(config.cert, config.key)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        raise StoreError(
            f"{at[0]}: {at[1]} cannot be used ({_line(e)}): give a PEM file that slash32 may read"
        ) from None
    return context


class Gateway:
    """Made and used in one running loop."""

    def __init__(self, config: EtcdConfig) -> None:
        self.endpoints = [e.rstrip("/") for e in config.endpoints]
        self.current = self.endpoints[0]
        self.moved = asyncio.Event()  # set, and another one, whenever `current` changes
        self._ssl = security(config)
        self._known: set[str] = set()  # endpoints that have answered
        connector = aiohttp.TCPConnector(ssl=self._ssl, limit=0, keepalive_timeout=120)
        self._session = aiohttp.ClientSession(connector=connector, headers=_HEADERS, auto_decompress=False)

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, what: str, body: bytes, patience: float = ONE_REQUEST) -> Json:
        """Of the current member; when that fails the next one is current. Raises Failure."""
        endpoint = self.current
        try:
            return await self._post(endpoint, what, body, patience)
        except Full:
            raise
        except Failure:
            if endpoint == self.current:
                at = self.endpoints.index(endpoint) + 1
                self._move(self.endpoints[at % len(self.endpoints)])
            raise

    async def ask_any(self, what: str, body: bytes, patience: float = ONE_REQUEST) -> Json:
        """What may be asked twice, of the current member first; who answers is current. Raises Failure."""
        order = [self.current, *(e for e in self.endpoints if e != self.current)]
        running: dict[asyncio.Task[Json], str] = {}
        failures: dict[str, Failure] = {}
        waits = [patience * HEDGE, patience * (1 - HEDGE)] if len(order) > 1 else [patience]
        try:
            for endpoint in order[:1]:
                running[asyncio.create_task(self._post(endpoint, what, body, patience))] = endpoint
            for wait in waits:
                answer = await self._first(running, failures, wait)
                if answer is not None:
                    return answer
                for endpoint in set(order) - set(running.values()) - set(failures):
                    running[asyncio.create_task(self._post(endpoint, what, body, patience))] = endpoint
        finally:
            for task in running:
                task.cancel()
        raise _all_failed(order, failures)

    async def _first(
        self, running: dict[asyncio.Task[Json], str], failed: dict[str, Failure], wait: float
    ) -> Json | None:
        """Until one has answered, all have failed, or the time is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while running and (left := end - loop.time()) > 0:
            done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                endpoint = running.pop(task)
                try:
                    answer = task.result()
                except Failure as e:
                    failed[endpoint] = e
                    continue
                self._move(endpoint)
                return answer
        return None

    def _move(self, endpoint: str) -> None:
        if endpoint != self.current:
            self.current = endpoint
            self.moved.set()
            self.moved = asyncio.Event()

    async def _post(self, endpoint: str, what: str, body: bytes, patience: float) -> Json:
        limit = aiohttp.ClientTimeout(total=patience)
        try:
            async with self._session.post(f"{endpoint}/v3/{what}", data=body, timeout=limit) as response:
                raw = await response.read()
        except TimeoutError:
            raise Failure(f"no answer within {patience:g} s", done=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as e:
            if endpoint in self._known:
                raise _transport(e) from None
            raise await self._first_failure(endpoint, e) from None
        self._known.add(endpoint)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise _no_etcd(response.status, raw) from None
        if response.status != 200 or not isinstance(answer, dict):
            raise _refusal(response.status, answer)
        return answer

    async def _first_failure(self, endpoint: str, error: Exception) -> Failure:
        """It may be that both do not speak the same, or that a certificate is refused."""
        url, failure = urlsplit(endpoint), _transport(error)
        if url.scheme == "https":
            said = await self._farewell(url)
            if said is not None:
                return _transport(said)
            if isinstance(getattr(error, "os_error", None), ConnectionResetError):
                return Failure("closed the connection during the handshake (if it speaks no TLS, give it as http://)")
            return failure
        return Failure(f"{failure} (if it speaks TLS, give it as https://)", True) if failure.done else failure

    async def _farewell(self, url: SplitResult) -> Exception | None:
        """What a member says when TLS fails. Who speaks before hearing that may see but a closed connection."""
        try:
            async with asyncio.timeout(ONE_REQUEST):
                reader, writer = await asyncio.open_connection(url.hostname, url.port or 443, ssl=self._ssl)
                try:
                    await reader.read(1)
                finally:
                    writer.transport.abort()
        except ssl.SSLError as e:
            return e
        except (TimeoutError, OSError):
            return None  # it says nothing, or is not there
        return None

    async def watch(self, start: str, end: str) -> AsyncIterator[list[Pair]]:
        """What is put there from now on. The first list is empty: now it watches. Raises Failure; or ends."""
        wanted = {"key": _text(start), "range_end": _text(end), "filters": ["NODELETE"], "fragment": True}
        body = json.dumps({"create_request": wanted}).encode()
        limit = aiohttp.ClientTimeout(total=None, sock_connect=ONE_REQUEST)
        buffer = bytearray()
        try:
            async with self._session.post(f"{self.current}/v3/watch", data=body, timeout=limit) as response:
                async for data in response.content.iter_any():
                    buffer += data
                    *lines, rest = buffer.split(b"\n") if b"\n" in data else (buffer,)
                    buffer = rest
                    for line in lines:
                        yield _events(json.loads(line))
        except TimeoutError:
            raise Failure("no answer to a watch") from None
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise _transport(e) from None


def _events(message: Json) -> list[Pair]:
    """Raises Failure where the watch is over."""
    found = message.get("result")
    if found is None or found.get("canceled"):
        raise Failure(f"the watch was ended ({_line(found or message)})")
    return [_pair(event["kv"]) for event in found.get("events", ()) if event.get("type", "PUT") == "PUT"]


# --- what errors mean ------------------------------------------------------------------------------------------------


def _all_failed(order: list[str], failures: dict[str, Failure]) -> Failure:
    line = "; ".join(f"{e}: {failures[e]}" if e in failures else f"{e}: no answer" for e in order)
    hopeless = all(e in failures and isinstance(failures[e], Hopeless) for e in order)
    return Hopeless(line) if hopeless else Failure(line)


def _transport(error: Exception) -> Failure:
    cause: BaseException = getattr(error, "os_error", None) or error
    found = next((e for e in (error, cause, error.__cause__) if isinstance(e, ssl.SSLError)), None)
    text = _line(found or cause)
    if isinstance(error, aiohttp.ClientConnectorCertificateError) or "CERTIFICATE_VERIFY" in text:
        certificate = getattr(error, "certificate_error", found) or error
        why = getattr(certificate, "verify_message", "") or _line(certificate)
        return Hopeless(f"its certificate is not accepted ({why}): check etcd_ca and the names in that certificate")
    if "WRONG_VERSION_NUMBER" in text:
        return Hopeless("does not speak TLS: give it as http://")
    if "SSL" in text and "ALERT" in text:
        return Hopeless(f"refuses this dispatcher's certificate ({text}): check etcd_cert and etcd_key")
    if isinstance(error, aiohttp.ClientConnectorError):
        number = getattr(cause, "errno", None)
        return Failure(os.strerror(number).lower() if number else text)
    return Failure(text or type(error).__name__, done=True)


_ONE_SIDED = (
    "etcd's gateway cannot reach etcd itself: its server certificate must also be good for clients"
    " (extendedKeyUsage serverAuth, clientAuth)"
)
_MEANINGS: tuple[tuple[str, type[Failure], str], ...] = (
    (
        "database space exceeded",
        Full,
        "etcd is full (alarm NOSPACE): compact and defragment it or raise --quota-backend-bytes, then run"
        " `etcdctl alarm disarm`",
    ),
    ("too large", Hopeless, "etcd takes no request of this size: set its --max-request-bytes to 1572864 or more"),
    ("larger than max", Hopeless, "etcd takes no request of this size: set its --max-request-bytes to 1572864 or more"),
    ("user name is empty", Hopeless, "etcd asks for a user and password, which slash32 has none of: use TLS instead"),
    ("permission denied", Hopeless, "etcd denies permission: slash32 needs all of its prefix, without a user"),
    ("handshake failed", Hopeless, _ONE_SIDED),
)


def _refusal(status: int, answer: Any) -> Failure:
    found: Json = answer if isinstance(answer, dict) else {}
    text = str(found.get("message") or found.get("error") or "")
    if status == 404 or not text:
        return _no_etcd(status, json.dumps(answer).encode())
    for word, kind, meaning in _MEANINGS:
        if word in text:
            return kind(meaning)
    if any(word in text for word in ("connection closed", "SubConns", "client preface", "server preface")):
        return Failure(f"{_line(text)}; if that lasts: {_ONE_SIDED}", done=True)
    return Failure(_line(text), done="no leader" not in text)  # which is said before anything is tried


def _no_etcd(status: int, raw: bytes) -> Failure:
    text = _line(raw.decode("utf-8", "replace"))
    if "HTTPS server" in text:
        return Hopeless("speaks TLS: give it as https://")
    passed_on = status < 400 or status >= 500  # by what stands before etcd, perhaps
    return Hopeless(f"is not etcd with its JSON gateway (status {status}: {text[:80]})", done=passed_on)


def _line(value: object) -> str:
    return printable(" ".join(str(value).split())[:200])
