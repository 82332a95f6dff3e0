"""Brings a fabric into the state that a condition of an experiment asks for, and back."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qpd import daemon
from qpd.lab import namespaces
from qpd.lab.errors import LabError
from qpd.lab.experiment.hostport import HostPorts
from qpd.lab.experiment.model import Condition, Limit
from qpd.lab.experiment.shelf import Shelf
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint, Link
from qpd.settings import load_settings

QPD_DEADLINE = 90.0
BFD_DEADLINE = 60.0
_AT_ONCE = 4
"""Daemons that start together: each compiles its classifier, 170 MB and two seconds of a processor."""


@contextlib.contextmanager
def steered(
    fabric: Fabric, condition: Condition, leaves: Sequence[str], seed: int, shelf: Shelf
) -> Iterator[list[str]]:
    """The fabric as the condition wants it, for the time of a `with` block; gives the nodes where qpd runs.

    qpd starts anew for each trial and takes its traces away at the end: what an earlier trial has placed must not
    count in the next. Only its compiled classifier waits on the shelf. All hosts' packets get flow hashes that follow
    from the seed.
    """
    fabric.reseed(seed)
    ports = HostPorts(
        {fabric.namespace(leaf): _host_ports(fabric, leaf) for leaf in fabric.leaves},
        seed,
        mark=condition.steering.marked,
        pins=fabric.state.pins,
    )
    nodes: list[str] = []
    if condition.steering.qpd:
        nodes = [*leaves, *(_spines(fabric, leaves) if condition.at == "routers" else [])]
    try:
        settings: dict[str, Any] = {"placement": condition.steering.value, **condition.settings}
        for first in range(0, len(nodes), _AT_ONCE):
            together = nodes[first : first + _AT_ONCE]
            for node in together:
                shelf.give(fabric.state.pins / node)
                fabric.start_qpd(node, settings, wait=False)
            for node in together:
                fabric.wait_qpd(node, QPD_DEADLINE)
                shelf.keep(fabric.state.pins / node)
        yield nodes
    finally:
        ports.close()
        for node in nodes:
            fabric.stop_qpd(node)
            _detach(fabric, node)
            fabric.stop_qpd(
                node, detach=True
            )  # what is left: its configuration, and all of it where that failed


def _detach(fabric: Fabric, node: str) -> None:
    """What `qpd detach` does, but in this process: another would load everything again, which takes longest."""
    beside = fabric.sidecar(node)
    # A daemon that refused its configuration has left nothing.
    if not beside.pins.exists():
        return
    settings = load_settings(beside.config)
    with contextlib.redirect_stdout(io.StringIO()):
        status = namespaces.inside(fabric.namespace(node), partial(daemon.detach, settings))
    if status == 0:
        shutil.rmtree(beside.pins, ignore_errors=True)


def _spines(fabric: Fabric, leaves: Sequence[str]) -> list[str]:
    """The spines of these leaves' sites: those of a site that only receives have one way to each leaf."""
    sites = {fabric.topology.site(leaf) for leaf in leaves}
    return [spine for spine in fabric.spines if fabric.topology.site(spine) in sites]


def limit(fabric: Fabric, limit: Limit) -> None:
    """Limit every link between a leaf and a spine, both ways (tc-htb(8)); ends with the fabric, or by `unlimit`.

    What is not VXLAN goes first, as routing protocols do on switches: behind a long queue BFD would see a dead link.
    """
    classes = f"burst 16kb cburst 16kb ceil {limit.rate}bit"
    for end in _uplink_ends(fabric):
        dev = f"dev {end.interface}"
        lines = [
            f"qdisc replace {dev} root handle 1: htb default 10",
            f"class add {dev} parent 1: classid 1:1 htb rate {limit.rate}bit {classes}",
            f"class add {dev} parent 1:1 classid 1:10 htb rate {limit.rate // 10}bit {classes} prio 0",
            f"class add {dev} parent 1:1 classid 1:20 htb rate {limit.rate - limit.rate // 10}bit {classes} prio 1",
            f"qdisc add {dev} parent 1:20 handle 20: bfifo limit {limit.queue}",
            f"filter add {dev} parent 1: protocol ip prio 1 u32 match ip dport 4789 0xffff flowid 1:20",
        ]
        command = fabric.enter(end.node, "tc", "-batch", "-")
        namespaces.run(command, input="\n".join(lines) + "\n")


def unlimit(fabric: Fabric) -> None:
    """Take `limit` back."""
    for end in _uplink_ends(fabric):
        fabric.exec(end.node, *f"tc qdisc delete dev {end.interface} root".split(), check=False)


def _uplink_ends(fabric: Fabric) -> list[Endpoint]:
    return [end for leaf in fabric.leaves for link in fabric.topology.uplinks(leaf) for end in link.ends]


def _host_ports(fabric: Fabric, leaf: str) -> list[str]:
    hosts = set(fabric.hosts)
    return [
        link.end(leaf).interface for link in fabric.topology.links_of(leaf) if link.other(leaf).node in hosts
    ]


def resident_bytes(fabric: Fabric, nodes: Iterable[str]) -> int | None:
    """Memory of the largest of these nodes' daemons; None where none runs."""
    sizes = []
    for node in nodes:
        identity = fabric.records.find(f"{node}.qpd")
        if identity is None:
            continue
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{identity.pid}/status").read_text(encoding="ascii").splitlines()
            sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")]
    return max(sizes, default=None)


def set_bfd(fabric: Fabric, links: Sequence[Link], timers: tuple[int, int]) -> None:
    """Give links these BFD timers and wait until both ends have agreed on them.

    Raises:
        LabError: where they have not after a minute.
    """
    for link in links:
        fabric.set_bfd(link, *timers)
    limit = time.monotonic() + BFD_DEADLINE
    for link in links:
        while not _agreed(fabric, link, timers):
            if time.monotonic() > limit:
                raise LabError(
                    f"{link}: BFD is not at {timers[0]} ms x {timers[1]} after {BFD_DEADLINE:.0f} s"
                )
            time.sleep(0.1)


def _agreed(fabric: Fabric, link: Link, timers: tuple[int, int]) -> bool:
    wanted = {
        "status": "up",
        "transmit-interval": timers[0],
        "detect-multiplier": timers[1],
        "remote-transmit-interval": timers[0],
        "remote-detect-multiplier": timers[1],
    }
    return all(
        fabric.bfd_peer(end.node, link).get(key) == value
        for end in link.ends
        for key, value in wanted.items()
    )
