# What `pip install .` would put into site-packages.
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ROOMS = {"slash32": "", "hostd": "slash32/hostd", "hooks": "slash32/hooks", "dispatcher": "slash32/dispatcher"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    where = ["--build-base", str(folder), "--build-lib", str(folder / "site")]
    command = [sys.executable, "setup.py", "-q", "build", *where]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_one_name_in_site_packages(site: Path) -> None:
    assert [path.name for path in site.iterdir()] == ["slash32"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_of_a_room_is_in(site: Path, room: str) -> None:
    target = site / (ROOMS[room] or "slash32")
    there = {path.relative_to(target) for path in target.rglob("*.py")}
    wanted = {path.relative_to(REPO / room) for path in (REPO / room).rglob("*.py")}
    assert wanted
    assert wanted <= there


def test_rooms_work_under_their_mapped_names(site: Path) -> None:
    names = "slash32.hostd.change.plan, slash32.hostd.config, slash32.hooks.alone, slash32.dispatcher.store.disk"
    script = f"import sys; sys.path.insert(0, {str(site)!r}); import {names}; print(slash32.__version__)"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
