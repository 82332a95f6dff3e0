"""Processes that outlive the command that started them: recorded, recognised, ended by identity and never by name."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """A process: its pid and, so that a recycled pid is told apart, its start time in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The identity of a running process; None where there is none (a zombie has ended)."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        # The command name may hold spaces and parentheses: count fields after the last one (proc(5)).
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in {"Z", "X"} else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """True while this very process runs."""
        return Identity.of(self.pid) == self

    def send(self, number: int) -> bool:
        """Send a signal to this very process; False where it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def end(identities: Sequence[Identity], grace: float = 3.0) -> None:
    """End all of them: SIGTERM, after `grace` seconds SIGKILL; returns when none of them runs."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        left = [identity for identity in identities if identity.send(number)]
        # A stopped process sees SIGTERM only once it continues.
        for identity in left:
            identity.send(signal.SIGCONT)
        _wait(left, patience)


def _wait(identities: Sequence[Identity], patience: float) -> None:
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        waiting: set[int] = set()
        for identity in identities:
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(identity.pid)
                stack.callback(os.close, descriptor)
                if identity.alive:
                    poll.register(descriptor, select.POLLIN)
                    waiting.add(descriptor)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                waiting.discard(descriptor)


# Children of this very process, whatever record they are in: they must be waited for when they have ended.
_children: list[subprocess.Popen[bytes]] = []


def _reap() -> None:
    _children[:] = [child for child in _children if child.poll() is None]


class Records:
    """The records of one lab's processes: a directory with a file each, written before the process is started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(
        self, name: str, command: Sequence[str], log: Path, env: dict[str, str] | None = None
    ) -> Identity:
        """Start a process of this name in a session of its own, its output appended to `log`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / f"{name}.json"
        file.write_text(json.dumps({"pid": None, "command": list(command)}), encoding="utf-8")
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=env,
            )
        _children.append(child)
        # A child that has ended already keeps its pid until it is waited for, so this reads the right one.
        identity = Identity.of(child.pid) or Identity(child.pid, 0)
        record = asdict(identity) | {"command": list(command)}
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(file)
        return identity

    def find(self, name: str) -> Identity | None:
        """The recorded process of this name, None where there is no record or it has ended."""
        _reap()
        try:
            record = json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if record.get("pid") is None:
            return None
        identity = Identity(record["pid"], record["started"])
        return identity if identity.alive else None

    def names(self) -> list[str]:
        """The names of all records."""
        return sorted(file.stem for file in self.directory.glob("*.json"))

    def end(self, *names: str, grace: float = 3.0) -> None:
        """End the processes of these names (all, where none is given) and forget them."""
        chosen = names or tuple(self.names())
        end([identity for name in chosen if (identity := self.find(name)) is not None], grace)
        _reap()
        for name in chosen:
            (self.directory / f"{name}.json").unlink(missing_ok=True)
