# Owns: how both daemons log: one bounded line an event, text with key=value pairs or a JSON object, with the priority
# that systemd's journal understands. Touches: the logging module's root, stderr, the hooks for uncaught errors.
from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, TextIO

from .errors import printable, visible

FORMATS = ("text", "json")
MOST_MESSAGE = 2000  # characters
MOST_VALUE = 300
MOST_TRACE = 1500
MOST_FIELDS = 24
MOST_FRAMES = 12

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

log = logging.getLogger("slash32")


def fields(**values: object) -> dict[str, dict[str, object]]:
    """For a logger's `extra`: log.info("host %s: connected", name, extra=fields(host=name, revision=7))."""
    return {"fields": values}


def begin(form: str, level: int = logging.INFO) -> None:
    """Once, at the start of a daemon: all loggers speak to stderr, and so do errors that nobody caught."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(form, journald=leads_to_journal(sys.stderr)))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def leads_to_journal(stream: TextIO) -> bool:
    """systemd.exec(5), JOURNAL_STREAM: device and inode of the stream that it connected to its journal."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class Lines(logging.Formatter):
    def __init__(self, form: str, journald: bool) -> None:
        super().__init__()
        self.form = form
        self.journald = journald

    def format(self, record: logging.LogRecord) -> str:
        message = _cut(record.getMessage(), MOST_MESSAGE)
        found = dict(list(getattr(record, "fields", {}).items())[:MOST_FIELDS])
        if record.exc_info and record.exc_info[1] is not None:
            found["exception"] = _error(record.exc_info[1])
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>" if self.journald else ""
        if self.form == "json":
            return prefix + _json(record, message, found)
        level = "" if self.journald else f"{record.levelname} "
        return prefix + level + " ".join([visible(message), *(f"{k}={_text(k, v)}" for k, v in found.items())])


def _json(record: logging.LogRecord, message: str, found: dict[str, object]) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    line: dict[str, Any] = {
        "ts": f"{at}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "msg": message,
    }
    for name, value in found.items():
        line.setdefault(name, _plain(name, value))
    return json.dumps(line)


def _most(name: str) -> int:
    return MOST_TRACE if name == "exception" else MOST_VALUE


def _plain(name: str, value: object) -> object:
    """What JSON has; all else as text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and value - value == 0:  # neither infinite nor nothing at all
        return value
    return _cut(str(value), _most(name))


def _text(name: str, value: object) -> str:
    text = _cut(str(value), _most(name))
    if text and text.isprintable() and not set(' "=\\') & set(text):
        return text
    return '"' + printable(text).replace('"', '\\"') + '"'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _error(error: BaseException) -> str:
    """A traceback on one line, the innermost call first."""
    frames = traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
    where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames))  # noqa: PTH119
    said = f"{type(error).__name__}: {error}"[:MOST_VALUE]
    return f"{said} [{where}]" if where else said


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("an error that nobody expected: please report it", exc_info=(kind, error, trace))


def _uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and not issubclass(found.exc_type, SystemExit):
        name = found.thread.name if found.thread else ""
        what = (found.exc_type, found.exc_value, found.exc_traceback)
        log.critical("an error that nobody expected: please report it", exc_info=what, extra=fields(thread=name))
