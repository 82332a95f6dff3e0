"""Inside the guest of `qplab --guest`: runs qplab's commands as the machine asks for them, one process each.

The two sides speak through a directory that both can write, one request a name: NAME.json {"argv", "cwd", "columns"}
from the machine, NAME.signal with a number; NAME.out, NAME.err and at last NAME.status {"status", "labs"} from here.
`end` ends the guest. Commands are forked from this process, which has qplab loaded already: on an emulated processor
that saves seconds each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from qpd.lab import state

POLL = 0.1
READY, END = "ready", "end"


class Agent:
    """Serves one directory.

    Args:
        directory: where requests come and answers go.
        command: what a request runs, with its words in sys.argv; its SystemExit is the answer's status.
    """

    def __init__(self, directory: Path, command: Callable[[], None]) -> None:
        self.directory = directory
        self._command = command
        self._running: dict[int, str] = {}

    def serve(self) -> None:
        """Run what is asked for; returns when `end` is there."""
        (self.directory / READY).touch()
        while not (self.directory / END).exists():
            self.step()
            time.sleep(POLL)

    def step(self) -> None:
        """Start new requests, pass signals on, answer for what has ended."""
        for request in sorted(self.directory.glob("*.json")):
            name = request.stem
            words = json.loads(request.read_text(encoding="utf-8"))
            request.unlink()
            self._running[self._fork(name, words)] = name
        for pid, name in list(self._running.items()):
            file = self.directory / f"{name}.signal"
            if file.exists() and (number := file.read_text(encoding="ascii")):
                file.unlink()
                os.killpg(pid, int(number))
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._running[pid]
                self._answer(name, os.waitstatus_to_exitcode(status))

    def _answer(self, name: str, status: int) -> None:
        # A shell says 128 and more for a signal.
        code = 128 - status if status < 0 else status
        write(self.directory / f"{name}.status", json.dumps({"status": code, "labs": state.labs()}))

    def _fork(self, name: str, words: dict[str, str | list[str]]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for descriptor, kind in ((1, "out"), (2, "err")):
                file = os.open(
                    self.directory / f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
                )
                os.dup2(file, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(str(words["cwd"]))
            os.environ["COLUMNS"] = str(words["columns"])
            sys.argv = ["qplab", *words["argv"]]
            self._command()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - a child never returns into its parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def write(file: Path, text: str) -> None:
    """Write a file that the other side sees whole or not at all."""
    temporary = file.with_suffix(f"{file.suffix}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    """Serve the directory that is named on the command line."""
    from qpd.lab import cli  # noqa: PLC0415 - cli knows of the guest, and the guest of it

    Agent(Path(sys.argv[1]), cli.main).serve()


if __name__ == "__main__":
    main()
