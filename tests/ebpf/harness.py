"""The real programs under BPF_PROG_TEST_RUN, with the real maps, loaded by the real loader.

A test says what paths there are, sends a packet, and sees what the program returned, the packet as it left, and which
counters changed by how much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from struct import pack_into, unpack_from
from typing import Any

import numpy as np
import pytest

from qpd.core.slots import slot_table
from qpd.kernel import bpf, layout, sources
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.model import (
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    Group,
    Hook,
    PathState,
    Placement,
    QueuePairKey,
    Reason,
    Verdict,
)
from qpd.model import (
    Path as UplinkPath,
)

BPFFS = Path("/sys/fs/bpf")
PASS, REDIRECT = 0xFFFFFFFF, 7
"""TC_ACT_UNSPEC and TC_ACT_REDIRECT as the kernel gives them back."""
GUARD_MAGIC = 0x71706421
OWN_IFINDEX = 1
"""PROG_TEST_RUN wants an interface that exists: lo, which every namespace has."""
OTHER_IFINDEX = 1000
"""Others are named in maps only."""

_SKB_SIZE = 192
_CB, _IFINDEX, _GSO_SEGS, _GSO_SIZE = 48, 40, 164, 176
"""Offsets in struct __sk_buff (include/uapi/linux/bpf.h)."""


@contextmanager
def loaded(
    name: str, *, cache: Path, qps_max: int = 4096, folder: Path | None = None
) -> Iterator[Classifier]:
    """The classifier, compiled, loaded, pinned under a name of its own, and unpinned at the end."""
    base = BPFFS / f"qpdt-{os.getpid()}-{name}"
    folder = folder or sources.directory()
    pins = Pins(base, sources.layout_version(folder))
    spec = {"pin_dir": str(base), "qps_max": qps_max, "cache": str(cache), "sources": str(folder)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qpd.kernel.loader"],
            input=json.dumps(spec),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        with Maps(pins.directory) as maps:
            classifier = Classifier(maps, pins)
            try:
                yield classifier
            finally:
                classifier.close()
    finally:
        pins.remove()


@dataclass(frozen=True)
class Outcome:
    """What one run of a program did. ``verdicts``, ``paths``: only what changed (packets, octets by path id)."""

    action: int
    packet: bytes
    cb: tuple[int, ...]
    verdicts: dict[Verdict, int]
    paths: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Uplink:
    """A path as the tests write it: where its next hop is, and its weight."""

    ifindex: int
    next_hop: str = "fe80::1"
    sole: bool = True
    weight: int = 1


def on_two_cpus(function: Callable[[int], None]) -> None:
    """Run it with 0 and with 1, each in a thread on a CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")

    def on(number: int) -> None:
        os.sched_setaffinity(0, {cpus[number]})
        function(number)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(on, number) for number in (0, 1)]:
            done.result()


def uplinks(count: int) -> list[Uplink]:
    """``count`` paths, each on an interface of its own; the first on the one that packets leave by."""
    return [Uplink(OWN_IFINDEX if n == 0 else OTHER_IFINDEX + n, f"fe80::{n + 1}") for n in range(count)]


@dataclass
class Classifier:
    """The two programs and their maps."""

    maps: Maps
    pins: Pins
    programs: dict[Hook, int] = field(init=False)

    def __post_init__(self) -> None:
        self.programs = {hook: bpf.obj_get(self.pins.program(hook)) for hook in Hook}

    def close(self) -> None:
        for fd in self.programs.values():
            os.close(fd)

    # --- set-up ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """As new: no QP, no path, no group. Counters go on, as they do in life."""
        for name in ("qps", "arrivals", "destinations", "neighbours", "bfd_sessions", "path_of_next_hop"):
            table = self.maps._tables[name]
            keys, _ = table.all()
            table.erase(keys)
        for path in range(PATHS_MAX):
            self.maps.erase_path(path)
        for group in self.maps.groups():
            self.maps.erase_group(group)
        for name in ("placed", "gone"):
            self.maps._tables[name].write(
                np.arange(PATHS_MAX, dtype=layout.INDEX), np.zeros(PATHS_MAX, layout.LOAD)
            )
        self.maps.set_living(0)
        self.maps._tables["living"].set(1, bytes(8))
        self.maps.set_placement(Placement.HASH)

    def fabric(
        self,
        paths: Sequence[Uplink],
        destinations: Sequence[str] = ("0.0.0.0/0", "::/0"),
        *,
        placement: Placement = Placement.HASH,
    ) -> None:
        """One group of these paths, which serves these destinations; all of them living."""
        for number, path in enumerate(paths):
            self.write_path(number, path)
        weights = {number: path.weight for number, path in enumerate(paths)}
        self.maps.write_table(0, orders_of(weights))
        self.maps.write_group(Group(0, weights, 0))
        self.maps.write_destinations({ip_network(prefix): 0 for prefix in destinations})
        self.maps.set_placement(placement)
        self.maps.set_living((1 << len(paths)) - 1)
        self.maps.raise_generation()

    def write_path(self, number: int, path: Uplink) -> None:
        self.maps.write_path(
            UplinkPath(
                id=number,
                name=f"path{number}",
                interface=f"up{number}",
                ifindex=path.ifindex,
                next_hop=ip_address(path.next_hop),
                plane=f"path{number}",
                weight=path.weight,
                state=PathState.UP,
                reason=Reason.NONE,
                since=0.0,
                sole=path.sole,
            )
        )

    # --- runs --------------------------------------------------------------------------------------------------

    def steer(self, packet: bytes, **context: Any) -> Outcome:
        return self.run(Hook.STEER, packet, **context)

    def observe(self, packet: bytes, **context: Any) -> Outcome:
        return self.run(Hook.OBSERVE, packet, **context)

    def run(
        self,
        hook: Hook,
        packet: bytes,
        *,
        ifindex: int = OWN_IFINDEX,
        cb: Sequence[int] = (),
        gso_size: int = 0,
    ) -> Outcome:
        """One packet through one program."""
        context = bytearray(_SKB_SIZE)
        pack_into(f"={len(cb)}I", context, _CB, *cb)
        pack_into("=I", context, _IFINDEX, ifindex)
        pack_into("=I", context, _GSO_SIZE, gso_size)
        pack_into("=I", context, _GSO_SEGS, 2 if gso_size else 0)
        before = self.maps.counters()
        result = bpf.prog_test_run(self.programs[hook], packet, ctx_in=bytes(context))
        after = self.maps.counters()
        verdicts = after.verdicts[hook] - before.verdicts[hook]
        packets = after.packets[hook] - before.packets[hook]
        octets = after.bytes[hook] - before.bytes[hook]
        return Outcome(
            result.retval,
            result.data_out,
            unpack_from("=5I", result.ctx_out, _CB),
            {Verdict(n): int(count) for n, count in enumerate(verdicts) if count},
            {n: (int(packets[n]), int(octets[n])) for n in range(PATHS_MAX) if packets[n] or octets[n]},
        )

    def entry(self, key: QueuePairKey) -> np.void | None:
        """The QP's egress record."""
        return self.maps.qp(key)

    def path_of(self, outcome: Outcome) -> int:
        """The one path that a packet was counted on."""
        (path,) = outcome.paths
        return path


def orders_of(weights: Mapping[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The slot table of these paths, in the kernel's shape."""
    names = {f"path{number:02}": number for number in weights}
    table = slot_table({name: weights[number] for name, number in names.items()})
    ids = np.array([names[name] for name in sorted(names)], np.uint8)
    orders = np.full((SLOTS, PATHS_MAX), NO_PATH, np.uint8)
    orders[:, : len(weights)] = ids[table]
    return orders


def shortest(packet: bytes) -> int:
    """The shortest beginning of a packet that BPF_PROG_TEST_RUN takes."""
    ethertype = int.from_bytes(packet[12:14], "big")
    return 14 + {0x0800: 20, 0x86DD: 40}.get(ethertype, 0)


def mapped(address: IPv4Address | IPv6Address | str) -> bytes:
    """16 octets as the maps hold them."""
    return layout.pack_address(ip_address(str(address)))
