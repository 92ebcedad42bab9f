# The real command line (python3 -m slash32.cli), run against a rack whose hosts live on meanwhile.
from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from typing import Any

import yaml
from dispatcher_rig import PATIENCE, REPO, Rack

LIVE = re.compile(r"revision (\d+) live on (\d+) of (\d+) hosts? in (\d+ ms|\d+\.\d s)( \(p50 .* m?s, p99 .* m?s\))?\n")
PROFILE = {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "base"}}
PROFILE["spec"] = {"ingress": [{"action": "Allow"}], "labelsToApply": {"zone": "1e3"}}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "slash32.cli", *map(str, words)]


class Fleet(Rack):
    """A dispatcher, three hosts with a guest each, and an operator."""

    def popen(self, *words: object, **more: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "SLASH32_SOCKET": str(self.dispatcher.socket)}
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(command(*words), cwd=REPO, env=environment, text=True, **more)

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; the hosts live on meanwhile."""
        said: list[tuple[str, str]] = []
        reader = threading.Thread(target=lambda: said.append(process.communicate(timeout=PATIENCE)))
        reader.start()
        self.until(lambda: not reader.is_alive())
        assert said and process.returncode is not None
        return process.returncode, *said[0]

    def run(self, *words: object, text: str | None = None) -> tuple[int, str, str]:
        if text is None:
            return self.ended(self.popen(*words))
        read, write = os.pipe()
        with os.fdopen(write, "w") as pipe:
            pipe.write(text)  # less than a pipe holds
        process = self.popen(*words, stdin=read)
        os.close(read)
        return self.ended(process)

    def ok(self, *words: object, text: str | None = None) -> str:
        code, out, err = self.run(*words, text=text)
        assert (code, err) == (0, ""), (out, err)
        return out

    def revision(self) -> int:
        return int(self.dispatcher.get("/v1/status")["revision"])


def text_of(*documents: dict[str, Any]) -> str:
    return yaml.safe_dump_all(documents)


def completed(fleet: Fleet, line: str) -> list[str]:
    environment = {"_SLASH32_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    environment |= {**os.environ, "SLASH32_SOCKET": str(fleet.dispatcher.socket)}
    done = subprocess.run(command(), env=environment, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [word.split(",", 1)[1] for word in done.stdout.split()]


def one_line(code: int, out: str, err: str) -> str:
    assert code == 1 and len(err.splitlines()) == 1 and "Traceback" not in err, (out, err)
    return err
