"""The classifier on TCX links (Linux 6.6 and later): pinned, so that they outlive the daemon, and replaced in one step.

The link is put before others' programs: none of them can end the chain before qpd has seen the packet. Those behind it
are run as before, since qpd returns TCX_NEXT; what it redirects meets them on the uplink by which it leaves.
"""

from __future__ import annotations

import contextlib
import errno
import os

from qpd.kernel import bpf
from qpd.kernel.pins import Pins
from qpd.model import Hook

_ATTACH_TYPES = {Hook.STEER: bpf.AttachType.TCX_EGRESS, Hook.OBSERVE: bpf.AttachType.TCX_INGRESS}
_LOOPBACK = 1


def supported() -> bool:
    """Whether this kernel has TCX hooks. Raises PermissionError without CAP_NET_ADMIN."""
    try:
        bpf.prog_query(_LOOPBACK, bpf.AttachType.TCX_EGRESS)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
            return False
        raise
    return True


def attach(pins: Pins, ifindex: int, hook: Hook, prog_fd: int) -> None:
    """Make ``prog_fd`` the program of our link on this hook; idempotent. Raises OSError (ENODEV: no such interface)."""
    pin = pins.link(ifindex, hook)
    pin.parent.mkdir(exist_ok=True)
    if pin.exists():
        link = bpf.obj_get(pin)
        try:
            info = bpf.link_info(link)
            if info.ifindex == ifindex:
                if info.prog_id != bpf.prog_info(prog_fd).id:
                    bpf.link_update(link, prog_fd)
                return
        finally:
            os.close(link)
        # The interface was deleted, and one with the same index made: the link hangs in the air.
        pin.unlink()
    link = bpf.link_create(prog_fd, ifindex, _ATTACH_TYPES[hook], first=True)
    try:
        bpf.obj_pin(link, pin)
    finally:
        os.close(link)


def detach(pins: Pins, ifindex: int, hook: Hook) -> bool:
    """Take our link off, whoever else holds it; False: there was none. The interface may be gone."""
    pin = pins.link(ifindex, hook)
    if not pin.exists():
        return False
    link = bpf.obj_get(pin)
    try:
        with contextlib.suppress(OSError):  # ENOLINK and its like: the interface is gone
            bpf.link_detach(link)
    finally:
        os.close(link)
    pin.unlink(missing_ok=True)
    return True


def is_attached(pins: Pins, ifindex: int, hook: Hook) -> bool:
    """Whether our link is on that interface (and not left over from a deleted one)."""
    pin = pins.link(ifindex, hook)
    if not pin.exists():
        return False
    link = bpf.obj_get(pin)
    try:
        return bpf.link_info(link).ifindex == ifindex
    finally:
        os.close(link)
