"""How fast groups follow routes: from the kernel's notification to the pinned map that the classifier reads."""

from __future__ import annotations

import socket
import struct
import threading
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from bench.faults import Faults, Kind
from bench.figures import BenchError
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.lab import namespaces
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.model import NO_GROUP

_RTMGRP_IPV4_ROUTE = 0x40
_NEWROUTE, _DELROUTE = 24, 25
_RTA_DST, _MAIN = 1, 254
_PATIENCE = 10.0


class RouteWatch:
    """The times (CLOCK_MONOTONIC ns) at which the kernel told of changes of main's host routes, by address."""

    def __init__(self, namespace: str) -> None:
        self.changed: dict[IPv4Address, list[int]] = {}
        self._socket = namespaces.inside(
            namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        )
        self._socket.bind((0, _RTMGRP_IPV4_ROUTE))
        self._socket.settimeout(0.05)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _read(self) -> None:
        while not self._stop.is_set():
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            now = time.monotonic_ns()
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                self._take(kind, data[16:length], now)
                data = data[(length + 3) & ~3 :]

    def _take(self, kind: int, body: bytes, now: int) -> None:
        if kind not in {_NEWROUTE, _DELROUTE} or body[1] != 32 or body[4] != _MAIN:
            return
        attributes = body[12:]
        while len(attributes) >= 4:
            length, attribute = struct.unpack_from("=HH", attributes)
            if attribute == _RTA_DST:
                self.changed.setdefault(IPv4Address(attributes[4:8]), []).append(now)
            attributes = attributes[(length + 3) & ~3 :]


def members(maps: Maps) -> dict[IPv4Network | IPv6Network, int]:
    """How many paths each destination's group has, as the classifier reads it."""
    groups = maps.groups()
    return {
        prefix: len(groups[number].weights) if number in groups else 0
        for prefix, number in maps.destinations().items()
        if number != NO_GROUP
    }


def follow(fabric: Fabric, leaf: str, faults: Faults, links: list[Link], far: list[str]) -> float:
    """Lose all these links at once; milliseconds by which the last group of the far leaves lags its route."""
    wanted = {IPv4Network(f"{fabric.vtep(name)}/32") for name in far}
    watch = RouteWatch(fabric.namespace(leaf))
    followed: dict[IPv4Network | IPv6Network, int] = {}
    try:
        with Maps(Pins.of(fabric.sidecar(leaf).pins).directory) as maps:
            before = members(maps)
            faults.make(Kind.BOTH, *links)
            limit = time.monotonic() + _PATIENCE
            while len(followed) < len(wanted):
                now_members = members(maps)
                now = time.monotonic_ns()
                for prefix in wanted - followed.keys():
                    if now_members.get(prefix, 0) < before[prefix]:
                        followed[prefix] = now
                if time.monotonic() > limit:
                    raise BenchError(
                        f"{leaf}: groups of {sorted(map(str, wanted - followed.keys()))} do not follow"
                    )
                time.sleep(0.0005)
    finally:
        time.sleep(0.1)
        watch.close()
        faults.heal()
    lags = []
    for prefix in wanted:
        told = watch.changed.get(IPv4Address(int(prefix.network_address)))
        if not told:
            raise BenchError(f"{leaf}: the kernel told of no change of {prefix}, but its group has changed")
        # This process may hear of the route later than qpd: that is no lag at all.
        lags.append(max(0.0, (followed[prefix] - told[0]) / 1e6))
    return max(lags)
