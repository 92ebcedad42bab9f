# The house's laws as tests: who may import whom, what the pure modules may not touch, how large things may grow.
from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOMS = ("slash32", "hooks", "hostd", "dispatcher", "lab", "bench")
MAY_IMPORT = {
    "slash32": {"slash32"},
    "hooks": {"hooks", "slash32"},
    "hostd": {"hostd", "slash32"},
    "dispatcher": {"dispatcher", "slash32"},
    "lab": {"lab"},
    "bench": {"bench", "slash32", "hostd", "dispatcher", "hooks", "lab"},
}
PURE = {
    "slash32": "net model policy selector resources documents rules decode errors verdict tag pack wire sync unicast"
    " metrics policies hosts networksets schema traffic regions programs reading classes compare naming edits",
    "hostd": "compiler change revocation state agent guests/claims guests/starting guests/operations guests/sightings"
    " session/rounds reporting/metrics reporting/staged reporting/status reporting/packetlog",
    "dispatcher": "registry decisions metrics hosts/fanout hosts/live hosts/questions replicas/company replicas/rolls"
    " store/commits store/backups operators/clashes operators/resources api/watchers",
}
WORLD = {"socket", "subprocess", "os", "time", "zmq", "pyroute2", "libvirt", "select", "selectors", "threading"}
KERNEL = {"subprocess", "pyroute2", "iptc", "fcntl"}  # hostd's one door: only its dataplane
FILE_MOST, FILE_MEDIAN = 500, 150
FUNCTION_MOST, FUNCTION_P90 = 60, 30
PARAMETERS = 5


def files(room: str) -> list[Path]:
    return sorted(p for p in (REPO / room).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names, relative ones resolved; what only type checkers see does not count."""
    package = path.relative_to(REPO).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield ".".join(part for part in (base, node.module) if part)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_whom_they_may(room: str) -> None:
    strangers = {
        (str(path.relative_to(REPO)), name)
        for path in files(room)
        for name in imports(path)
        if name.split(".")[0] in ROOMS and name.split(".")[0] not in MAY_IMPORT[room]
    }
    assert not strangers


@pytest.mark.parametrize("room", PURE)
def test_pure_modules_touch_nothing(room: str) -> None:
    for name in PURE[room].split():
        modules = files(f"{room}/{name}") or [REPO / room / f"{name}.py"]
        for path in modules:
            assert path.exists(), f"{path} is on the list of the pure, and is not there"
            assert not WORLD & {n.split(".")[0] for n in imports(path)}, path


def test_one_door_to_the_kernel() -> None:
    for path in files("hostd"):
        if "dataplane" not in path.parts:
            assert not KERNEL & {n.split(".")[0] for n in imports(path)}, path
            assert "/proc/sys/net" not in path.read_text(), path
            assert "AF_NETLINK" not in path.read_text(), path


def test_hooks_import_only_the_standard_library() -> None:
    allowed = {"sys", "posix", "_socket", "_signal", "__future__", "hooks", "pyexpat", "tomllib", "pathlib"}
    assert {n.split(".")[0] for p in files("hooks") for n in imports(p)} <= allowed


def test_the_law_sees_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what these tests forbid is found where it is."""
    breach = tmp_path / "hostd" / "dataplane" / "x.py"
    breach.parent.mkdir(parents=True)
    breach.write_text("from dispatcher import store\nfrom ..calc import y\nimport socket\n")
    monkeypatch.setattr(f"{__name__}.REPO", tmp_path)
    assert list(imports(breach)) == ["dispatcher", "hostd.calc", "socket"]


def sources() -> list[Path]:
    return [path for room in ROOMS for path in files(room)]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_keep_to_their_budget() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in sources()}
    assert {str(p): n for p, n in sizes.items() if n > FILE_MOST} == {}
    assert statistics.median(sizes.values()) <= FILE_MEDIAN


def test_test_files_keep_to_their_budget() -> None:
    """One that grows over it becomes two, by what they test; what both need goes to a rig beside them."""
    sizes = {path: len(path.read_text().splitlines()) for path in files("tests")}
    assert {str(p): n for p, n in sizes.items() if n > FILE_MOST} == {}


def test_functions_keep_to_their_budget() -> None:
    lengths = {(str(path), node.name): length(node) for path in sources() for node in functions(path)}
    assert {where: n for where, n in lengths.items() if n > FUNCTION_MOST} == {}
    assert sorted(lengths.values())[len(lengths) * 9 // 10] <= FUNCTION_P90


def test_functions_take_few_parameters() -> None:
    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        return len([n for n in names if n not in ("self", "cls")])

    many = {(str(p), node.name): count(node) for p in sources() for node in functions(p) if count(node) > PARAMETERS}
    assert many == {}


def test_every_file_says_what_it_owns() -> None:
    silent = []
    for path in sources():
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#!")]
        if lines and not lines[0].startswith(("#", '"""')):
            silent.append(str(path.relative_to(REPO)))
    assert silent == []


def test_test_modules_have_names_of_their_own() -> None:
    """Or pytest collects none of them."""
    names = [path.name for path in (REPO / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_nothing_names_a_machine_or_a_tool() -> None:
    words = ("/" + "work/", "/" + "farm/", ".py" + "env/")
    for path in sources():
        assert not [w for w in words if w in path.read_text()], path
