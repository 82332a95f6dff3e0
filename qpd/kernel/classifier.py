"""The classifier as the daemon sees it: loaded in a child process, then attached by what that left pinned."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import structlog

import qpd
from qpd.kernel import bpf, loader
from qpd.kernel.attach import Attacher, AttachError, InterfaceGoneError, Mode, Wish, choose_mode, detach_all
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.kernel.ring import Ring
from qpd.kernel.sources import SourcesMissingError
from qpd.kernel.table import LayoutMismatchError
from qpd.kernel.tell import Teller
from qpd.model import Hook

__all__ = ["AttachError", "Classifier", "ClassifierError", "InterfaceGoneError", "detach_all"]

_log = structlog.get_logger(__name__)

_LOAD_TIMEOUT = 180.0
"""Seconds for a cold compile on a busy machine; half a second is usual."""
_LAST_LINES = 40


class ClassifierError(Exception):
    """The classifier could not be loaded: one line that says what, where and how to mend it."""


class BpfSettings(Protocol):
    """The section ``bpf`` of the settings."""

    @property
    def pin_dir(self) -> Path:
        """A folder in bpffs."""

    @property
    def attach(self) -> Wish:
        """How programs are attached."""

    @property
    def qps_max(self) -> int:
        """QPs remembered in each direction."""


class Classifier:
    """The loaded programs. Make it with ``load``; ``close`` leaves everything pinned and running."""

    def __init__(
        self, pins: Pins, attacher: Attacher, programs: dict[Hook, int], load_seconds: float
    ) -> None:
        self.pins = pins
        self.load_seconds = load_seconds
        """What compiling and loading took; near 0 where the pinned programs were current."""
        self._attacher = attacher
        self._programs = programs

    @classmethod
    async def load(cls, settings: BpfSettings, run_dir: Path, *, python: str = sys.executable) -> Classifier:
        """Load and pin the classifier, or take what is pinned where it was made from the same sources.

        ``run_dir``: a folder for merged kernel headers (the API socket's). Raises ClassifierError.
        """
        begun = time.monotonic()
        try:
            spec = loader.Spec(str(settings.pin_dir), settings.qps_max, str(run_dir))
        except SourcesMissingError as error:
            raise ClassifierError(str(error)) from error
        if not await asyncio.to_thread(_is_current, spec):
            await _load_in_child(spec, python)
        programs: dict[Hook, int] = {}
        try:
            mode = choose_mode(settings.attach)
            for hook in Hook:
                programs[hook] = bpf.obj_get(spec.pins.program(hook))
        except (AttachError, OSError) as error:
            _close(programs)
            raise ClassifierError(str(error)) from error
        attacher = Attacher(spec.pins, programs, mode)
        return cls(spec.pins, attacher, programs, time.monotonic() - begun)

    @property
    def mode(self) -> Mode:
        """How programs are attached here."""
        return self._attacher.mode

    def open_maps(self) -> Maps:
        """The pinned maps, for the caller to close. Raises ClassifierError."""
        try:
            return Maps(self.pins.directory)
        except (OSError, LayoutMismatchError) as error:
            raise ClassifierError(f"cannot open the pinned maps: {error}") from error

    def open_teller(self) -> Teller:
        """The program that sets fields of a QP's entry, for the caller to close. Raises ClassifierError."""
        try:
            return Teller(self.pins.tell)
        except OSError as error:
            raise ClassifierError(f"cannot open the pinned program: {error}") from error

    def open_ring(self) -> Ring:
        """The pinned ring of events, for the caller to close. Raises ClassifierError."""
        try:
            return Ring(self.pins.map("events"))
        except (OSError, LayoutMismatchError) as error:
            raise ClassifierError(f"cannot open the pinned ring of events: {error}") from error

    def program(self, hook: Hook) -> int:
        """A program's file descriptor, open until ``close``."""
        return self._programs[hook]

    async def attach(self, ifindex: int, name: str) -> None:
        """Put both programs on an interface, or replace ours there in one step.

        Idempotent. Raises InterfaceGoneError or AttachError.
        """
        await asyncio.to_thread(self._attacher.attach, ifindex, name)

    async def detach(self, ifindex: int, name: str) -> None:
        """Take both programs off an interface, which may be gone. Raises AttachError."""
        try:
            await asyncio.to_thread(self._attacher.detach, ifindex)
        except OSError as error:
            raise AttachError(
                f"cannot take the classifier off {name} (ifindex {ifindex}): {error}"
            ) from error

    async def attached(self) -> dict[int, Mode]:
        """Interfaces that carry both programs, and how: by this daemon or an earlier one."""
        return await asyncio.to_thread(self._attacher.attached)

    async def forget_gone(self) -> list[int]:
        """Remove the pins of interfaces that were deleted; gives their indices."""
        return await asyncio.to_thread(self._attacher.forget_gone)

    def close(self) -> None:
        """Close file descriptors; programs and maps go on without this process."""
        _close(self._programs)


def _is_current(spec: loader.Spec) -> bool:
    """Whether there is nothing to load. A doubt (permissions, sizes) is the child's to explain."""
    try:
        loader.check_maps(spec)
        return loader.is_current(spec)
    except (OSError, LayoutMismatchError):
        return False


async def _load_in_child(spec: loader.Spec, python: str) -> None:
    """Run the loader to its end. Raises ClassifierError."""
    package = str(Path(qpd.__file__).parent.parent)
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        child = await asyncio.create_subprocess_exec(
            python,
            "-m",
            "qpd.kernel.loader",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search},
        )
    except OSError as error:
        raise ClassifierError(f"cannot start the loader ({python} -m qpd.kernel.loader): {error}") from error
    try:
        out, messages = await asyncio.wait_for(
            child.communicate(json.dumps(asdict(spec)).encode()), _LOAD_TIMEOUT
        )
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise ClassifierError(
            f"compiling the classifier took over {_LOAD_TIMEOUT:.0f} s: is the CPU busy?"
        ) from error
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    lines = messages.decode(errors="replace").splitlines()
    for line in lines[-_LAST_LINES:]:
        _log.debug("loader", line=line)
    try:
        result = loader.Result(**json.loads(out))
    except (ValueError, TypeError) as error:
        raise ClassifierError(
            f"the loader {_ending(child.returncode)} without a result: {_last(lines)}"
        ) from error
    if result.error:
        raise ClassifierError(result.error)
    _log.debug("classifier loaded", headers=result.headers, seconds=round(result.seconds, 3))


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name} (out of memory?)"
    return f"ended with status {status}"


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _close(programs: dict[Hook, int]) -> None:
    for fd in programs.values():
        os.close(fd)
    programs.clear()
