# Owns: what `-f` names: files, directories, standard input; their documents, checked here before anything is sent.
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slash32.documents import MAX_BYTES, Document
from slash32.errors import ResourceError, printable, quoted
from slash32.resources import Resource, decode, kind_of, load_yaml

SUFFIXES = (".yaml", ".yml", ".json", ".xml")


@dataclass(slots=True)
class Checked:
    documents: list[Document] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # one line for each document or file that is wrong


def expand(names: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
    """(name for messages, content), or (name, why it cannot be read)."""
    for name in names:
        path = Path(name)
        if name != "-" and path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                yield str(path), f"holds no {', '.join(SUFFIXES)} file"
            for file in inside:
                yield printable(str(file)), _read(file)
        else:
            yield ("stdin", sys.stdin.buffer.read(MAX_BYTES + 1)) if name == "-" else (printable(name), _read(path))


def _read(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one more than is allowed: enough to be refused
    except OSError as error:
        return error.strerror or str(error)


def is_xml(content: bytes) -> bool:
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def check(names: Sequence[str]) -> Checked:
    """All documents of all files. A document given twice is an error: which of the two was meant?"""
    found = Checked()
    for name, content in expand(names):
        if isinstance(content, str):
            found.errors.append(f"{name}: {content}")
        else:
            check_text(name, content, found)
    found.errors += duplicates(found)
    return found


def duplicates(found: Checked) -> list[str]:
    errors = []
    seen: dict[tuple[str, str], Document] = {}
    for document, resource in zip(found.documents, found.resources, strict=True):
        key = (kind_of(resource), resource.name)
        first = seen.setdefault(key, document)
        if first is not document:
            where = f"{document.source}:{document.line}"
            errors.append(f"{where}: {' '.join(key)}: given before, at {first.source}:{first.line}; keep one")
    return errors


def check_text(name: str, content: bytes, found: Checked) -> None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found.errors.append(f"{name}:{line}: not UTF-8 text: {quoted(error.reason)}")
        return
    try:
        documents = load_yaml(text, name)
    except ResourceError as error:
        found.errors.append(str(error))
        return
    if not documents:
        found.errors.append(f"{name}: holds no document")
    for document in documents:
        try:
            resource = decode(document)
        except ResourceError as error:
            found.errors.append(str(error))
        else:
            found.documents.append(document)
            found.resources.append(resource)
