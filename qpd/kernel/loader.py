"""Compiles, loads and pins the classifier: ``python -m qpd.kernel.loader``, a process of its own.

bcc and its compiler need 130 MB and the daemon must not keep them, so this process reads a ``Spec`` as JSON on stdin,
does its work, writes a ``Result`` as JSON on stdout, and ends. The compiler and the verifier speak on stderr. Maps that
are pinned already are used again, with what is in them; programs are replaced in one step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qpd.kernel import bpf, bpffs, capabilities, headers, sources
from qpd.kernel.layout import MAPS
from qpd.kernel.pins import PROGRAMS, Pins
from qpd.kernel.table import LayoutMismatchError, check_layout


class LoadError(Exception):
    """The classifier could not be loaded: one line that says what, where and how to mend it."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to load and where to pin it. ``cache``: a folder for merged kernel headers."""

    pin_dir: str
    qps_max: int
    cache: str
    sources: str = field(default_factory=lambda: str(sources.directory()))

    @property
    def pins(self) -> Pins:
        """Where everything is pinned."""
        return Pins(Path(self.pin_dir), sources.layout_version(Path(self.sources)))

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told, and the sources do not know."""
        return ("-O2", f'-DPIN_DIR="{self.pins.directory}"', f"-DQPS_MAX={self.qps_max}")

    @property
    def fingerprint(self) -> str:
        """Of everything that the programs are made from."""
        return sources.fingerprint(Path(self.sources), self.flags)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of it. ``error``: one line, or empty; ``seconds``: what compiling and loading took."""

    error: str = ""
    headers: str = ""
    seconds: float = 0.0


def is_current(spec: Spec) -> bool:
    """Whether the pinned programs were made from this very spec and use the maps that are pinned beside them."""
    pins = spec.pins
    return pins.made == spec.fingerprint and all(_uses_pinned_maps(pins, name) for name in PROGRAMS)


def check_maps(spec: Spec) -> None:
    """Raises LayoutMismatchError where a pinned map is not as this program needs it; nothing would notice otherwise."""
    for name, layout in MAPS.items():
        path = spec.pins.map(name)
        if not path.exists():
            continue
        fd = bpf.obj_get(path)
        try:
            check_layout(fd, path, layout, spec.qps_max)
        finally:
            os.close(fd)


def load(spec: Spec) -> Result:
    """Do it all. Raises LoadError."""
    begun = time.monotonic()
    try:
        bpffs.check(Path(spec.pin_dir))
        _check_permission()
        check_maps(spec)
        tree = headers.find(Path(spec.cache))
    except (bpffs.BpffsMissingError, LayoutMismatchError, headers.HeadersMissingError, OSError) as error:
        raise LoadError(str(error)) from error
    bcc = _import_bcc()
    pins = spec.pins
    try:
        pins.directory.mkdir(parents=True, exist_ok=True)
        programs = _compile(bcc, spec, tree)
        _pin(pins, programs, spec.fingerprint)
    except OSError as error:
        raise LoadError(f"cannot pin the classifier in {pins.directory}: {error}") from error
    return Result(headers=str(tree), seconds=time.monotonic() - begun)


def _check_permission() -> None:
    """Raises LoadError where the kernel lets this process load nothing."""
    try:
        os.close(bpf.map_create(bpf.MapType.ARRAY, 4, 4, 1))
        os.close(bpf.prog_load(_RETURN_NEXT))
    except PermissionError as error:
        lacks = (
            ", ".join(capabilities.missing())
            or "none of the usual ones: is bpf(2) filtered (seccomp, lockdown)?"
        )
        raise LoadError(
            f"not allowed to load BPF programs ({error.strerror}); missing capabilities: {lacks}. {_GRANT}"
        ) from error
    if lacking := capabilities.missing():
        raise LoadError(f"missing capabilities: {', '.join(lacking)}. {_GRANT}")


_GRANT = "Run qpd as root, or give it CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (systemd: AmbientCapabilities=)"
BCC_OLDEST = (0, 26)
"""Debian 12's. 0.18 (Ubuntu 22.04) has no pinned tables with flags, and does not make a map whose pin is missing."""
_RETURN_NEXT = (0xFFFFFFFF_000000B7, 0x95)
"""r0 = -1 (TC_ACT_UNSPEC); exit."""


def _import_bcc() -> Any:  # noqa: ANN401 - bcc has no types
    advice = "install the package python3-bpfcc (Debian, Ubuntu) for the Python that runs qpd; in a virtual "
    advice += "environment, make it with --system-site-packages. The package bcc on PyPI is something else"
    try:
        import bcc  # noqa: PLC0415 - 65 MB, in this process only
    except ImportError as error:
        raise LoadError(f"cannot import bcc ({error}): {advice}") from error
    if not hasattr(bcc, "BPF"):
        raise LoadError(f"the module bcc at {bcc.__file__} is not the BPF compiler collection: {advice}")
    version = str(getattr(bcc, "__version__", ""))
    if _numbers(version) < BCC_OLDEST:
        oldest = ".".join(map(str, BCC_OLDEST))
        raise LoadError(
            f"bcc {version} is too old for pinned tables: "
            f"python3-bpfcc {oldest} or later is needed (Debian 12, Ubuntu 24.04)"
        )
    return bcc


def _numbers(version: str) -> tuple[int, ...]:
    """A version's numbers; one that says none is taken for new enough."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return numbers or BCC_OLDEST


def _compile(bcc: Any, spec: Spec, tree: Path) -> dict[str, int]:  # noqa: ANN401
    """File descriptors of all programs. Maps are made and pinned on the way, or taken from their pins."""
    os.environ["BCC_KERNEL_SOURCE"] = str(tree)
    folder = Path(spec.sources)
    text = sources.flattened(folder)
    said: list[str] = []
    try:
        with _heard(said):
            module = bcc.BPF(text=text, cflags=list(spec.flags))
    except Exception as error:
        reason = next((line for line in said if "error:" in line), _one_line(error))
        raise LoadError(f"cannot compile {folder / 'qpd.c'} with the headers in {tree}: {reason}") from error
    programs = {}
    for name in PROGRAMS:
        try:
            with _heard(said):
                programs[name] = module.load_func(name, bcc.BPF.SCHED_CLS).fd
        except Exception as error:  # noqa: PERF203 - three programs, once
            reason = next((line for line in reversed(said) if _is_verdict(line)), "see the debug log")
            raise LoadError(f"the kernel rejects the program {name}: {_one_line(error)}: {reason}") from error
    return programs


@contextlib.contextmanager
def _heard(lines: list[str]) -> Iterator[None]:
    """Keep what bcc's libraries write to file descriptor 2 in ``lines``, and pass it on."""
    own = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            octets = file.read()
            lines[:] = [line.strip() for line in octets.decode(errors="replace").splitlines() if line.strip()]
            os.write(2, octets)


def _is_verdict(line: str) -> bool:
    """Whether a line of the verifier's log gives a reason: neither an instruction, nor a register dump, nor a sum."""
    return not re.match(r"(\d+:|;|R\d|from |processed |verification time|stack depth|HINT|bpf: )", line)


def _pin(pins: Pins, programs: dict[str, int], fingerprint: str) -> None:
    """Put the programs where the old ones are, by rename: there is no moment without."""
    pins.forget_made()
    for name, fd in programs.items():
        temporary = pins.directory / f"{name}-{os.getpid()}"
        bpf.obj_pin(fd, temporary)
        temporary.rename(pins.directory / name)
    pins.note_made(fingerprint)


def _uses_pinned_maps(pins: Pins, program: str) -> bool:
    """False where somebody has unpinned a map, and the program counts into one that nobody else can open."""
    fd = bpf.obj_get(pins.directory / program)
    try:
        used = set(bpf.prog_info(fd).map_ids)
    finally:
        os.close(fd)
    pinned = set()
    for name in MAPS:
        if not pins.map(name).exists():
            return False
        fd = bpf.obj_get(pins.map(name))
        try:
            pinned.add(bpf.map_info(fd).id)
        finally:
            os.close(fd)
    return used <= pinned


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> int:
    """Read a Spec, write a Result; 0 where the classifier is loaded and pinned."""
    # bcc and clang write to stdout, too: keep it for the result.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        result = load(Spec(**json.load(sys.stdin)))
    except LoadError as error:
        result = Result(error=str(error))
    json.dump(asdict(result), out)
    out.close()
    return 1 if result.error else 0


if __name__ == "__main__":
    sys.exit(main())
