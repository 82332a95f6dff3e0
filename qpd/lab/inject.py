"""Faults, done to a lab and undone: one by one, or as a schedule says.

What is about to be done is written into the lab's directory first, so that another process can undo what a killed one
has left (`Injector.recover`).
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import singledispatchmethod
from pathlib import Path
from typing import Any

from qpd.lab import faults, frr, rtnetlink, wan
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.faults import Fault, Schedule, Step
from qpd.lab.processes import Identity, end
from qpd.lab.topology import Endpoint, Link

_PATIENCE = 90.0
"""Seconds for a router's FRR to start."""

OnStep = Callable[[Step, int, int], None]
"""Called after each step with it and two readings of time.monotonic_ns(): when it began, and when it was done."""


class Injector:
    """Does faults to a lab, and undoes on exit those that are still there."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self._journal = Journal(fabric.state.directory / "faults")
        self._active: list[Fault] = []

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    @property
    def active(self) -> tuple[Fault, ...]:
        """The faults that this object has begun and not ended, oldest first."""
        return tuple(self._active)

    def begin(self, fault: Fault) -> None:
        """Do it. Blocks until it is done.

        Raises:
            LabError: where the lab has no such link, node or daemon, another fault holds the same, the daemon does
                not run, or this kernel cannot do it; nothing is done then.
        """
        claims = fault.claims(self.fabric.topology)
        for other in self._active:
            if shared := faults.shared(claims, other.claims(self.fabric.topology)):
                raise LabError(f"{fault}: {other} holds {shared} already")
        if problem := self._impossible(fault):
            raise LabError(f"{fault}: {problem}")
        self._active.append(fault)
        self._journal.write(fault)
        self._do(fault)

    def end(self, fault: Fault) -> None:
        """Undo it. Blocks until what it held is as before; routes and sessions come back later by themselves."""
        self._undo(fault)
        self._journal.forget(fault)
        self._active.remove(fault)

    def undo(self) -> None:
        """Undo all that is still there, the last first; one that cannot be undone does not keep the others."""
        problems = []
        for fault in reversed(self._active):
            try:
                self.end(fault)
            except (LabError, OSError) as error:  # noqa: PERF203 - the others shall be undone
                problems.append(f"{fault}: {error}")
        if problems:
            raise LabError(f"not undone: {'; '.join(problems)}")

    def recover(self) -> list[Fault]:
        """Undo what a process that is no more has left, and return it."""
        found = self._journal.read()
        for fault in reversed(found):
            self._undo(fault)
            self._journal.forget(fault)
        return found

    def _impossible(self, fault: Fault) -> str | None:
        """Why it cannot be done now; None where it can."""
        if isinstance(fault, faults.Delay):
            return wan.missing()
        if isinstance(fault, faults.Stop | faults.Kill | faults.Hang) and self._daemon(fault) is None:
            return "it does not run"
        return None

    # -- each fault ----------------------------------------------------------------------------------------------

    @singledispatchmethod
    def _do(self, fault: Fault) -> None:
        raise NotImplementedError(fault)

    @singledispatchmethod
    def _undo(self, fault: Fault) -> None:
        raise NotImplementedError(fault)

    @_do.register
    def _(self, fault: faults.Cut) -> None:
        self._set_up([self._link(fault.link).cut_at(fault.side)], up=False)

    @_undo.register
    def _(self, fault: faults.Cut) -> None:
        self._set_up([self._link(fault.link).cut_at(fault.side)], up=True)

    @_do.register
    def _(self, fault: faults.Partition) -> None:
        self._set_up([link.a for link in fault.links(self.fabric.topology)], up=False)

    @_undo.register
    def _(self, fault: faults.Partition) -> None:
        self._set_up([link.a for link in fault.links(self.fabric.topology)], up=True)

    @_do.register
    def _(self, fault: faults.Loss) -> None:
        self.fabric.lose(self._link(fault.link), fault.towards, fault.percent / 100)

    @_undo.register
    def _(self, fault: faults.Loss) -> None:
        self.fabric.stop_losing(self._link(fault.link), fault.towards)

    @_do.register
    def _(self, fault: faults.Delay) -> None:
        for port in self._link(fault.link).senders(fault.towards):
            self.fabric.apply_shape(port, self.fabric.shape(port).later(fault.ms, fault.jitter_ms))

    @_undo.register
    def _(self, fault: faults.Delay) -> None:
        for port in self._link(fault.link).senders(fault.towards):
            self.fabric.apply_shape(port, self.fabric.shape(port))

    @_do.register
    def _(self, fault: faults.Reboot) -> None:
        for daemon in self._daemons(fault.node):
            self._send(fault.node, daemon, signal.SIGKILL)
        self._set_up(self._ports(fault.node), up=False)

    @_undo.register
    def _(self, fault: faults.Reboot) -> None:
        self._set_up(self._ports(fault.node), up=True)
        frr.bring_up([self.fabric.router(fault.node)], time.monotonic() + _PATIENCE)
        if faults.QPD in self._daemons(fault.node):
            self.fabric.start_daemon(fault.node, faults.QPD)

    @_do.register
    def _(self, fault: faults.Stop) -> None:
        if (identity := self._daemon(fault)) is not None:
            end([identity], grace=10.0)

    @_do.register
    def _(self, fault: faults.Kill) -> None:
        self._send(fault.node, fault.daemon, signal.SIGKILL)

    @_undo.register(faults.Stop)
    @_undo.register(faults.Kill)
    def _(self, fault: faults.Stop | faults.Kill) -> None:
        self.fabric.start_daemon(fault.node, fault.daemon)

    @_do.register
    def _(self, fault: faults.Hang) -> None:
        self._send(fault.node, fault.daemon, signal.SIGSTOP)

    @_undo.register
    def _(self, fault: faults.Hang) -> None:
        self._send(fault.node, fault.daemon, signal.SIGCONT)

    # -- what they are made of -----------------------------------------------------------------------------------

    def _link(self, words: str) -> Link:
        return self.fabric.link(*words.split())

    def _ports(self, node: str) -> list[Endpoint]:
        return [link.end(node) for link in self.fabric.topology.links_of(node)]

    def _set_up(self, ports: list[Endpoint], *, up: bool) -> None:
        by_node: dict[str, list[Endpoint]] = {}
        for port in ports:
            by_node.setdefault(port.node, []).append(port)
        for node, own in by_node.items():
            with rtnetlink.Socket(self.fabric.namespace(node)) as netlink:
                for port in own:
                    netlink.set_up(port.interface, up=up)

    def _daemons(self, node: str) -> list[str]:
        """FRR's daemons in the order of their start, and qpd where it has been started."""
        names = list(self.fabric.router(node).daemons())
        return [*names, faults.QPD] if self.fabric.sidecar(node).config.exists() else names

    def _daemon(self, fault: faults.Stop | faults.Kill | faults.Hang) -> Identity | None:
        return self.fabric.records.find(f"{fault.node}.{fault.daemon}")

    def _send(self, node: str, daemon: str, number: int) -> None:
        """Send a daemon a signal; nothing happens where it has ended. A killed one is gone when this returns."""
        identity = self.fabric.records.find(f"{node}.{daemon}")
        if identity is not None and identity.send(number) and number == signal.SIGKILL:
            end([identity])


class Journal:
    """The faults that are there, one file each, in a directory of the lab."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, fault: Fault) -> None:
        """Note a fault that is about to be done."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._file(fault)
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(fault.to_yaml()), encoding="utf-8")
        temporary.replace(file)

    def forget(self, fault: Fault) -> None:
        """Note that a fault is undone."""
        self._file(fault).unlink(missing_ok=True)

    def read(self) -> list[Fault]:
        """The faults that are noted, oldest first."""
        files = sorted(self.directory.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return [faults.parse_fault(_mapping(file), str(file)) for file in files]

    def _file(self, fault: Fault) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in str(fault))
        return self.directory / f"{name}.json"


def _mapping(file: Path) -> Mapping[str, Any]:
    raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise LabError(f"{file}: expected a mapping; remove the file")
    return raw


def _unheard(_step: Step, _began: int, _done: int) -> None:
    """Nobody wants to know."""


def play(
    schedule: Schedule,
    injector: Injector,
    *,
    on_step: OnStep = _unheard,
    stop: threading.Event | None = None,
    start: float | None = None,
) -> None:
    """Do and undo what the schedule says, at its times; blocks until its last step, or until `stop` is set.

    Faults that last to the end, and all others after `stop` or an exception, stay with the injector: leaving its
    `with` block undoes them.

    Args:
        schedule: checked against the injector's fabric before anything is done.
        injector: does the faults.
        on_step: told of each step when it is done.
        stop: ends the waiting, from another thread.
        start: the schedule's second 0 as a reading of time.monotonic(); now, where it is None.

    Raises:
        LabError: where the schedule does not fit the lab, or a step fails.
    """
    schedule.check(injector.fabric.topology)
    start = time.monotonic() if start is None else start
    halt = stop or threading.Event()
    for step in schedule.steps:
        if halt.wait(max(0.0, start + step.at - time.monotonic())):
            return
        began = time.monotonic_ns()
        (injector.begin if step.begins else injector.end)(step.fault)
        on_step(step, began, time.monotonic_ns())


async def play_async(
    schedule: Schedule, injector: Injector, *, on_step: OnStep = _unheard, start: float | None = None
) -> None:
    """`play`, in a thread of its own; where it is cancelled, the step that is under way is done first.

    `on_step` is called in that thread.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(
        asyncio.to_thread(play, schedule, injector, on_step=on_step, stop=stop, start=start)
    )
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await task
        raise
