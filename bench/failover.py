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
from bench.failover_cases import DOWN_PACKET, FOLLOW, LEAF_CASES, RETURN_CASES, SITE_CASES, STRESS_CASES, Case
from bench.failover_rig import BFD, CONFIG, RATE, Mood, Rig, rig
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
TURNS = 3
"""Every case is measured in so many turns, so that no hour of the machine favours one side."""
VOID_MAX = 2
"""So many trials of a case may fail to be trials (tcpdump lost packets, something did not come back in time)."""

Progress = Callable[[str], None]


class Run:
    """All that is measured, in one fabric."""

    def __init__(self, fabric: Fabric, options: argparse.Namespace, progress: Progress) -> None:
        self._fabric = fabric
        self._repetitions: int = options.repetitions
        self._soak_seconds: float = options.soak
        self._say = progress
        self.rows: dict[str, dict[str, Any]] = {}
        self.soaks: list[dict[str, Any]] = []

    def measure(self, parts: list[str]) -> None:
        """The parts that are wanted, in turns: a run that is cut short has something of everything."""
        turns = min(TURNS, self._repetitions)
        for number in range(turns):
            count = self._repetitions // turns + (number < self._repetitions % turns)
            where = f"turn {number + 1} of {turns}"
            self._leaf(parts, count, where)
            if "return" in parts:
                self._return(count, where)
            if {"site", "routes"} & set(parts):
                self._sites(parts, count, where)
        if "stress" in parts:
            self._stress()

    def _leaf(self, parts: list[str], count: int, where: str) -> None:
        if not {"leaf", "down-packet"} & set(parts):
            return
        with rig(self._fabric, SOURCE, DESTINATION, LEAF, self._fabric.topology.uplinks(LEAF)) as made:
            if "leaf" in parts:
                self._cases(made, LEAF_CASES, count, where)
            if "down-packet" in parts:
                self._cases(made, DOWN_PACKET, count, where, watch=True)

    def _return(self, count: int, where: str) -> None:
        self._fabric.start_qpd(FAR_LEAF, CONFIG, deadline=90)
        with rig(self._fabric, DESTINATION, SOURCE, LEAF, self._fabric.topology.uplinks(LEAF)) as made:
            self._cases(made, RETURN_CASES, count, where)

    def _cases(
        self, made: Rig, cases: tuple[Case, ...], count: int, where: str, *, watch: bool = False
    ) -> None:
        for case in cases:
            self._say(f"{case.name}, {case.mood.value}: {count} times ({where})")
            made.become(case.mood)
            with tempfile.TemporaryDirectory(prefix="qpdb-") as folder:
                for _ in range(count):
                    self._trial(made, case, Path(folder) if watch else None)

    def _trial(self, made: Rig, case: Case, folder: Path | None) -> None:
        def observe(link: Link) -> Callable[[], dict[str, float]]:
            assert folder is not None
            return Watch(self._fabric, link.end(made.near), folder / "sent.pcap").result

        row = self._row(case)
        try:
            trial = made.trial(case.kind, observe=observe if folder else None)
        except BenchError as error:
            row["void"].append(str(error))
            self._say(f"void: {error}")
            if len(row["void"]) > VOID_MAX:
                raise
            made.send()
            made.wait_whole()
            return
        row["trials"].append({**trial.json(), "load": round(os.getloadavg()[0], 2)})

    def _row(self, case: Case) -> dict[str, Any]:
        return self.rows.setdefault(
            f"{case.name}/{case.mood.name}",
            {
                "name": case.name,
                "kind": case.kind.value,
                "mood": case.mood.value,
                "limits": case.limits,
                "trials": [],
                "void": [],
            },
        )

    # --- under stress -------------------------------------------------------------------------------------------------

    def _stress(self) -> None:
        fabric = self._fabric
        with (
            rig(fabric, SOURCE, DESTINATION, LEAF, fabric.topology.uplinks(LEAF)) as made,
            many_sessions(fabric, LEAF) as count,
            stressed() as what,
        ):
            self._cases(made, STRESS_CASES, self._repetitions, f"{what}, {count} BFD sessions")
            made.become(Mood.RUNS)
            self._soak(made, f"{what}, {count} BFD sessions")

    def _soak(self, made: Rig, what: str) -> None:
        """No fault at all: whatever path dies now, bfdd must have said so."""
        self._say(f"{self._soak_seconds:.0f} s without a fault ({what})")
        before, seq = made.bfd_downs(), max((event["seq"] for event in made.events()), default=0)
        time.sleep(self._soak_seconds)
        downs = [event for event in made.events(seq) if event["kind"] == "path-down"]
        declared = made.bfd_downs() - before
        self.soaks.append(
            {
                "stress": what,
                "seconds": self._soak_seconds,
                "failovers": len(downs),
                "declared_by_bfdd": declared,
            }
        )

    # --- between sites ------------------------------------------------------------------------------------------------

    def _sites(self, parts: list[str], count: int, where: str) -> None:
        fabric = self._fabric
        fabric.start_qpd(LEAF, CONFIG, deadline=90)
        links = [link for link in fabric.topology.uplinks(SPINE) if link.other(SPINE).node in fabric.spines]
        with rig(fabric, SOURCE, DESTINATION, SPINE, links) as made:
            if "site" in parts:
                self._cases(made, SITE_CASES, count, where)
            if "routes" in parts:
                made.become(Mood.ABSENT)
                self._follow(made, links, count, where)

    def _follow(self, made: Rig, links: list[Link], count: int, where: str) -> None:
        site = LEAF.partition("-")[0]
        far = [leaf for leaf in self._fabric.leaves if leaf.partition("-")[0] != site]
        empty: dict[str, Any] = {
            "name": FOLLOW,
            "kind": "",
            "mood": Mood.RUNS.value,
            "limits": {"max": 50.0},
            "trials": [],
        }
        row = self.rows.setdefault(FOLLOW, empty)
        self._say(f"{FOLLOW}: {count} times ({where})")
        for _ in range(count):
            lag = follow(self._fabric, LEAF, made.faults, links, far)
            row["trials"].append({"outage_ms": round(lag, 3), "load": round(os.getloadavg()[0], 2)})
            made.wait_whole()
            self._fabric.wait_converged(60)


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
        finally:
            if run is not None:
                _write(run, result, begun, options.output, console)
    return status


def _write(run: Run, result: dict[str, Any], begun: float, output: Path, console: Console) -> None:
    """What there is, however the run ended."""
    run.rows = {key: row for key, row in run.rows.items() if row["trials"]}
    if not run.rows:
        return
    result |= {"rows": list(run.rows.values()), "soaks": run.soaks}
    result["seconds"] = round(time.monotonic() - begun, 1)
    failover_report.summarise(result)
    output.mkdir(parents=True, exist_ok=True)
    (output / "failover.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failover_report.show(console, result)
    failover_report.draw(result, output / "failover.png")
    console.print(f"{output}/failover.json, failover.png: written")


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
