"""One node's FRR: an instance of its own (`-N NAME`) inside the node's namespace, configured from the node's files."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qpd.lab import namespaces
from qpd.lab.errors import LabError
from qpd.lab.processes import Records
from qpd.lab.waiting import wait_until

BINARIES = Path("/usr/lib/frr")
SOCKETS = Path("/var/run/frr")
CONFIGURATION = Path("/etc/frr")
USER = "frr"

# Files of a containerlab FRR node, by the place where the node sees them.
FRR_CONF, DAEMONS, VTYSH_CONF = (f"/etc/frr/{name}" for name in ("frr.conf", "daemons", "vtysh.conf"))

_ORDER = ("mgmtd", "zebra", "staticd", "bfdd", "bgpd")
"""mgmtd before all (FRR 9 and later configures zebra through it), zebra before its clients."""
_FIRST = _ORDER[:2]

_REALTIME = ("chrt", "-f", "50")
"""bfdd answers within milliseconds or declares its peers down: it goes before everything else on a busy machine."""


_START_PATIENCE = 180.0
"""Seconds for what takes one second, but many on an emulated processor that starts many daemons."""


def missing() -> str | None:
    """One line that says what of FRR is missing on this machine and how to mend it; None where it is complete."""
    for program in ("zebra", "bgpd", "bfdd"):
        if not (BINARIES / program).exists():
            return f"{BINARIES / program} is not there; install FRR (apt-get install frr)"
    if shutil.which("vtysh") is None:
        return "vtysh is not in PATH; install FRR (apt-get install frr)"
    return None


def parse_daemons(text: str) -> dict[str, list[str]]:
    """The daemons that a `daemons` file switches on, with their options."""
    settings = {}
    for line in text.splitlines():
        key, separator, value = line.strip().partition("=")
        if separator and not key.startswith("#"):
            settings[key] = shlex.split(value)
    names = ["zebra", *(key for key, value in settings.items() if value == ["yes"] and key != "vtysh_enable")]
    return {
        name: [word for text in settings.get(f"{name}_options", []) for word in text.split()]
        for name in dict.fromkeys(names)
    }


class Instance:
    """The FRR instance of one node.

    Args:
        name: the instance's name, which is also its namespace's.
        node: the node's name; the records of its daemons are NODE.DAEMON.
        files: the node's files by the path where a container would see them.
        records: where its processes are recorded.
        logs: the directory of its log files.
    """

    def __init__(self, name: str, node: str, files: dict[str, Path], records: Records, logs: Path) -> None:
        self.name = name
        self.node = node
        self.files = files
        self.records = records
        self.logs = logs
        self.sockets = SOCKETS / name
        self.configuration = CONFIGURATION / name

    def daemons(self) -> dict[str, list[str]]:
        """The daemons of this node in the order of their start, with their options."""
        chosen = parse_daemons(self._read(DAEMONS))
        if (BINARIES / "mgmtd").exists():
            chosen.setdefault("mgmtd", [])
        unknown = [name for name in chosen if not (BINARIES / name).exists()]
        if unknown:
            raise LabError(f"{self.files[DAEMONS]}: {unknown[0]}=yes: there is no {BINARIES / unknown[0]}")
        return dict(
            sorted(chosen.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else 99)
        )

    def prepare(self) -> None:
        """Make the directories of sockets and configuration."""
        for directory in (self.sockets, self.configuration, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        for source in (FRR_CONF, VTYSH_CONF):
            (self.configuration / Path(source).name).write_text(self._read(source), encoding="utf-8")
        shutil.chown(self.sockets, USER, USER)
        for file in (self.configuration, *self.configuration.iterdir()):
            shutil.chown(file, USER, USER)

    def start(self, *names: str) -> None:
        """Start these daemons (all that the node's `daemons` file has, where none is named), without configuration."""
        for name, options in self.daemons().items():
            if names and name not in names:
                continue
            # The integrated configuration is given to all daemons at once by vtysh; see configure().
            command = [
                str(BINARIES / name),
                "-N",
                self.name,
                "-u",
                USER,
                "-g",
                USER,
                "--log",
                "stdout",
                *options,
            ]
            command = [*_hostname(self.node), *command]
            if name == "bfdd" and shutil.which("chrt") is not None:
                command = [*_REALTIME, *command]
            # What a killed daemon has left behind must not be taken for the new one's.
            for socket in (f"{name}.vty", *(["zserv.api"] if name == "zebra" else [])):
                (self.sockets / socket).unlink(missing_ok=True)
            record = f"{self.node}.{name}"
            self.records.start(record, namespaces.enter(self.name, command), self.logs / f"{record}.log")

    def answers(self) -> bool:
        """True when every daemon of the node listens on its vty socket."""
        return all((self.sockets / f"{name}.vty").exists() for name in self.daemons())

    def restart(self, daemon: str, limit: float) -> None:
        """Start one daemon anew and configure it; `limit` is a reading of time.monotonic()."""
        if daemon not in self.daemons():
            raise LabError(f"{self.node}: {daemon} is none of its daemons: {', '.join(self.daemons())}")
        self.start(daemon)
        wait_until(
            lambda: daemon in self._answering(),
            limit,
            f"{self.node}: {daemon} does not answer; see {self.logs}",
        )
        self.configure(daemon)

    def _answering(self) -> set[str]:
        """The daemons that answer vtysh."""
        try:
            return set(self.vtysh("show daemons", timeout=_START_PATIENCE).split())
        except LabError:  # no daemon of the node answers yet
            return set()

    def configure(self, daemon: str | None = None) -> None:
        """Let vtysh give the node's frr.conf to its daemons, or to one of them.

        Raises:
            LabError: where a daemon refuses, or does not answer (vtysh would drop its part and say nothing).
        """
        wanted = self.daemons().keys() if daemon is None else {daemon}
        missing = wanted - self._answering()
        if missing:
            names = ", ".join(sorted(missing))
            raise LabError(f"{self.node}: {names} does not answer vtysh; see {self.logs}")
        only = [] if daemon is None else ["-d", daemon]
        command = ["vtysh", "-N", self.name, *only, "-b"]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=_START_PATIENCE
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"{self.node}: FRR takes no configuration within {_START_PATIENCE:.0f} s; see {self.logs}"
            ) from error
        complaints = [
            line for line in (done.stdout + done.stderr).splitlines() if "%" in line or "rror" in line
        ]
        if done.returncode != 0 or complaints:
            words = " ".join(" ".join(complaints).split()) or f"vtysh -b: exit status {done.returncode}"
            raise LabError(f"{self.files[FRR_CONF]}: {words}")

    def vtysh(self, *commands: str, timeout: float = 20.0) -> str:
        """What vtysh prints for these commands, run one after the other.

        Raises:
            LabError: where a command fails or FRR does not know it.
        """
        arguments = [word for command in commands for word in ("-c", command)]
        command = ["vtysh", "-N", self.name, *arguments]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.node}: FRR does not answer within {timeout:.0f} s") from error
        refused = [line for line in done.stdout.splitlines() if line.startswith("%")]
        if done.returncode != 0 or refused:
            words = " ".join((*refused, done.stderr)).strip()
            raise LabError(f"{self.node}: vtysh {'; '.join(commands)}: {words}")
        return done.stdout

    def show(self, command: str) -> Any:  # noqa: ANN401 - JSON
        """The JSON of a `show ... json` command; {} where FRR prints nothing."""
        text = self.vtysh(command)
        return json.loads(text) if text.strip() else {}

    def _read(self, target: str) -> str:
        if target not in self.files:
            hint = f"add NODE/{Path(target).name}:{target} to binds"
            raise LabError(f"node {self.node}: nothing is bound to {target}; {hint}")
        try:
            return self.files[target].read_text(encoding="utf-8")
        except OSError as error:
            raise LabError(
                f"{self.files[target]}: {error.strerror} (bound to {target} of {self.node})"
            ) from error


def _hostname(name: str) -> list[str]:
    """Run what follows on a machine of this name: BGP's hostname capability tells it to the peers.

    vtysh does not pass the `hostname` line of an integrated configuration on to the daemons.
    """
    return ["unshare", "--uts", "--", "sh", "-c", 'hostname "$0" && exec "$@"', name]


def bring_up(instances: Collection[Instance], limit: float) -> None:
    """Start FRR on these nodes, whose daemons do not run, and configure it; `limit` is a reading of time.monotonic().

    Raises:
        LabError: where a daemon does not answer in time, or refuses its configuration.
    """
    for instance in instances:
        instance.prepare()
        instance.start(*_FIRST)
    for instance in instances:
        # Its clients retry after ten seconds only, and a bfdd that misses bgpd's sessions never hears of them again.
        zebra = instance.sockets / "zserv.api"
        wait_until(zebra.exists, limit, f"{instance.node}: zebra does not answer; see {instance.logs}")
        instance.start(*(name for name in instance.daemons() if name not in _FIRST))
    for instance in instances:
        wait_until(
            instance.answers, limit, f"{instance.node}: FRR's daemons do not answer; see {instance.logs}"
        )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Instance.configure, instances))
