"""`make bench-failover`, or ``python -m bench.failover``: outages at the receiver, without and with qpd, in one run.

Writes build/bench/failover.json and failover.png. Exit status as `make bench`: 0 measured, 1 could not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import failover_report, machine
from bench.down_packet import Watch
from bench.failover_cases import DOWN_PACKET, FOLLOW, LEAF_CASES, RETURN_CASES, SITE_CASES, Case
from bench.failover_rig import BFD, CONFIG, RATE, Mood, Rig, rig
from bench.faults import Faults, Kind
from bench.figures import BenchError
from bench.route_change import follow
from bench.scope import Terminated, scope
from bench.stress import many_sessions, stressed
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = ROOT / "deploy/containerlab/two-dc/two-dc.clab.yml"
SOURCE, DESTINATION, LEAF, FAR_LEAF, SPINE = "dc1-host1", "dc2-host1", "dc1-leaf1", "dc2-leaf1", "dc1-spine1"
SCHEMA = 1
PARTS = ("leaf", "down-packet", "return", "site", "routes", "stress")
ROUNDS = 3
"""Every case is measured in so many turns, so that no hour of the machine favours one side."""

Progress = Callable[[str], None]


class Run:
    """All that is measured, in one fabric."""

    def __init__(self, fabric: Fabric, options: argparse.Namespace, progress: Progress) -> None:
        self.fabric = fabric
        self.repetitions: int = options.repetitions
        self.soak: float = options.soak
        self._say = progress
        self.rows: dict[str, dict[str, Any]] = {}
        self.false_failovers: list[dict[str, Any]] = []

    def measure(self, parts: list[str]) -> dict[str, Any]:
        """The parts that are wanted, one after the other."""
        uplinks = self.fabric.topology.uplinks(LEAF)
        if {"leaf", "down-packet", "stress"} & set(parts):
            with rig(self.fabric, SOURCE, DESTINATION, LEAF, uplinks) as made:
                if "leaf" in parts:
                    self._rounds(made, LEAF_CASES, self.repetitions)
                if "down-packet" in parts:
                    self._rounds(made, DOWN_PACKET, self.repetitions, watch=True)
                if "stress" in parts:
                    self._stress(made)
        if "return" in parts:
            self.fabric.start_qpd(FAR_LEAF, CONFIG, deadline=90)
            with rig(self.fabric, DESTINATION, SOURCE, LEAF, uplinks) as made:
                self._rounds(made, RETURN_CASES, self.repetitions)
        if {"site", "routes"} & set(parts):
            self._sites(parts)
        return {"rows": list(self.rows.values()), "false_failovers": self.false_failovers}

    def _rounds(
        self, made: Rig, cases: tuple[Case, ...], repetitions: int, *, watch: bool = False, suffix: str = ""
    ) -> None:
        rounds = min(ROUNDS, repetitions)
        for number in range(rounds):
            for case in cases:
                count = repetitions // rounds + (number < repetitions % rounds)
                self._say(
                    f"{case.name}{suffix}, {case.mood.value}: {count} times (turn {number + 1} of {rounds})"
                )
                made.become(case.mood)
                with tempfile.TemporaryDirectory(prefix="qpdb-") as folder:
                    for _ in range(count):
                        self._trial(made, case, suffix, Path(folder) if watch else None)

    def _trial(self, made: Rig, case: Case, suffix: str, folder: Path | None) -> None:
        def observe(link: Link) -> Callable[[], dict[str, float]]:
            assert folder is not None
            return Watch(self.fabric, link.end(made.near), folder / "sent.pcap").result

        trial = made.trial(case.kind, observe=observe if folder else None)
        self._row(case, suffix)["trials"].append({**trial.json(), "load": round(os.getloadavg()[0], 2)})

    def _row(self, case: Case, suffix: str = "") -> dict[str, Any]:
        name = case.name + suffix
        return self.rows.setdefault(
            f"{name}/{case.mood.name}",
            {
                "name": name,
                "kind": case.kind.value,
                "mood": case.mood.value,
                "limits": case.limits,
                "trials": [],
            },
        )

    # --- under stress -------------------------------------------------------------------------------------------------

    def _stress(self, made: Rig) -> None:
        under = tuple(
            case for case in LEAF_CASES if case.kind is Kind.BOTH and case.mood in {Mood.ABSENT, Mood.RUNS}
        )
        made.become(Mood.RUNS)
        with many_sessions(self.fabric, LEAF) as count, stressed() as what:
            self._say(f"under stress: {what}, {count} BFD sessions")
            self._rounds(made, under, self.repetitions, suffix=", under stress")
            made.become(Mood.RUNS)
            self._soak(made, what)

    def _soak(self, made: Rig, what: str) -> None:
        """No fault at all: whatever path dies now, bfdd must have said so."""
        self._say(f"under stress: {self.soak:.0f} s without a fault")
        before, seq = made.bfd_downs(), max((event["seq"] for event in made.events()), default=0)
        time.sleep(self.soak)
        downs = [event for event in made.events(seq) if event["kind"] == "path-down"]
        declared = made.bfd_downs() - before
        self.false_failovers.append(
            {"stress": what, "seconds": self.soak, "failovers": len(downs), "declared_by_bfdd": declared}
        )

    # --- between sites ------------------------------------------------------------------------------------------------

    def _sites(self, parts: list[str]) -> None:
        self._say(f"qpd on {LEAF}, then links between the sites")
        self.fabric.start_qpd(LEAF, CONFIG, deadline=90)
        links = [
            link
            for link in self.fabric.topology.uplinks(SPINE)
            if link.other(SPINE).node in self.fabric.spines
        ]
        with rig(self.fabric, SOURCE, DESTINATION, SPINE, links) as made:
            if "site" in parts:
                self._rounds(made, SITE_CASES, self.repetitions)
            if "routes" in parts:
                made.become(Mood.ABSENT)
                self._follow(made, made.faults, links)

    def _follow(self, made: Rig, faults: Faults, links: list[Link]) -> None:
        site = LEAF.partition("-")[0]
        far = [leaf for leaf in self.fabric.leaves if leaf.partition("-")[0] != site]
        row: dict[str, Any] = {
            "name": FOLLOW,
            "kind": "",
            "mood": Mood.RUNS.value,
            "limits": {"max": 50.0},
            "trials": [],
        }
        self.rows[FOLLOW] = row
        self._say(f"{FOLLOW}: {self.repetitions} times")
        for _ in range(self.repetitions):
            lag = follow(self.fabric, LEAF, faults, links, far)
            row["trials"].append({"outage_ms": round(lag, 3), "load": round(os.getloadavg()[0], 2)})
            made.wait_whole()
            self.fabric.wait_converged(60)


def main(arguments: list[str] | None = None) -> int:
    """Measure, show, write."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if os.geteuid() != 0:
        console.print("bench: needs root (network namespaces, BPF): sudo make bench-failover")
        return 1
    begun = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s, load {os.getloadavg()[0]:.1f}] {line}", flush=True)

    result: dict[str, Any] = {
        "schema": SCHEMA,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "bfd": f"{BFD[0]} ms x {BFD[1]}",
        "rate": RATE,
        "machine": machine.facts(),
    }
    status = 0
    with ExitStack() as stack:
        run: Run | None = None
        try:
            fabric = stack.enter_context(_fabric(progress))
            run = Run(fabric, options, progress)
            run.measure(options.only or list(PARTS if options.stress else PARTS[:-1]))
        except (BenchError, LabError, OSError, subprocess.SubprocessError) as error:
            console.print(f"bench: {error}", style="red", markup=False)
            status = 1
        except (KeyboardInterrupt, Terminated):
            console.print("bench: interrupted; everything is removed")
            status = 1
    if run is None or not run.rows:
        return 1
    result |= {"rows": list(run.rows.values()), "false_failovers": run.false_failovers}
    result["seconds"] = round(time.monotonic() - begun, 1)
    failover_report.summarise(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "failover.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failover_report.show(console, result)
    failover_report.draw(result, options.output / "failover.png")
    console.print(f"{options.output}/failover.json, failover.png: written")
    return status


@contextmanager
def _fabric(progress: Progress) -> Iterator[Fabric]:
    with scope() as names:
        fabric = Fabric.load(TOPOLOGY, f"{names.prefix}-two-dc")
        fabric.check_free()
        try:
            fabric.up(qpd=False, deadline=120, progress=progress)
            yield fabric
        finally:
            fabric.down()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.failover", description=__doc__)
    parser.add_argument(
        "--repetitions", type=int, default=None, metavar="N", help="of each case (30; --quick: 3)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="three repetitions: some minutes instead of an hour"
    )
    parser.add_argument("--stress", action="store_true", help="also under stress-ng, with 64 BFD sessions")
    parser.add_argument(
        "--soak",
        type=float,
        default=None,
        metavar="S",
        help="seconds of stress without a fault (600; --quick: 20)",
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone (again for more)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("build/bench"), help="(%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: give 1 or more")
    options.repetitions = options.repetitions or (3 if options.quick else 30)
    if options.soak is None:
        options.soak = 20.0 if options.quick else 600.0
    return options


if __name__ == "__main__":
    sys.exit(main())
