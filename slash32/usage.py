# Owns: how the daemons' commands read their arguments: help keeps its lines, what is wrong is one line and exit code 2.
# Touches: stderr.
from __future__ import annotations

import argparse
from typing import Any, NoReturn

from slash32.errors import visible

CODES = "exit codes: 0 done, 1 refused or failed, 2 usage"


class Parser(argparse.ArgumentParser):
    """`examples` are the lines that follow the options in the help."""

    def __init__(self, prog: str = "", *, examples: str = "", **more: Any) -> None:
        listed = "".join(f"  {line}\n" for line in examples.strip().splitlines())
        more["epilog"] = f"examples:\n{listed}\n{CODES}" if listed else CODES
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {visible(message[:300])}; see {self.prog} --help\n")
