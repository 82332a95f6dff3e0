"""`qplab --guest`: the same commands in a virtual machine with the distribution's kernel, which has netem and VRF.

One guest a machine. The first command boots it, on this machine's files (scripts/in-guest); it ends with its last lab.
Whatever it writes is gone with it, but for `results` in the directory where it was started.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qpd.lab.errors import LabError
from qpd.lab.guest_agent import END, POLL, READY, write
from qpd.lab.processes import Records

IN_GUEST = Path(__file__).resolve().parents[2] / "scripts" / "in-guest"
RESULTS = "results"
"""The one directory that the guest writes on this machine, below where it was started."""

_RECORD = "guest"
_LIFETIME = 12 * 3600
"""Seconds after which a guest ends itself."""
_BOOT = 1200.0
"""Seconds; a minute on a quiet machine."""
_MODULES = ("sch_netem", "vrf", "vxlan", "bridge", "veth", "sch_tbf", "sch_ingress", "cls_bpf")


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    status: int
    labs: list[str]
    """The labs that are up in the guest after it."""


class Guest:
    """The machine's guest.

    Args:
        directory: what is known of it: its process, its log, and the directory that both sides write.
        memory: its memory, as QEMU takes it.
        cpus: its processors.
        virtual_time: its clocks count its instructions (scripts/in-guest); it has one processor then.
    """

    def __init__(self, directory: Path, memory: str, cpus: int, *, virtual_time: bool = False) -> None:
        self.directory = directory
        self._memory = memory
        self.processors = "--virtual-time" if virtual_time else f"--cpus={cpus}"
        self._records = Records(directory / "processes")
        self._log = directory / "guest.log"

    @property
    def control(self) -> Path:
        """The directory of requests and answers."""
        return self.directory / "control"

    def runs(self) -> bool:
        """True while its virtual machine runs."""
        return self._records.find(_RECORD) is not None

    def start(self) -> None:
        """Boot it and wait until it takes commands; nothing happens where it runs.

        Raises:
            LabError: with its last words, where no guest can run here.
        """
        with self._alone():
            if self.runs():
                return
            if not IN_GUEST.exists():
                raise LabError(f"{IN_GUEST} is not there: guests are started from qpd's repository")
            shutil.rmtree(self.control, ignore_errors=True)
            self.control.mkdir()
            self._log.unlink(missing_ok=True)
            results = Path.cwd() / RESULTS
            command = [sys.executable, str(IN_GUEST), f"--deadline={_LIFETIME}", f"--memory={self._memory}"]
            command += [self.processors, f"--write={self.control}", f"--write={results}", "--"]
            agent = f"exec {sys.executable} -m qpd.lab.guest_agent {self.control}"
            command += ["sh", "-c", f"modprobe -a {' '.join(_MODULES)}; {agent}"]
            environment = dict(os.environ, PYTHONPATH=str(IN_GUEST.parents[1]))
            self._records.start(_RECORD, command, self._log, environment)
            limit = time.monotonic() + _BOOT
            while not (self.control / READY).exists():
                if not self.runs() or time.monotonic() > limit:
                    words = self._last_words()
                    self._remove()
                    raise LabError(f"the guest does not come up: {words}")
                time.sleep(POLL)

    def run(self, argv: Sequence[str], out: TextIO, err: TextIO) -> int:
        """Run a qplab command in it; returns its exit status.

        Ctrl-C and SIGTERM go to the command. The guest ends afterwards where it has no lab any more.

        Raises:
            LabError: where the guest ends before the command does.
        """
        name = uuid.uuid4().hex
        columns = shutil.get_terminal_size().columns
        request = {"argv": list(argv), "cwd": str(Path.cwd()), "columns": columns}
        with self._passing_signals(name):
            write(self.control / f"{name}.json", json.dumps(request))
            answer = self._follow(name, out, err)
        if not answer.labs:
            self.end()
        return answer.status

    def end(self) -> None:
        """End it and forget it; nothing happens where it does not run."""
        with self._alone():
            if self.runs() and self.control.is_dir():
                (self.control / END).touch()
                limit = time.monotonic() + 10
                while self.runs() and time.monotonic() < limit:
                    time.sleep(POLL)
            self._remove()

    def _remove(self) -> None:
        self._records.end(grace=10.0)
        shutil.rmtree(self.control, ignore_errors=True)
        shutil.rmtree(self._records.directory, ignore_errors=True)
        self._log.unlink(missing_ok=True)
        with suppress(OSError):
            (Path.cwd() / RESULTS).rmdir()  # where nothing has been written into it

    def _follow(self, name: str, out: TextIO, err: TextIO) -> Answer:
        status = self.control / f"{name}.status"
        streams = [_Stream(self.control / f"{name}.out", out), _Stream(self.control / f"{name}.err", err)]
        while True:
            ended = status.exists()
            for stream in streams:
                stream.copy()
            if ended:
                said = json.loads(status.read_text(encoding="utf-8"))
                for file in (status, *(stream.file for stream in streams)):
                    file.unlink(missing_ok=True)
                return Answer(int(said["status"]), list(said["labs"]))
            if not self.runs():
                raise LabError(f"the guest has ended: {self._last_words()}")
            time.sleep(POLL)

    @contextmanager
    def _passing_signals(self, name: str) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def pass_on(number: int, _frame: object) -> None:
            write(self.control / f"{name}.signal", str(int(number)))

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One command starts or ends the guest at a time."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return " | ".join(line.strip() for line in lines[-3:]) or "it said nothing"


class _Stream:
    """What a command says, copied from its file as the file grows."""

    def __init__(self, file: Path, sink: TextIO) -> None:
        self.file = file
        self._sink = sink
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self) -> None:
        with suppress(FileNotFoundError), self.file.open("rb") as source:
            source.seek(self._offset)
            data = source.read()
            self._offset += len(data)
            self._sink.write(self._decoder.decode(data))
            self._sink.flush()


def of_machine(*, measures: bool = False) -> Guest:
    """The guest of this machine; QPLAB_GUEST_DIR, _MEMORY, _CPUS and _TIME change what they say.

    Args:
        measures: what boots it is an experiment, for which virtual time is the default where processors are emulated.

    Raises:
        LabError: where a variable is wrong.
    """
    default = "virtual" if measures and os.environ.get("QPDT_GUEST_KVM") != "1" else "host"
    time_ = os.environ.get("QPLAB_GUEST_TIME", default)
    if time_ not in {"host", "virtual"}:
        raise LabError(f"QPLAB_GUEST_TIME is {time_!r}; it can be 'host' or 'virtual' (docs/lab.md)")
    return Guest(
        Path(os.environ.get("QPLAB_GUEST_DIR", "/var/lib/qplab-guest")),
        os.environ.get("QPLAB_GUEST_MEMORY", "3G"),
        int(os.environ.get("QPLAB_GUEST_CPUS", str(min(2, os.cpu_count() or 1)))),
        virtual_time=time_ == "virtual",
    )


def run(argv: Sequence[str]) -> int:
    """Run a qplab command in the machine's guest, booted where it does not run; returns the exit status."""
    if os.geteuid() != 0:
        raise LabError("qplab needs root: run it with sudo")
    guest = of_machine(measures=argv[:1] == ["run"])
    if "--help" not in argv and argv[:1] == ["down"] and not guest.runs():
        print("no guest is running, so no lab is up in one")
        return 0
    if not guest.runs():
        print("booting the guest", file=sys.stderr)
    try:
        guest.start()
        return guest.run(argv, sys.stdout, sys.stderr)
    except BaseException:
        if not guest.runs():
            guest.end()
        raise
