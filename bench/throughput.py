"""Throughput of a small fabric with and without the classifier, in alternating runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import testrun
from bench.classifier import snapshot
from bench.figures import BenchError, Spread, Target
from bench.scope import Scope
from bench.sender import Burst, Sender
from bench.topology import SPINES, Fabric, Leaf, fabric, receiving_socket
from qpd.core.slots import slot_table
from qpd.kernel import bpf, tcx
from qpd.kernel.attach import Attacher, Mode
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.lab import namespaces, rtnetlink
from qpd.model import NO_PATH, PATHS_MAX, SLOTS, Group, Hook, PathState, Placement, Reason, Verdict
from qpd.model import Path as UplinkPath

QPS = tuple(range(0x100, 0x110))
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """Which of the paths live while QPs are placed, and so what share of the packets must be redirected."""

    name: str
    living: int
    redirected: float


NOTHING = Case("nothing redirected", 0b01, 0.0)
HALF = Case("half redirected", 0b11, 0.5)
ALL = Case("all redirected", 0b10, 1.0)
CASES = (NOTHING, HALF, ALL)
TARGETS: dict[tuple[Mode, str], float] = {
    ("tcx", NOTHING.name): 0.985,
    ("tcx", HALF.name): 0.96,
    ("clsact", NOTHING.name): 0.97,
    ("clsact", HALF.name): 0.945,
}


class Node:
    """A leaf's classifier: its maps, and the programs to put on its uplinks."""

    def __init__(self, leaf: Leaf, pins: Pins) -> None:
        self.leaf = leaf
        self._pins = pins
        self.maps = Maps(pins.directory)
        self._programs = {hook: bpf.obj_get(pins.program(hook)) for hook in Hook}
        self._write()

    def close(self) -> None:
        """Off the uplinks; the pins stay for their owner."""
        self.detach()
        self.maps.close()
        for fd in self._programs.values():
            os.close(fd)

    def place(self, case: Case) -> None:
        """Forget all QPs, and let new ones find only the case's paths alive."""
        table = self.maps._tables["qps"]  # noqa: SLF001 - nothing but a bench forgets QPs
        keys, _ = table.all()
        table.erase(keys)
        placed = self.maps.placed()
        self.maps._tables["gone"].write(np.arange(PATHS_MAX, dtype="u4"), placed)  # noqa: SLF001
        self.maps.set_living(case.living)

    def attach(self, mode: Mode) -> None:
        """Both programs on both uplinks."""

        def work() -> None:
            attacher = Attacher(self._pins, self._programs, mode)
            for spine, (ifindex, _) in self.leaf.uplinks.items():
                attacher.attach(ifindex, f"up{spine}")

        namespaces.inside(self.leaf.namespace, work)

    def detach(self) -> None:
        """Off the uplinks again; idempotent."""

        def work() -> None:
            attacher = Attacher(self._pins, self._programs, "tcx")
            for ifindex, _ in self.leaf.uplinks.values():
                attacher.detach(ifindex)

        namespaces.inside(self.leaf.namespace, work)

    def verdicts(self, hook: Hook) -> list[int]:
        """What the hook has counted, by verdict."""
        return [int(count) for count in self.maps.counters().verdicts[hook]]

    def _write(self) -> None:
        for number, (spine, (ifindex, next_hop)) in enumerate(self.leaf.uplinks.items()):
            self.maps.write_path(
                UplinkPath(
                    id=number,
                    name=f"spine{spine}",
                    interface=f"up{spine}",
                    ifindex=ifindex,
                    next_hop=next_hop,
                    plane=f"spine{spine}",
                    weight=1,
                    state=PathState.UP,
                    reason=Reason.NONE,
                    since=0.0,
                    sole=True,
                )
            )
        orders = np.full((SLOTS, PATHS_MAX), NO_PATH, np.uint8)
        orders[:, : len(SPINES)] = slot_table({f"spine{spine}": 1 for spine in SPINES})
        self.maps.write_table(0, orders)
        self.maps.write_group(Group(0, dict.fromkeys(range(len(SPINES)), 1), 0))
        self.maps.write_destinations({testrun.network(self.leaf.remote_vtep): 0})
        self.maps.set_placement(Placement.BALANCED)
        self.maps.set_living((1 << len(SPINES)) - 1)
        self.maps.raise_generation()


@dataclass(frozen=True)
class Arrangement:
    """Who carries the classifier, how, and what it has to do there. ``mode`` None: nobody, twice (A/A)."""

    mode: Mode | None
    case: Case
    both: bool = False

    @property
    def name(self) -> str:
        """As the report calls it."""
        if self.mode is None:
            return "A/A: without : without"
        return f"{self.mode}, {self.case.name}, {'both leaves' if self.both else 'sending leaf'}"


def run(
    scope: Scope, *, quick: bool, folder: Path | None, progress: Progress
) -> tuple[dict[str, Any], list[Target]]:
    """Measure every arrangement against the bare fabric."""
    pairs, packets = (4, 2_560) if quick else (31, 8_000)
    modes: tuple[Mode, ...] = ("tcx", "clsact") if tcx.supported() else ("clsact",)
    results: dict[str, Any] = {
        "pairs": pairs,
        "rows": [],
        "skipped": [] if "tcx" in modes else ["TCX: this kernel has none (Linux 6.6 and later)"],
    }
    arrangements = [Arrangement(None, NOTHING)]
    for mode in modes:
        arrangements += [Arrangement(mode, case) for case in CASES]
        arrangements += [Arrangement(mode, case, both=True) for case in (NOTHING, HALF)]
    targets: list[Target] = []
    progress("throughput: building the fabric")
    with _bed(scope, folder) as bed:
        batches = max(1, packets // bed.sender.batch)
        bed.burst(batches)
        noise = 0.0
        for arrangement in arrangements:
            progress(f"throughput: {arrangement.name}, {pairs} pairs of runs")
            row = bed.measure(arrangement, pairs, batches)
            results["rows"].append(row)
            if arrangement.mode is None:
                ratio = row["ratio"]
                noise = max(abs(ratio["median"] - 1), _uncertainty(ratio, pairs))
                results["noise"] = round(noise, 4)
            limit = TARGETS.get((arrangement.mode or "tcx", arrangement.case.name))
            if arrangement.mode is not None and limit is not None:
                figure = row["ratio"]["median"]
                note = (
                    f"noise {noise:.3f}" if abs(figure - limit) > noise else "within the noise of the limit"
                )
                targets.append(Target(arrangement.name, figure, limit, "at least", "x", note))
    return results, targets


class _Bed:
    """The fabric with a sender, and both leaves' classifiers at hand."""

    def __init__(
        self, built: Fabric, left: Node, right: Node, sender: Sender, arrivals: rtnetlink.Socket
    ) -> None:
        self.fabric, self.left, self.right, self.sender, self._arrivals = built, left, right, sender, arrivals

    def burst(self, batches: int) -> Burst:
        """Send, and see that all has arrived."""
        before = self._arrived()
        burst = self.sender.send(batches)
        arrived = self._arrived() - before
        if arrived != burst.packets:
            raise BenchError(f"throughput: {burst.packets} packets were sent and {arrived} arrived")
        return burst

    def measure(self, arrangement: Arrangement, pairs: int, batches: int) -> dict[str, Any]:
        """Alternating runs, the order turned round from pair to pair, so that no drift favours one side."""
        without: list[Burst] = []
        with_: list[Burst] = []
        # Entries are made, and neighbours resolved, before anything is timed.
        self._with(arrangement, 2, place=True)
        for number in range(pairs):
            for side in ("without", "with") if number % 2 else ("with", "without"):
                if side == "without" or arrangement.mode is None:
                    without_or_twin = without if side == "without" else with_
                    without_or_twin.append(self._without(arrangement, batches))
                else:
                    with_.append(self._with(arrangement, batches))
        cpu = [a.cpu_ns_per_packet / b.cpu_ns_per_packet for a, b in zip(without, with_, strict=True)]
        wall = [a.wall_ns_per_packet / b.wall_ns_per_packet for a, b in zip(without, with_, strict=True)]
        extra = [b.cpu_ns_per_packet - a.cpu_ns_per_packet for a, b in zip(without, with_, strict=True)]
        return {
            "name": arrangement.name,
            "mode": arrangement.mode,
            "case": arrangement.case.name,
            "both_leaves": arrangement.both,
            "packets_a_run": without[0].packets,
            "ratio": Spread.of(cpu).json(),
            "wall_ratio": Spread.of(wall).json(),
            "extra_ns": Spread.of(extra).json(),
            "without_ns": Spread.of([burst.cpu_ns_per_packet for burst in without]).json(),
            "with_ns": Spread.of([burst.cpu_ns_per_packet for burst in with_]).json(),
            "runs": {
                side: [vars(burst) for burst in bursts]
                for side, bursts in (("without", without), ("with", with_))
            },
        }

    def _without(self, arrangement: Arrangement, batches: int) -> Burst:
        """One run of the bare fabric, after the same attaching, so that caches are as cold as in the other."""
        self._attach(arrangement)
        self._detach()
        return self.burst(batches)

    def _with(self, arrangement: Arrangement, batches: int, *, place: bool = False) -> Burst:
        """One run with the classifier on, whose counters must agree with what the case says."""
        if arrangement.mode is None:
            return self.burst(batches)
        if place:
            self.left.place(arrangement.case)
        self._attach(arrangement)
        try:
            before, seen = self.left.verdicts(Hook.STEER), self.right.verdicts(Hook.OBSERVE)
            burst = self.burst(batches)
            steered, observed = self.left.verdicts(Hook.STEER), self.right.verdicts(Hook.OBSERVE)
        finally:
            self._detach()
        redirected = int(burst.packets * arrangement.case.redirected)
        wanted = {
            Verdict.OWN_PATH: burst.packets - redirected,
            Verdict.REDIRECTED: redirected,
            Verdict.SECOND_PASS: redirected,
        }
        got = {verdict: steered[verdict] - before[verdict] for verdict in wanted}
        if got != wanted:
            raise BenchError(f"{arrangement.name}: counted {_named(got)}, not {_named(wanted)}")
        arrived = observed[Verdict.OBSERVED] - seen[Verdict.OBSERVED]
        if arrived != (burst.packets if arrangement.both else 0):
            raise BenchError(
                f"{arrangement.name}: the receiving leaf observed {arrived} of {burst.packets} packets"
            )
        return burst

    def _attach(self, arrangement: Arrangement) -> None:
        mode = arrangement.mode or ("tcx" if tcx.supported() else "clsact")
        self.left.attach(mode)
        if arrangement.both:
            self.right.attach(mode)

    def _detach(self) -> None:
        self.left.detach()
        self.right.detach()

    def _arrived(self) -> int:
        return self._arrivals.counters()["eth0"].rx_packets


@contextmanager
def _bed(scope: Scope, folder: Path | None) -> Iterator[_Bed]:
    with contextlib.ExitStack() as stack:
        source = snapshot(scope, folder)
        built = stack.enter_context(fabric(scope))
        nodes = []
        for name, leaf in (("left", built.left), ("right", built.right)):
            pins = testrun.load_classifier(scope.pin_dir(name), source, scope.folder / "headers", 4096)
            stack.callback(pins.remove)
            node = Node(leaf, pins)
            stack.callback(node.close)
            nodes.append(node)
        stack.enter_context(contextlib.closing(receiving_socket(built.receiver)))
        sender = Sender(built.sender, QPS)
        stack.callback(sender.close)
        arrivals = stack.enter_context(rtnetlink.Socket(built.receiver))
        yield _Bed(built, nodes[0], nodes[1], sender, arrivals)


def _uncertainty(spread: dict[str, float], count: int) -> float:
    """Half of the interval in which a median lies (McGill, Tukey, Larsen 1978: notches of box plots, about 95 %)."""
    return 1.57 * (spread["high"] - spread["low"]) / float(np.sqrt(count))


def _named(counts: dict[Verdict, int]) -> str:
    return ", ".join(f"{verdict.name.lower()}={count}" for verdict, count in counts.items())
