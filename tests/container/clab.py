"""containerlab itself, built from its module where a Go toolchain and the module proxy are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

MODULE = "github.com/srl-labs/containerlab"
VERSION = "v0.79.0"
"""The one whose schema is tests/data/clab.schema.json."""
BUILD = 540.0

_KERNEL_MODULES = Path("/proc/modules")


class UnavailableError(Exception):
    """Why containerlab cannot be had here, in one line."""


def build(work: Path) -> Path:
    """The binary, from an earlier session where there is one.

    Not `go install`: that asks the proxy for the list of all versions, which a mirror may refuse.

    Raises UnavailableError.
    """
    binary = work / f"containerlab-{VERSION}" / "containerlab"
    if binary.exists():
        return binary
    go = shutil.which("go", path=f"{os.environ['PATH']}:/usr/local/go/bin")
    if go is None:
        raise UnavailableError("containerlab needs Go to be built (1.21 or later): no go in PATH")
    binary.parent.mkdir(parents=True, exist_ok=True)
    module = json.loads(_run([go, "mod", "download", "-json", f"{MODULE}@{VERSION}"], binary.parent))
    source = binary.parent / "source"
    shutil.rmtree(source, ignore_errors=True)
    # The module cache is read-only, and so would be a copy.
    shutil.copytree(module["Dir"], source, copy_function=shutil.copyfile)
    for folder in (source, *(path for path in source.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    if not _KERNEL_MODULES.exists():
        # containerlab takes a kernel that was built without modules for a broken one.
        file = source / "utils/kernel_module.go"
        file.write_text(file.read_text().replace(f'"{_KERNEL_MODULES}"', f'"{os.devnull}"'))
    # Fetches what the build needs and no more: a mirror may not have the modules of its tests.
    _run([go, "list", "-deps", "-f=", "."], source)
    made = subprocess.run(
        [go, "build", "-trimpath", "-ldflags=-s -w", f"-o={binary}.part", "."],
        cwd=source,
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD,
    )
    assert made.returncode == 0, f"containerlab does not compile: {made.stderr[-300:]}"
    Path(f"{binary}.part").rename(binary)
    shutil.rmtree(source)
    return binary


def _run(command: list[str], directory: Path) -> str:
    """A command that needs the module proxy."""
    done = subprocess.run(
        command, cwd=directory, check=False, capture_output=True, text=True, timeout=BUILD, env=os.environ
    )
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()
        raise UnavailableError(f"containerlab cannot be built here: {last[-1] if last else command}")
    return done.stdout
