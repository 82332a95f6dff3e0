"""Where the classifier's C sources are, and what they say about themselves."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import qpd

_PACKAGE = Path(qpd.__file__).parent
_CANDIDATES = (_PACKAGE.parent / "ebpf", _PACKAGE / "_ebpf")
"""The repository's sources before those that were installed with the package: whoever edits them means them."""

_NUMBER = re.compile(r"^#define\s+(\w+)\s+(0[xX][0-9a-fA-F]+|\d+)\b", re.MULTILINE)


class SourcesMissingError(Exception):
    """The C sources are neither in the repository nor in the package."""


def directory() -> Path:
    """The folder with qpd.c and its headers. Raises SourcesMissingError."""
    for candidate in _CANDIDATES:
        if (candidate / "maps.h").is_file():
            return candidate
    where = " or ".join(str(candidate) for candidate in _CANDIDATES)
    raise SourcesMissingError(f"the classifier's sources (maps.h) are not in {where}: install qpd again")


def constants(folder: Path | None = None) -> dict[str, int]:
    """Every plain number that maps.h defines, by name."""
    text = ((folder or directory()) / "maps.h").read_text(encoding="utf-8")
    return {name: int(number, 0) for name, number in _NUMBER.findall(text)}


def layout_version(folder: Path | None = None) -> int:
    """QPD_LAYOUT of maps.h: part of every pin's path."""
    return constants(folder)["QPD_LAYOUT"]


def fingerprint(folder: Path, flags: tuple[str, ...]) -> str:
    """16 hexadecimal digits that change with any source file or compiler flag."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for flag in flags:
        digest.update(flag.encode() + b"\0")
    return digest.hexdigest()[:16]


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')


def flattened(folder: Path, name: str = "qpd.c") -> str:
    """One text of a file with each ``#include "…"`` replaced by that file, once, and #line for the compiler's messages.

    bcc turns ``map.lookup()`` into calls in its main text only, not in files that this includes.
    """
    seen: set[str] = set()

    def lines(file: str) -> list[str]:
        seen.add(file)
        result = [f'#line 1 "{file}"']
        for number, line in enumerate((folder / file).read_text(encoding="utf-8").splitlines(), 1):
            match = _INCLUDE.match(line)
            if match is None:
                result.append(line)
                continue
            if match[1] not in seen:
                result += lines(match[1])
            result.append(f'#line {number + 1} "{file}"')
        return result

    return "\n".join(lines(name)) + "\n"
