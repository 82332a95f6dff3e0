"""One subject under BPF_PROG_TEST_RUN: set up, run many times, timed, and checked for having done what it claims.

The processor time of this thread is what counts, not the clock on the wall: others may want the processor, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from statistics import median
from struct import pack_into

import numpy as np

from bench.compile import PROGRAMS
from bench.figures import BenchError
from bench.frames import PEER, SOURCE_MAC, VNI, Frame
from qpd.core.slots import qp_hash, slot_table, source_port_of
from qpd.kernel import bpf, loader
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.kernel.ring import Ring
from qpd.model import (
    NO_PATH,
    PATHS_MAX,
    SLOTS,
    Address,
    Group,
    Hook,
    Network,
    PathState,
    Placement,
    QueuePairKey,
    Reason,
    Verdict,
)
from qpd.model import Path as UplinkPath

LOOPBACK = 1
"""PROG_TEST_RUN gives a frame this interface, which every namespace has: it plays the uplink."""
PATHS = 9
FIRST_NEW_QP = 0xA00000
"""No row has its known QPs from here on."""
PASS, REDIRECT = 0xFFFFFFFF, 7
"""TC_ACT_UNSPEC and TC_ACT_REDIRECT as the kernel gives them back."""
STATE = np.dtype(
    [
        ("runs", "u8"),
        ("missed", "u8"),
        ("draw", "u4"),
        ("first_qp", "u4"),
        ("qp_at", "u4"),
        ("port_at", "u4"),
        ("port", ">u2"),
        ("check", ">u2"),
        ("psn", "u4"),
        ("prime", "u4"),
        ("root", "u4"),
        ("pad", "u4"),
    ],
    align=True,
)
"""``struct bench_state`` of programs.c."""
_CALIBRATIONS = 21
_ROOTS = {1: 1, 100_002: 61_804, 1_000_002: 618_004}
"""Numbers of queue pairs that may be drawn at random: a prime less one; and a primitive root modulo that prime."""


@dataclass(frozen=True)
class Expectation:
    """What each repetition must have done. ``hook`` None: a program that counts no verdicts."""

    retval: int = PASS
    hook: Hook | None = None
    verdict: Verdict | None = None
    new_qps: bool = False


@dataclass(frozen=True)
class Load:
    """What a harness feeds its subject: which of the programs bench_<draw>, and its queue pairs."""

    draw: str = "same"
    first_qp: int = 0
    qps: int = 1


@dataclass(frozen=True)
class Timing:
    """Nanoseconds a repetition: of this thread's processor time, and as the kernel reckons (whole ones)."""

    ns: float
    kernel_ns: int


@dataclass
class TestRun:
    """The loaded programs and their maps."""

    __test__ = False

    maps: Maps
    ring: Ring
    directory: Path
    _programs: dict[str, int] = field(default_factory=dict)
    _overhead_ns: float = 0.0
    _next_qp: int = FIRST_NEW_QP
    _streams: dict[Load, tuple[int, int]] = field(default_factory=dict)
    """Where each load's packets go on: which queue pair, and its PSN."""

    def __post_init__(self) -> None:
        names = {hook.name.lower(): self.directory / hook.name.lower() for hook in Hook}
        names |= {name: self.directory / name for name in (*PROGRAMS, "bench_state", "bench_subject")}
        for name, pin in names.items():
            self._programs[name] = bpf.obj_get(pin)
        size = bpf.map_info(self._programs["bench_state"]).value_size
        if size != STATE.itemsize:
            raise BenchError(f"struct bench_state has {size} octets, bench/testrun.py says {STATE.itemsize}")
        self._calibrate()

    def close(self) -> None:
        """Close what was opened; the pins stay for their owner."""
        for fd in self._programs.values():
            os.close(fd)

    # --- the node's maps ------------------------------------------------------------------------------------------

    def write_fabric(self, own: Network, others: tuple[Network, ...], placement: Placement) -> None:
        """``own`` is reached by path 0 alone, on the interface that packets leave by; ``others`` by four elsewhere.

        The next hops of IPv4 destinations are IPv4 addresses, those of IPv6 link-local ones.
        """
        for number in range(PATHS):
            self.maps.write_path(_path(number))
        names = {f"path{number}": number for number in range(PATHS)}
        orders = np.full((SLOTS, PATHS_MAX), NO_PATH, np.uint8)
        orders[:, :PATHS] = slot_table(dict.fromkeys(names, 1))
        self.maps.write_table(0, orders)
        self.maps.write_group(Group(0, {0: 1}, 0))
        self.maps.write_group(Group(4, dict.fromkeys(range(1, 5), 1), 0))
        self.maps.write_group(Group(6, dict.fromkeys(range(5, PATHS), 1), 0))
        self.maps.write_destinations({own: 0, **{prefix: prefix.version for prefix in others}})
        self.maps.replace_neighbours({(LOOPBACK, SOURCE_MAC.hex(":")): 2})
        self.maps.set_placement(placement)
        self.maps.set_living((1 << PATHS) - 1)
        self.maps.raise_generation()

    def fill(self, subject: str, frame: Frame, first_qp: int, qps: int) -> None:
        """Make ``qps`` entries by as many first packets."""
        self._set_state(frame, Load("next"), draw=first_qp)
        self._run("next", subject, frame, qps)
        self.drain_events()

    # --- runs -----------------------------------------------------------------------------------------------------

    def measure(
        self, subject: str, frame: Frame, load: Load, repeat: int, expectation: Expectation
    ) -> Timing:
        """Run, time and check; raises BenchError where the repetitions did not do what the row claims."""
        draw, psn = self._streams.get(load, (1, 1))
        if load.draw == "next":
            draw = self._next_qp
        self._set_state(frame, load, draw=draw, psn=psn)
        before, placed = self.maps.counters(), int(self.maps.placed().sum())
        timing, retval = self._run(load.draw, subject, frame, repeat)
        if load.draw == "next":
            self._next_qp = draw + repeat
        elif expectation.hook is not None:
            # Other subjects follow no PSNs, and leave the stream where it was.
            state = self._record()
            self._streams[load] = int(state["draw"]), int(state["psn"])
        counted = self.maps.counters().verdicts.astype(np.int64) - before.verdicts.astype(np.int64)
        wanted = np.zeros_like(counted)
        if expectation.hook is not None and expectation.verdict is not None:
            wanted[expectation.hook, expectation.verdict] = repeat
        if not np.array_equal(counted, wanted):
            raise BenchError(
                f"{subject}: {repeat} runs should count {_verdicts(wanted)}, but counted {_verdicts(counted)}"
            )
        again = int((self.maps.counters().faults["retransmitted"] - before.faults["retransmitted"]).sum())
        if again > repeat // 100:
            raise BenchError(f"{subject}: {again} of {repeat} packets went back in their stream of PSNs")
        if retval != expectation.retval:
            raise BenchError(f"{subject}: returned {retval}, not {expectation.retval}")
        new = int(self.maps.placed().sum()) - placed
        if new != (repeat if expectation.new_qps else 0):
            raise BenchError(
                f"{subject}: {new} new QPs in {repeat} runs, where {'each' if expectation.new_qps else 'none'} is one"
            )
        self.drain_events()
        return timing

    def packets_of(self, key: QueuePairKey, hook: Hook) -> int:
        """What a QP's entry has counted."""
        record = self.maps.qp(key, "qps" if hook is Hook.STEER else "arrivals")
        return int(record["packets"]) if record is not None else 0

    def packets(self) -> int:
        """What all entries of QPs that leave have counted."""
        return sum(int(values["packets"].sum()) for _, values in self.maps.scan())

    def drain_events(self) -> None:
        """Read the ring empty, as the daemon does: a full one would make first packets cheaper than they are."""
        while self.ring.read():
            pass

    def _run(self, draw: str, subject: str, frame: Frame, repeat: int) -> tuple[Timing, int]:
        bpf.update(self._programs["bench_subject"], bytes(4), _u32(self._programs[subject]))
        program = self._programs[f"bench_{draw}"]
        runs, missed = self._state()
        begun = time.thread_time_ns()
        result = bpf.prog_test_run(program, frame.octets, repeat=repeat)
        spent = time.thread_time_ns() - begun
        ran, missed_now = self._state()
        if ran - runs != repeat:
            raise BenchError(f"{subject}: {ran - runs} repetitions ran, not {repeat}")
        if missed_now != missed:
            raise BenchError(f"{subject}: {missed_now - missed} of {repeat} packets found no queue pair")
        return Timing((spent - self._overhead_ns) / repeat, result.duration_ns), result.retval

    def _calibrate(self) -> None:
        """What one system call costs, whatever it repeats."""
        frame = Frame(bytes(1100))
        self._set_state(frame, Load())
        spent = [self._run("same", "bench_empty", frame, 1)[0].ns for _ in range(_CALIBRATIONS)]
        self._overhead_ns = median(spent)

    def _set_state(self, frame: Frame, load: Load, draw: int = 1, *, psn: int = 0) -> None:
        runs, missed = self._state()
        record = np.zeros(1, STATE)
        record[0] = (
            runs,
            missed,
            draw,
            load.first_qp,
            frame.qp_at,
            frame.port_at,
            frame.port,
            frame.check,
            psn,
            load.qps + 1,
            _ROOTS.get(load.qps, 0),
            0,
        )
        bpf.update(self._programs["bench_state"], bytes(4), record.tobytes())

    def _state(self) -> tuple[int, int]:
        record = self._record()
        return int(record["runs"]), int(record["missed"])

    def _record(self) -> np.void:
        octets = bpf.lookup(self._programs["bench_state"], bytes(4), STATE.itemsize)
        record: np.void = np.frombuffer(octets or bytes(STATE.itemsize), STATE)[0]
        return record


@contextmanager
def loaded(pin_dir: Path, sources: Path, cache: Path, qps_max: int) -> Iterator[TestRun]:
    """The classifier by its own loader, and the bench's programs beside it; unpinned at the end."""
    pins = load_classifier(pin_dir, sources, cache, qps_max)
    with contextlib.ExitStack() as stack:
        stack.callback(pins.remove)
        _child("bench.compile", str(pin_dir), str(qps_max), str(sources), str(cache))
        maps = stack.enter_context(Maps(pins.directory))
        ring = Ring(pins.map("events"))
        stack.callback(ring.close)
        run = TestRun(maps, ring, pins.directory)
        stack.callback(run.close)
        yield run


def load_classifier(pin_dir: Path, sources: Path, cache: Path, qps_max: int) -> Pins:
    """Compile, load and pin the classifier. Raises BenchError; the caller removes the pins."""
    spec = loader.Spec(str(pin_dir), qps_max, str(cache), str(sources))
    answer = loader.Result(**json.loads(_child("qpd.kernel.loader", given=json.dumps(asdict(spec)))))
    if answer.error:
        raise BenchError(answer.error)
    return spec.pins


def key_of(qp: int, plain_destination: Address | None = None) -> QueuePairKey:
    """The key of a measured QP: inside VXLAN, or not."""
    return QueuePairKey(0, plain_destination, qp) if plain_destination else QueuePairKey(VNI, PEER, qp)


def port_of(key: QueuePairKey) -> int:
    """The outer source port that the classifier gives this QP."""
    return source_port_of(qp_hash(key))


def network(address: Address) -> Network:
    """The host route to an address."""
    return ip_network(address)


def _path(number: int) -> UplinkPath:
    ipv4 = number < 5
    return UplinkPath(
        id=number,
        name=f"path{number}",
        interface=f"up{number}",
        ifindex=LOOPBACK if number == 0 else 1000 + number,
        next_hop=IPv4Address("198.51.100.1") + number if ipv4 else IPv6Address("fe80::1") + number,
        plane=f"path{number}",
        weight=1,
        state=PathState.UP,
        reason=Reason.NONE,
        since=0.0,
        sole=True,
    )


def _verdicts(counted: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
    named = [
        f"{Hook(hook).name.lower()}/{Verdict(verdict).name.lower()}={counted[hook, verdict]}"
        for hook, verdict in zip(*np.nonzero(counted), strict=True)
    ]
    return ", ".join(named) or "nothing"


def _u32(number: int) -> bytes:
    octets = bytearray(4)
    pack_into("=I", octets, 0, number)
    return bytes(octets)


def _child(module: str, *arguments: str, given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], input=given, capture_output=True, text=True, check=False
    )
    # The loader tells its errors in its answer.
    if done.returncode != 0 and not given:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise BenchError(f"{module}: {lines[-1]}")
    if not done.stdout and given:
        raise BenchError(f"{module}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    return done.stdout
