"""For a stray `pip install .`: the rooms become slash32.hostd, slash32.hooks, slash32.dispatcher, so that no package
called `hooks` drops into site-packages. Hosts install the .debs (packaging/deb)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("hostd", "hooks", "dispatcher")
HERE = Path(__file__).parent


def packages() -> dict[str, str]:
    """Every package and its folder."""
    found = {"slash32": "slash32", **{f"slash32.{room}": room for room in ROOMS}}
    for name, folder in list(found.items()):
        for inner in find_packages(str(HERE / folder)):
            found[f"{name}.{inner}"] = f"{folder}/{inner.replace('.', '/')}"
    return found


setup(
    name="slash32",
    version=re.search(r'^__version__ = "([^"]+)"$', (HERE / "slash32/__init__.py").read_text(), re.M)[1],
    description="Routed addresses and a label firewall for libvirt guests",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    install_requires=["click", "msgpack", "PyYAML"],
    extras_require={"hostd": ["libvirt-python", "lxml", "pyzmq"], "dispatcher": ["aiohttp", "pyzmq"]},
    entry_points={
        "console_scripts": [
            "slash32 = slash32.cli.__main__:main",
            "slash32-hostd = slash32.hostd.__main__:main",
            "slash32-dispatcher = slash32.dispatcher.__main__:main",
        ]
    },
)
