"""Network namespaces: made and removed by name, entered by a thread, with sockets that stay inside.

A process enters with `nsenter --net` and not with `ip netns exec`: the latter mounts a fresh /sys, where bpffs is
missing (ip-netns(8)).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qpd.lab.errors import LabError

DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000

_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


_DELETE_TRIES = 40


def path(name: str) -> Path:
    """Where iproute2 keeps the namespace."""
    return DIRECTORY / name


def exists(name: str) -> bool:
    """True where something of that name is there, mounted or left half made."""
    return path(name).exists()


def add(name: str) -> None:
    """Make the namespace, with its loopback up."""
    run(["ip", "netns", "add", name])
    run(["ip", "-n", name, "link", "set", "lo", "up"])


def delete(name: str) -> None:
    """Remove the namespace and the devices in it; nothing happens where it is not there."""
    for _ in range(_DELETE_TRIES):
        if not exists(name):
            return
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        # What a crash between iproute2's open() and mount() leaves is a plain file.
        if exists(name) and not path(name).is_mount():
            path(name).unlink(missing_ok=True)
        if exists(name):  # busy: an interrupted `ip netns add` has not ended yet
            time.sleep(0.05)


def enter(name: str, command: Sequence[str]) -> list[str]:
    """The argument vector that runs `command` inside; nsenter replaces itself, so its pid is the command's."""
    return ["nsenter", f"--net={path(name)}", "--", *command]


def members(names: Iterable[str]) -> list[int]:
    """The processes that live in any of these namespaces, oldest first."""
    wanted = set()
    for name in names:
        try:
            status = path(name).stat()
        except OSError:
            continue
        wanted.add((status.st_dev, status.st_ino))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "ns/net").stat()
            except OSError:  # gone meanwhile, or a zombie
                continue
            if (status.st_dev, status.st_ino) in wanted:
                found.append(int(entry.name))
    return sorted(found)


def inside(name: str, function: Callable[[], _T]) -> _T:
    """Call `function` in a thread of its own that is inside the namespace, and return its result.

    A socket that `function` makes and returns stays in the namespace and is used from anywhere.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            descriptor = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                    error = ctypes.get_errno()
                    raise OSError(error, f"setns to {name}: {os.strerror(error)}")
            finally:
                os.close(descriptor)
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name=f"inside-{name}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def set_sysctls(name: str, values: Iterable[tuple[str, str]]) -> list[str]:
    """Write sysctls inside the namespace; returns the keys that this kernel does not have."""

    def write() -> list[str]:
        missing = []
        for key, value in values:
            file = Path("/proc/sys") / key.replace(".", "/")
            try:
                file.write_text(value, encoding="ascii")
            except FileNotFoundError:
                missing.append(key)
        return missing

    return inside(name, write)


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool and return its output; raises LabError with the tool's own words where it fails."""
    if shutil.which(command[0]) is None:
        raise LabError(f"{command[0]} is not installed; install the distribution's package that has it")
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())
        raise LabError(f"{' '.join(command)}: {words or f'exit status {done.returncode}'}")
    return done
