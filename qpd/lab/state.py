"""What a lab consists of, written down before any of it is made, so that `down` finds it after any end of `up`."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qpd.lab import frr, namespaces
from qpd.lab.errors import LabError
from qpd.lab.processes import Identity, Records, end

ROOT = Path(os.environ.get("QPLAB_STATE_DIR", "/run/qplab"))
"""Where labs are written down: `down --all` removes those of this directory, and no others."""

_RECORD = "state.json"
PINS = Path("/sys/fs/bpf/qplab")


@dataclass(frozen=True)
class State:
    """The record of one lab."""

    name: str
    topology: str
    """The topology file, absolute."""
    namespaces: list[str] = field(default_factory=list)
    instances: list[str] = field(default_factory=list)
    """Names of FRR instances: directories under /var/run/frr and /etc/frr."""
    seed: int = 0

    @property
    def directory(self) -> Path:
        """Where everything of the lab is kept that is a file."""
        return ROOT / self.name

    @property
    def pins(self) -> Path:
        """Where the lab's daemons pin their programs and maps."""
        return PINS / self.name

    @property
    def logs(self) -> Path:
        """The logs of the lab's processes."""
        return self.directory / "log"

    def records(self) -> Records:
        """The lab's processes."""
        return Records(self.directory / "processes")

    def check_free(self) -> None:
        """Raise LabError where a lab, a namespace or an FRR instance of these names is there already."""
        if (self.directory / _RECORD).exists():
            raise LabError(
                f"lab {self.name} is up already; `qplab down {self.name}` or choose another --name"
            )
        for name in self.namespaces:
            if namespaces.exists(name):
                raise LabError(
                    f"network namespace {name} is there already and not of a lab; choose another --name"
                )
        for name in self.instances:
            if (frr.SOCKETS / name).exists() or (frr.CONFIGURATION / name).exists():
                raise LabError(
                    f"FRR instance {name} is there already and not of a lab; choose another --name"
                )

    def save(self) -> None:
        """Write the record."""
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / "state.new"
        temporary.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        temporary.replace(self.directory / _RECORD)

    @classmethod
    def load(cls, name: str) -> State:
        """The record of the lab of this name.

        Raises:
            LabError: where there is none.
        """
        try:
            return cls(**json.loads((ROOT / name / _RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = ", ".join(labs()) or "none"
            raise LabError(f"there is no lab {name}; labs that are up: {known}") from None

    def remove(self) -> None:
        """Remove everything that is recorded, whether it was made or not; may be called again after a failure."""
        records = self.records()
        # qpd first: it restores what it changed; FRR next; whatever else was started in the namespaces last.
        records.end(*(name for name in records.names() if name.endswith(".qpd")), grace=5.0)
        records.end()
        strangers = [Identity.of(pid) for pid in namespaces.members(self.namespaces)]
        end([identity for identity in strangers if identity is not None])
        for name in self.namespaces:
            namespaces.delete(name)
        for name in self.instances:
            shutil.rmtree(frr.SOCKETS / name, ignore_errors=True)
            shutil.rmtree(frr.CONFIGURATION / name, ignore_errors=True)
        shutil.rmtree(self.pins, ignore_errors=True)
        _remove_directory(self.directory)
        _remove_empty()


def _remove_directory(directory: Path) -> None:
    """Remove a lab's directory, its record last: whoever is interrupted here can begin anew."""
    for entry in directory.glob("*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _RECORD:
            entry.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _remove_empty() -> None:
    for parent in (PINS, ROOT):
        if parent.is_dir() and not any(parent.iterdir()):
            with suppress(OSError):  # a lab that comes up at this moment
                parent.rmdir()


def remove_unrecorded() -> list[str]:
    """Remove directories of labs that were killed before they were written down; nothing else of them was made."""
    found = [entry for entry in ROOT.glob("*") if entry.is_dir() and not (entry / _RECORD).exists()]
    for directory in found:
        shutil.rmtree(directory, ignore_errors=True)
    _remove_empty()
    return sorted(entry.name for entry in found)


def labs() -> list[str]:
    """The names of the labs that are up, or were left by a crash."""
    return sorted(file.name for file in ROOT.glob("*") if (file / _RECORD).exists())
