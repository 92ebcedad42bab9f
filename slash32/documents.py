# Owns: YAML text -> documents (plain data with the file and line they came from), and back. Pure.
# Scalars follow YAML 1.2 (80:90 is text, not base 60; on and yes are text; no dates); the builder keeps its own stack
# and counts what aliases expand to, so that no text costs more than its size.
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import yaml

from slash32.errors import ResourceError, quoted
from slash32.resources import LIST_API_VERSIONS

MAX_BYTES = 10 * 1024 * 1024
MAX_NODES = 1_000_000  # scalars, lists and mappings of one file, aliases counted in full
MAX_DEPTH = 32

_LOADER: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NO_RESOURCE = "is not a mapping with apiVersion, kind, metadata and spec; write it as one"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,60})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,30}|(0|[1-9][0-9]{0,30})(\.[0-9]{0,30})?)([eE][-+]?[0-9]{1,3})?")
_WORDS: dict[str, object] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, slots=True)
class Document:
    """One resource as plain data, not yet checked."""

    value: Mapping[str, object]
    source: str = ""  # file name, for messages
    line: int = 0  # from 1; 0: unknown
    path: str = ""  # within the file's document: items[3]


@dataclass(slots=True)
class _Built:
    value: object
    line: int
    nodes: int = 1
    key: str | None = None  # of a mapping: the key whose value comes next
    anchor: str | None = None


def load_yaml(text: str, source: str) -> list[Document]:
    """All documents of a file; a List is its items. Raises ResourceError, one line that names file and line."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ResourceError(source, "", f"is larger than {MAX_BYTES // 1024 // 1024} MB; split it")
    documents: list[Document] = []
    for root in _roots(text, source):
        if root.value is None:
            continue  # nothing between two separators
        where = f"{source}:{root.line}"
        documents.extend(Document(value, source, root.line, path) for path, value in _flatten(root.value, where))
    return documents


def _flatten(value: object, where: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """A document, or the items of a list as `calicoctl get -o yaml` and `slash32 get -o yaml` write it, and where."""
    if not isinstance(value, dict):
        raise ResourceError(where, "", f"the document {_NO_RESOURCE}")
    kind = value.get("kind")
    if not isinstance(kind, str) or not kind.endswith("List"):
        yield "", value
        return
    spoken = value.get("apiVersion", LIST_API_VERSIONS[0])
    if spoken not in LIST_API_VERSIONS:
        wanted = " or ".join(LIST_API_VERSIONS)
        message = f"{quoted(spoken, 64)} is not known here for a {quoted(kind, 64)}; give {wanted}"
        raise ResourceError(where, "apiVersion", message)
    stray = sorted(set(value) - {"apiVersion", "kind", "metadata", "items"})
    if stray:
        message = f"a {quoted(kind, 64)} has a list called items and nothing else; remove {quoted(stray[0], 64)}"
        raise ResourceError(where, "items", message)
    items = value.get("items")
    if not isinstance(items, list):
        raise ResourceError(where, "items", f"a {quoted(kind, 64)} has a list called items and nothing else; add it")
    for index, item in enumerate(items):
        path = f"items[{index}]"
        if not isinstance(item, dict):
            raise ResourceError(where, path, _NO_RESOURCE)
        if kind != "List" and item.get("kind", kind[:-4]) != kind[:-4]:
            stranger = quoted(item["kind"], 64)
            raise ResourceError(where, f"{path}.kind", f"{stranger} in a {quoted(kind, 64)}; make the kind List")
        yield path, item


def _roots(text: str, source: str) -> Iterator[_Built]:
    builder = _Builder(source)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            root = builder.take(event)
            if root:
                yield root
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ResourceError(f"{source}:{line}", "", f"not YAML: {quoted(error.problem or 'syntax error')}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ResourceError(f"{source}:{line}", "", f"not YAML: {quoted(error.reason)}") from None
    except UnicodeEncodeError:
        raise ResourceError(source, "", "not YAML: half of a surrogate pair is not a character") from None


def plain(text: str) -> object:
    """What a scalar without quotes is."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def dump_yaml(value: object) -> str:
    """Text that `load_yaml` reads back as the same value."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return str(text).rstrip("\n")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(plain(text), str) else "'"  # PyYAML quotes by YAML 1.1, which knows no 1e3
    style = style if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _string)


class _Builder:
    def __init__(self, source: str) -> None:
        self.source = source
        self.stack: list[_Built] = []
        self.anchors: dict[str, _Built] = {}
        self.nodes = 0

    def take(self, event: yaml.Event) -> _Built | None:
        """Returns the document's root when it is complete."""
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            self.anchors.clear()
        elif isinstance(event, yaml.AliasEvent):
            return self.close(self.alias(event, line))
        elif isinstance(event, yaml.ScalarEvent):
            return self.close(_Built(self.scalar(event, line), line, anchor=event.anchor))
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self.check_tag(event.tag, line)
            value: object = {} if isinstance(event, yaml.MappingStartEvent) else []
            self.stack.append(_Built(value, line, anchor=event.anchor))
            if len(self.stack) > MAX_DEPTH:
                self.fail(line, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            return self.close(self.stack.pop())
        return None

    def close(self, built: _Built) -> _Built | None:
        """A node is complete: it goes into its parent."""
        if built.anchor:
            self.anchors[built.anchor] = built
        if not self.stack:
            return built
        parent = self.stack[-1]
        self.nodes += built.nodes if built.anchor is None else 1
        parent.nodes += built.nodes
        if max(self.nodes, parent.nodes) > MAX_NODES:
            self.fail(built.line, f"more than {MAX_NODES} values, aliases counted in full")
        if isinstance(parent.value, list):
            parent.value.append(built.value)
        elif isinstance(parent.value, dict):
            self.member(parent, parent.value, built)
        return None

    def member(self, parent: _Built, mapping: dict[str, object], built: _Built) -> None:
        if parent.key is not None:
            mapping[parent.key] = built.value
            parent.key = None
        elif not isinstance(built.value, str):
            self.fail(built.line, "a key is not a string; put it in quotes")
        elif built.value in mapping:
            self.fail(built.line, f"the key {quoted(built.value, 64)} is given twice")
        else:
            parent.key = built.value

    def alias(self, event: yaml.AliasEvent, line: int) -> _Built:
        known = self.anchors.get(event.anchor or "")
        if known is None:
            self.fail(line, f"the alias *{quoted(event.anchor or '', 64)} names no finished anchor before it")
        self.nodes += known.nodes
        return _Built(known.value, line, known.nodes)

    def scalar(self, event: yaml.ScalarEvent, line: int) -> object:
        self.check_tag(event.tag, line)
        text: str = event.value
        return plain(text) if event.implicit[0] else text  # else: quoted, a block, or !!str

    def check_tag(self, tag: str | None, line: int) -> None:
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            self.fail(line, f"the tag {quoted(tag, 64)} is not supported; remove it")

    def fail(self, line: int, message: str) -> NoReturn:
        raise ResourceError(f"{self.source}:{line}", "", message)
