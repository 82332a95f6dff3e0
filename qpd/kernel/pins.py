"""The tree of pins in bpffs: which object lies at which path. Names hold no dot: bpffs reserves it.

    <pin_dir>/v5/qps, paths, …       maps                  <pin_dir>/v5/steer, observe, tell  programs
    <pin_dir>/v5/links/7-steer       TCX link on ifindex 7
    <pin_dir>/v5/filters/7-steer     folder: a clsact filter of ours is there; 7-qdisc: the qdisc is ours, too
    <pin_dir>/v5/made-<fingerprint>  folder: what the programs were compiled from

bpffs takes no files but pinned objects, so the notes are empty folders.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qpd.kernel import sources
from qpd.model import Hook

_VERSION = re.compile(r"v(\d+)")
_NOTE = re.compile(r"(\d+)-(\w+)")
_MADE = "made-"
TELL = "tell"
"""The program that is on no hook: the daemon runs it to set fields of a QP's entry (kernel/tell.py)."""


def program_name(hook: Hook) -> str:
    """The C function, and the pin, of a hook's program."""
    return hook.name.lower()


PROGRAMS = (*(program_name(hook) for hook in Hook), TELL)
"""C functions, and pins, of all programs."""


@dataclass(frozen=True, slots=True)
class Pins:
    """The pins of one layout version: ``directory`` is ``<pin_dir>/v<version>``."""

    pin_dir: Path
    version: int

    @classmethod
    def of(cls, pin_dir: str | Path) -> Pins:
        """The pins of this program's layout below ``pin_dir`` (setting ``bpf.pin_dir``)."""
        return cls(Path(pin_dir), sources.layout_version())

    @property
    def directory(self) -> Path:
        """Where the maps and programs are."""
        return self.pin_dir / f"v{self.version}"

    def map(self, name: str) -> Path:
        """A map's pin; ``name`` as in maps.h."""
        return self.directory / name

    def program(self, hook: Hook) -> Path:
        """A program's pin."""
        return self.directory / program_name(hook)

    @property
    def tell(self) -> Path:
        """The pin of the program that sets fields of an entry."""
        return self.directory / TELL

    @property
    def links(self) -> Path:
        """Folder of the TCX links."""
        return self.directory / "links"

    @property
    def filters(self) -> Path:
        """Folder of the notes about clsact filters."""
        return self.directory / "filters"

    def link(self, ifindex: int, hook: Hook) -> Path:
        """A TCX link's pin."""
        return self.links / f"{ifindex}-{program_name(hook)}"

    def filter(self, ifindex: int, hook: Hook) -> Path:
        """The note that a clsact filter of ours is on this interface."""
        return self.filters / f"{ifindex}-{program_name(hook)}"

    def qdisc(self, ifindex: int) -> Path:
        """The note that this interface's clsact qdisc is ours."""
        return self.filters / f"{ifindex}-qdisc"

    def linked(self) -> set[int]:
        """Interfaces with a pinned TCX link of ours."""
        return {ifindex for ifindex, _ in _notes(self.links)}

    def filtered(self) -> set[int]:
        """Interfaces with a clsact filter of ours."""
        return {ifindex for ifindex, _ in _notes(self.filters)}

    @property
    def made(self) -> str | None:
        """Fingerprint of the sources of the pinned programs; None: not all are there."""
        if not all((self.directory / name).exists() for name in PROGRAMS):
            return None
        return next((path.name.removeprefix(_MADE) for path in self.directory.glob(f"{_MADE}*")), None)

    def forget_made(self) -> None:
        """Before the programs change: their fingerprint is void."""
        for path in self.directory.glob(f"{_MADE}*"):
            path.rmdir()

    def note_made(self, fingerprint: str) -> None:
        """After all programs were pinned."""
        (self.directory / f"{_MADE}{fingerprint}").mkdir(exist_ok=True)

    def others(self) -> list[Pins]:
        """The pins of other layout versions below the same ``pin_dir``."""
        return [pins for pins in every_version(self.pin_dir) if pins.version != self.version]

    def remove(self) -> None:
        """Unpin everything of this version. Objects in use elsewhere live on; links that nothing else holds detach."""
        _remove_tree(self.directory)
        with contextlib.suppress(OSError):  # other versions, or other people's pins
            self.pin_dir.rmdir()


def every_version(pin_dir: str | Path) -> list[Pins]:
    """The pins of every layout version below ``pin_dir``, oldest first."""
    base = Path(pin_dir)
    if not base.is_dir():
        return []
    found = (_VERSION.fullmatch(path.name) for path in base.iterdir())
    return [Pins(base, version) for version in sorted(int(match[1]) for match in found if match)]


def _notes(folder: Path) -> Iterator[tuple[int, str]]:
    """(ifindex, what) of each entry."""
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _NOTE.fullmatch(path.name):
                yield int(match[1]), match[2]


def _remove_tree(folder: Path) -> None:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    folder.rmdir()
