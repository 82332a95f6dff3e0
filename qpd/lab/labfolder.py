"""A generated lab as a folder: written, with the nodes' scripts where the folder has none beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qpd.lab import description, generate, scripts
from qpd.lab.errors import LabError

_BESIDE = "../common"


def make(source: Path, folder: Path | None = None, *, force: bool = False) -> tuple[str, Path]:
    """Write the lab that the description in `source` asks for.

    Args:
        source: the description.
        folder: where it goes; by default the lab's name beside the description, or the description's own folder
            where that is a lab's already.
        force: replace the files of a lab that is there.

    Returns:
        What it consists of, in one line, and where it is.

    Raises:
        LabError: where the description is wrong, or the folder holds something else.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise LabError(f"{source}: {error.strerror}; give a YAML file with `name` and `sites`") from error
    lab = description.parse(text, str(source))
    if folder is None:
        own = source.name == description.DESCRIPTION
        folder = source.parent if own else source.parent / lab.name
    beside = all((folder / _BESIDE / name).exists() for name in scripts.NAMES)
    monitoring = beside and (folder / _BESIDE / generate.DASHBOARD).exists()
    files = generate.files(lab, _BESIDE if beside else "common", monitoring=monitoring)
    there = [name for name in files if (folder / name).exists() and folder / name != source]
    if there and not force:
        raise LabError(
            f"{folder / there[0]} is there already; give another folder, or --force to replace the lab"
        )
    for name, content in files.items():
        _write(folder / name, content)
    if not beside:
        for name in scripts.NAMES:
            (folder / "common").mkdir(exist_ok=True)
            shutil.copy(scripts.find(name), folder / "common" / name)
    routers = sum(site.spines + site.leaves for site in lab.sites)
    hosts = sum(site.leaves * site.hosts for site in lab.sites)
    links = sum(site.leaves * (site.uplinks + site.hosts) for site in lab.sites) + sum(
        w.links for w in lab.wans
    )
    return f"{routers} routers, {hosts} hosts, {links} links", folder


def _write(file: Path, content: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise LabError(f"{file}: {error.strerror}; give a folder that can be written") from error
