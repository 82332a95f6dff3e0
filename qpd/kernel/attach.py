"""Puts the classifier's two programs on interfaces, by TCX where the kernel has it, else by clsact filters."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qpd.kernel import clsact, tcx
from qpd.kernel.pins import Pins, every_version
from qpd.model import Hook

Mode = Literal["tcx", "clsact"]
Wish = Literal["auto", "tcx", "clsact"]


class AttachError(Exception):
    """The classifier could not be put on an interface: one line that says which and why."""


class InterfaceGoneError(AttachError):
    """The interface does not exist (any more)."""


def choose_mode(wish: Wish) -> Mode:
    """The mode that ``bpf.attach`` means on this kernel. Raises AttachError where it is not to be had."""
    if wish == "clsact":
        return "clsact"
    try:
        supported = tcx.supported()
    except PermissionError as error:
        raise AttachError(
            f"not allowed to look at TCX hooks ({error.strerror}): qpd needs CAP_NET_ADMIN"
        ) from error
    if supported:
        return "tcx"
    if wish == "tcx":
        raise AttachError(
            "bpf.attach is tcx, but this kernel has no TCX hooks (Linux 6.6 has): set auto or clsact"
        )
    return "clsact"


class Attacher:
    """Keeps both programs on interfaces. ``programs``: open file descriptors, which the caller closes."""

    def __init__(self, pins: Pins, programs: Mapping[Hook, int], mode: Mode) -> None:
        self.mode: Mode = mode
        self._pins = pins
        self._programs = programs

    def attach(self, ifindex: int, name: str) -> None:
        """Put the programs on, or replace ours there in one step; idempotent. Raises AttachError.

        What an earlier daemon put there in the other mode or with another layout goes away after that: for a moment
        a packet may meet both, never none.
        """
        try:
            for hook in Hook:
                if self.mode == "tcx":
                    tcx.attach(self._pins, ifindex, hook, self._programs[hook])
                else:
                    clsact.attach(self._pins, ifindex, hook, self._programs[hook])
        except OSError as error:
            where = f"{name} (ifindex {ifindex})"
            if error.errno in {errno.ENODEV, errno.ENXIO}:
                raise InterfaceGoneError(f"interface {where} does not exist any more") from error
            raise AttachError(f"cannot attach the classifier to {where} by {self.mode}: {error}") from error
        self._remove_other_mode(ifindex)
        for older in self._pins.others():
            _detach(older, ifindex)

    def detach(self, ifindex: int) -> bool:
        """Take the programs off; False: they were not there. The interface may be gone."""
        return _detach(self._pins, ifindex)

    def attached(self) -> dict[int, Mode]:
        """Interfaces that carry both programs, and how."""
        found: dict[int, Mode] = {}
        for ifindex in self._pins.linked():
            if all(tcx.is_attached(self._pins, ifindex, hook) for hook in Hook):
                found[ifindex] = "tcx"
        for ifindex in self._pins.filtered() - found.keys():
            if all(clsact.is_attached(ifindex, hook) for hook in Hook):
                found[ifindex] = "clsact"
        return found

    def forget_gone(self) -> list[int]:
        """Remove what is left of interfaces that were deleted; gives their indices."""
        present = self.attached()
        gone = sorted((self._pins.linked() | self._pins.filtered()) - present.keys())
        for ifindex in gone:
            _detach(self._pins, ifindex)
        return gone

    def _remove_other_mode(self, ifindex: int) -> None:
        for hook in Hook:
            if self.mode == "tcx" and self._pins.filter(ifindex, hook).exists():
                clsact.detach(self._pins, ifindex, hook)
            if self.mode == "clsact":
                tcx.detach(self._pins, ifindex, hook)


def detach_all(pin_dir: str | Path) -> list[int]:
    """Remove every trace of every layout version: links, filters, qdiscs of ours, programs, maps, folders.

    Gives the interfaces that carried the classifier. Needs no daemon, no bcc; raises OSError.
    """
    interfaces: set[int] = set()
    for pins in every_version(pin_dir):
        for ifindex in pins.linked() | pins.filtered():
            if _detach(pins, ifindex):
                interfaces.add(ifindex)
        pins.remove()
    # Filters whose notes are lost: bpffs was unmounted, or emptied by hand.
    for ifindex in clsact.interfaces_with_filters():
        interfaces.add(ifindex)
        for hook in Hook:
            clsact.detach(Pins.of(pin_dir), ifindex, hook)
    return sorted(interfaces)


def _detach(pins: Pins, ifindex: int) -> bool:
    removed = False
    for hook in Hook:
        removed |= tcx.detach(pins, ifindex, hook)
        if pins.filter(ifindex, hook).exists():
            removed |= clsact.detach(pins, ifindex, hook)
    return removed
