"""Faults on a link of the fabric that are counted where they are made: packets lost or late, by queue pair.

``python -m tests.fabric.known_faults PIN_DIR CACHE`` compiles and pins the programs of ``known_faults.c``: a process of
its own, since bcc is large.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qpd.kernel import bpf, headers
from qpd.lab import mmsg, namespaces, rtnetlink
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint, Link
from tests.conftest import BPFFS, PREFIX

SOURCE = Path(__file__).with_suffix(".c")
_ALL = socket.htons(0x0003)
_QP, _COUNT, _TIME = struct.Struct("=I"), struct.Struct("=Q"), struct.Struct("=qq")
_LATE = 0.008
"""Seconds on the side track: a packet or two of the same queue pair pass meanwhile."""
_TOO_LATE = 0.03
"""Seconds after which a frame is given up: behind 64 others, a late packet and one sent again look the same."""
_DEST_QP = slice(14 + 20 + 8 + 8 + 14 + 20 + 8 + 5, 14 + 20 + 8 + 8 + 14 + 20 + 8 + 8)
"""Where the frames of ``known_faults.c`` have it."""


@dataclass(frozen=True)
class Faults:
    """The loaded programs, pinned."""

    pins: Path
    given_up: Counter[int] = field(default_factory=Counter)
    """Packets that this machine held too long on the side track, by destination QP."""

    def dropped(self) -> dict[int, int]:
        """Packets dropped, by destination QP."""
        return dict(Counter(self._counts("dropped")) + self.given_up)

    def delayed(self) -> dict[int, int]:
        """Packets delayed, by destination QP."""
        return self._counts("delayed")

    def _counts(self, name: str) -> dict[int, int]:
        counts: dict[int, int] = {}
        table = bpf.obj_get(self.pins / name)
        try:
            key = bpf.get_next_key(table, None, _QP.size)
            while key is not None:
                value = bpf.lookup(table, key, _COUNT.size)
                if value is not None:
                    counts[_QP.unpack(key)[0]] = _COUNT.unpack(value)[0]
                key = bpf.get_next_key(table, key, _QP.size)
        finally:
            os.close(table)
        return counts

    @contextmanager
    def losing(self, fabric: Fabric, link: Link, towards: str) -> Iterator[None]:
        """One RoCE packet in 16 is lost on the way to a node."""
        end = link.end(towards)
        program = bpf.obj_get(self.pins / "lose")
        with rtnetlink.Socket(fabric.namespace(end.node)) as netlink:
            try:
                netlink.set_xdp(end.interface, program)
                yield
            finally:
                os.close(program)
                netlink.set_xdp(end.interface, -1)

    @contextmanager
    def delaying(self, fabric: Fabric, link: Link, towards: str) -> Iterator[None]:
        """One RoCE packet in 16 comes some milliseconds late, behind others of its queue pair."""
        end = link.end(towards)
        namespace = fabric.namespace(end.node)
        with _side_track(fabric, end, self.given_up) as ifindex, contextlib.ExitStack() as stack:
            control = bpf.obj_get(self.pins / "control")
            stack.callback(os.close, control)
            bpf.update(control, bytes(4), struct.pack("=II", ifindex, 0))
            tc = f"tc -n {namespace}"
            if not tc_has_clsact(namespace, end.interface):
                namespaces.run(f"{tc} qdisc add dev {end.interface} clsact".split())
                stack.callback(namespaces.run, f"{tc} qdisc del dev {end.interface} clsact".split())
            where = f"dev {end.interface} ingress pref 77 handle 1"
            filter_ = f"tc filter add {where} bpf direct-action object-pinned {self.pins / 'delay'}"
            namespaces.run(namespaces.enter(namespace, filter_.split()))
            stack.callback(namespaces.run, f"{tc} filter del {where} bpf".split())
            yield


def tc_has_clsact(namespace: str, interface: str) -> bool:
    """Whether somebody has made the qdisc already."""
    return "clsact" in namespaces.run(f"tc -n {namespace} qdisc show dev {interface}".split()).stdout


@contextmanager
def loaded(cache: Path) -> Iterator[Faults]:
    """The programs, until the end of the block. ``cache``: a folder for merged kernel headers."""
    pins = BPFFS / f"{PREFIX}-faults"
    pins.mkdir()
    try:
        command = [sys.executable, "-m", "tests.fabric.known_faults", str(pins), str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Faults(pins)
    finally:
        for pin in pins.iterdir():
            pin.unlink()
        pins.rmdir()


@contextmanager
def _side_track(fabric: Fabric, like: Endpoint, given_up: Counter[int]) -> Iterator[int]:
    """A veth pair whose one end hands every frame back after a while; its other end looks like interface ``like``."""
    node = like.node
    ip = f"ip -n {fabric.namespace(node)}"
    shown = fabric.exec(node, "ip", "-j", "link", "show", "dev", like.interface).stdout
    mac = json.loads(shown)[0]["address"]
    namespaces.run(f"{ip} link add late0 address {mac} type veth peer name late1".split())
    try:
        for name in ("late0", "late1"):
            namespaces.run(f"{ip} link set {name} mtu 9500 up".split())
        namespaces.set_sysctls(fabric.namespace(node), [("net.ipv4.conf.late0.rp_filter", "0")])

        def tap() -> tuple[socket.socket, int]:
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, _ALL)
            raw.setsockopt(socket.SOL_SOCKET, mmsg.SO_TIMESTAMPNS, 1)
            raw.bind(("late1", 0x0003))
            return raw, socket.if_nametoindex("late0")

        raw, ifindex = namespaces.inside(fabric.namespace(node), tap)
        done = threading.Event()
        worker = threading.Thread(target=_hand_back, args=(raw, done, given_up), name="late")
        worker.start()
        try:
            yield ifindex
        finally:
            done.set()
            worker.join()
            raw.close()
    finally:
        namespaces.run(f"{ip} link del late0".split())


def _hand_back(raw: socket.socket, done: threading.Event, given_up: Counter[int]) -> None:
    """Return every frame that comes, but not before its time: until ``done``, and then those that are still there."""
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        ends = done.is_set()
        pause = max(0.0, waiting[0][0] + _LATE - time.monotonic()) if waiting else 0.0 if ends else 0.05
        if select.select([raw], [], [], pause)[0]:
            frame, stamps, _, address = raw.recvmsg(65536, 64)
            if address[2] != socket.PACKET_OUTGOING:
                seconds, nanoseconds = _TIME.unpack(stamps[0][2])
                waiting.append((time.monotonic() - (time.time() - seconds - nanoseconds / 1e9), frame))
        elif ends and not waiting:
            return
        while waiting and waiting[0][0] + _LATE <= time.monotonic():
            arrived, frame = waiting.popleft()
            if time.monotonic() - arrived > _TOO_LATE:
                given_up[int.from_bytes(frame[_DEST_QP], "big")] += 1
            else:
                raw.send(frame)


def main(pins: str, cache: str) -> None:
    """Compile, load, pin."""
    import bcc  # 65 MB, in this process only

    os.environ["BCC_KERNEL_SOURCE"] = str(headers.find(Path(cache)))
    module = bcc.BPF(text=SOURCE.read_text(encoding="utf-8"), cflags=["-O2", f'-DPIN_DIR="{pins}"'])
    for name, kind in (("lose", bcc.BPF.XDP), ("delay", bcc.BPF.SCHED_CLS)):
        bpf.obj_pin(module.load_func(name, kind).fd, Path(pins) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
