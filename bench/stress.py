"""A machine with other things to do: stress-ng on all processors, and many BFD sessions."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.figures import BenchError
from qpd.lab.fabric import Fabric

SESSIONS = 64
_PROFILE = "fabric"


@contextmanager
def stressed() -> Iterator[str]:
    """CPU and timer load on all processors for a ``with`` block; gives what runs, in words."""
    if shutil.which("stress-ng") is None:
        raise BenchError("stress-ng is not installed; apt-get install stress-ng")
    count = str(len(os.sched_getaffinity(0)))
    process = subprocess.Popen(
        ["stress-ng", "--cpu", count, "--timer", count, "--timer-freq", "10000", "--quiet"],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield f"stress-ng --cpu {count} --timer {count}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def many_sessions(fabric: Fabric, leaf: str, sessions: int = SESSIONS) -> Iterator[int]:
    """More BFD sessions on a leaf's uplinks, between addresses that carry nothing, up to this number in all."""
    links = fabric.topology.uplinks(leaf)
    missing = sessions - len(fabric.bfd_sessions(leaf))
    with ExitStack() as stack:
        for place, link in enumerate(links):
            count = missing // len(links) + (place < missing % len(links))
            near, far = link.end(leaf), link.other(leaf)
            pairs = [
                (f"198.18.{place}.{2 * number}", f"198.18.{place}.{2 * number + 1}")
                for number in range(count)
            ]
            for side, (end, at) in enumerate(((near, 0), (far, 1))):
                lines = [f"address add {pair[at]}/31 dev {end.interface}" for pair in pairs]
                _batch(fabric, end.node, lines)
                stack.callback(_batch, fabric, end.node, [line.replace(" add ", " del ") for line in lines])
                peers = [
                    f"peer {pair[1 - side]} local-address {pair[side]} interface {end.interface}"
                    for pair in pairs
                ]
                made = [word for peer in peers for word in (peer, f"profile {_PROFILE}", "exit")]
                fabric.vtysh(end.node, "configure terminal", "bfd", *made)
                stack.callback(
                    fabric.vtysh, end.node, "configure terminal", "bfd", *(f"no {peer}" for peer in peers)
                )
        yield sessions


def _batch(fabric: Fabric, node: str, lines: list[str]) -> None:
    done = subprocess.run(
        fabric.enter(node, "ip", "-batch", "-"),
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"{node}: ip -batch: {done.stderr.strip()}")
