"""Kernel headers for bcc: finds some, and merges them into one tree of symbolic links.

The classifier includes nothing but ``uapi/linux``, so any kernel's headers of this architecture will do; the running
kernel's come first. bcc takes one tree, but distributions split theirs (Debian: ``-common`` and ``-amd64``; Ubuntu:
``linux-headers-X`` and ``linux-headers-X-generic``), in parts that refer to each other through make only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
_PACKAGES = {
    ("debian", "x86_64"): "linux-headers-amd64",
    ("debian", "aarch64"): "linux-headers-arm64",
    ("ubuntu", "x86_64"): "linux-headers-generic",
    ("ubuntu", "aarch64"): "linux-headers-generic",
}
_CONFIGURATION = "include/generated/autoconf.h"
"""Only a configured tree has it: the flavour's half of a split pair."""


class HeadersMissingError(Exception):
    """No usable kernel headers: one line that names the package to install."""


@dataclass(frozen=True, slots=True)
class System:
    """The machine whose headers are wanted; ``root`` is its file system, so that tests can make one."""

    root: Path = Path("/")
    release: str = os.uname().release
    machine: str = platform.machine()

    @property
    def architecture(self) -> str:
        """The kernel's name of the machine (``arch/*``)."""
        return _ARCHITECTURES.get(self.machine, self.machine)

    def needed(self) -> tuple[str, ...]:
        """Files that a usable tree has."""
        return (
            _CONFIGURATION,
            "include/linux/kconfig.h",
            "include/uapi/linux/bpf.h",
            f"arch/{self.architecture}/include/uapi/asm/byteorder.h",
            f"arch/{self.architecture}/include/generated/uapi/asm/types.h",
        )


def find(cache: Path, system: System | None = None) -> Path:
    """A complete tree of headers; where it must be put together, that is done once, below ``cache``.

    Raises HeadersMissingError, or OSError where ``cache`` cannot be written.
    """
    system = system or System()
    for parts in _candidates(cache, system):
        if all(any((part / name).exists() for part in parts) for name in system.needed()):
            whole = next(
                (part for part in parts if all((part / name).exists() for name in system.needed())), None
            )
            return whole or _merged(cache, parts, system)
    raise HeadersMissingError(
        f"no kernel headers for {system.machine} in /lib/modules/{system.release}/build, "
        f"/sys/kernel/kheaders.tar.xz or /usr/src: {_advice(system)}"
    )


def forget(cache: Path) -> None:
    """Remove what ``find`` put below ``cache``."""
    for pattern in ("headers-*", "kheaders-*", ".making-*"):
        for tree in cache.glob(pattern):
            shutil.rmtree(tree, ignore_errors=True)


def _candidates(cache: Path, system: System) -> Iterator[list[Path]]:
    """Sets of folders that together may be a tree, the best first."""
    modules = system.root / "lib/modules" / system.release
    running = [path.resolve() for path in (modules / "build", modules / "source") if path.is_dir()]
    sources = system.root / "usr/src"
    if running:
        yield running + _partners(running[0], sources)
    if (archive := system.root / "sys/kernel/kheaders.tar.xz").is_file():
        yield [_unpacked(archive, cache, system)]
    flavours = [path for path in sources.glob("*headers-*") if (path / _CONFIGURATION).is_file()]
    for flavour in sorted(flavours, key=lambda path: _version(path.name), reverse=True):
        yield [flavour.resolve(), *_partners(flavour, sources)]


def _partners(flavour: Path, sources: Path) -> list[Path]:
    """The common parts of the same version: ``linux-headers-6.1.0-1-common`` of ``linux-headers-6.1.0-1-amd64``."""
    own = _series(flavour.name)
    found = []
    for path in sources.glob("*headers-*"):
        series = re.sub(r"-common(-\w+)?$", "", _series(path.name))
        if own.startswith(f"{series}-") and not (path / _CONFIGURATION).exists():
            found.append(path.resolve())
    # The most specific first: -common-rt before -common.
    return sorted(found, key=lambda path: len(path.name), reverse=True)


def _series(name: str) -> str:
    """What follows ``headers-``: Ubuntu's ``linux-hwe-6.8-headers-6.8.0-40`` and its like have a longer front."""
    return name.partition("headers-")[2]


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", _series(name)))


def _merged(cache: Path, parts: list[Path], system: System) -> Path:
    """One tree of links to all parts; the parts named first win."""
    key = hashlib.sha256(
        "\0".join(f"{part} {part.stat().st_mtime_ns}" for part in parts).encode()
    ).hexdigest()[:12]
    tree = cache / f"headers-{key}"
    if all((tree / name).exists() for name in system.needed()):
        return tree
    with _Workshop(cache, tree) as made:
        for folder in ("include", f"arch/{system.architecture}/include"):
            _overlay(made / folder, [part / folder for part in parts])
    return tree


def _overlay(target: Path, sources: list[Path]) -> None:
    """Link each entry of the sources; go down where several have the same folder."""
    target.mkdir(parents=True)
    entries: dict[str, list[Path]] = {}
    for source in sources:
        if source.is_dir():
            for path in source.iterdir():
                resolved = path.resolve()
                if resolved not in entries.setdefault(path.name, []):
                    entries[path.name].append(resolved)
    for name, paths in entries.items():
        if len(paths) > 1 and all(path.is_dir() for path in paths):
            _overlay(target / name, paths)
        else:
            (target / name).symlink_to(paths[0])


def _unpacked(archive: Path, cache: Path, system: System) -> Path:
    """The running kernel's own headers (CONFIG_IKHEADERS), unpacked once a release."""
    tree = cache / f"kheaders-{system.release}"
    if not tree.is_dir():
        with _Workshop(cache, tree) as made, tarfile.open(archive, "r:xz") as contents:
            made.mkdir()
            if guard := getattr(tarfile, "data_filter", None):  # Python 3.12; late releases of 3.10 and 3.11
                contents.extraction_filter = guard
            contents.extractall(made)  # noqa: S202 - the running kernel itself wrote it
    return tree


class _Workshop:
    """A folder that takes its final name only when it is complete; another process may have been faster."""

    def __init__(self, cache: Path, final: Path) -> None:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
        self._final = final

    def __enter__(self) -> Path:
        return self._folder / "tree"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._final, ignore_errors=True)
            (self._folder / "tree").rename(self._final)
        shutil.rmtree(self._folder, ignore_errors=True)


def _advice(system: System) -> str:
    """Which package to install on this distribution."""
    fields = {}
    for name in ("etc/os-release", "usr/lib/os-release"):
        if (path := system.root / name).is_file():
            fields = dict(
                re.findall(r'^(\w+)="?([^"\n]*)"?$', path.read_text(encoding="utf-8"), re.MULTILINE)
            )
            break
    for distribution in [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]:
        if package := _PACKAGES.get((distribution, system.machine)):
            return f"install the package {package} (apt-get install {package})"
    return "install your distribution's package of kernel headers (Debian: linux-headers-amd64)"
