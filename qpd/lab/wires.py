"""Makes veth pairs behave as wires: what the sender knew of a packet, beyond its bytes, does not cross them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qpd.kernel import bpf
from qpd.lab import namespaces, programs


def make(interfaces: Mapping[str, Sequence[str]], pins: Path) -> None:
    """Let interfaces (by namespace) forget the hash of what arrives: by TCX, or by clsact before kernel 6.6.

    Args:
        interfaces: the underlay interfaces of each namespace.
        pins: a directory in bpffs that is the lab's own; nothing stays in it.
    """
    program = programs.load_forget_hash()
    try:
        for namespace, names in interfaces.items():
            if not namespaces.inside(namespace, partial(programs.attach_forget_hash, program, names)):
                attach_clsact(program, namespace, names, pins)
    finally:
        os.close(program)


def attach_clsact(program: int, namespace: str, interfaces: Sequence[str], pins: Path) -> None:
    """Attach the program as the first ingress filter; it lives and dies with the interface."""
    pins.mkdir(parents=True, exist_ok=True)
    name = pins / "forget_hash"
    # tc takes a program by its name in bpffs only; the filter keeps the program when the name is gone.
    bpf.obj_pin(program, name)
    try:
        lines = []
        for interface in interfaces:
            lines += [
                f"qdisc replace dev {interface} clsact",
                f"filter add dev {interface} ingress pref 1 bpf direct-action object-pinned {name}",
            ]
        namespaces.run(namespaces.enter(namespace, ["tc", "-batch", "-"]), input="\n".join(lines) + "\n")
    finally:
        name.unlink()
