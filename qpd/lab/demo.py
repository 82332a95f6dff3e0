"""The demonstration: one command from an empty machine to queue pairs that are spread, moved and brought home.

``make demo`` runs it. Every number that it shows or writes comes from link counters, from the receiver, or from the
wire; the tables of qpctl stand beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qpd.lab.counters import Sampler, Series
from qpd.lab.demo_plot import Mark, draw
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.load import jain, max_to_mean, shares
from qpd.lab.topology import Endpoint, Link
from qpd.lab.traffic import SOURCE_PORT, Flow, Result, Traffic

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = ROOT / "deploy" / "containerlab" / "two-dc" / "two-dc.clab.yml"
SOURCE, DESTINATION, LEAF = "dc1-host1", "dc2-host1", "dc1-leaf1"
FIRST_QP = 0x100
RATE = 250.0
"""Packets per second and QP."""
NEW_PSN = 1 << 22
"""Where the second traffic's PSNs begin: as with real adapters, far from those of the connections before."""
SETTLE = 1.0
PATIENCE = 30.0
START_DEADLINE = 120.0


@dataclass(frozen=True)
class Loads:
    """What each uplink of the leaf carried in one phase, in bytes."""

    by_uplink: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For summary.json."""
        loads = list(self.by_uplink.values())
        return {
            "uplink_bytes": self.by_uplink,
            "uplink_shares": dict(
                zip(self.by_uplink, (round(share, 4) for share in shares(loads)), strict=True)
            ),
            "max_to_mean": round(max_to_mean(loads), 4),
            "jain": round(jain(loads), 4),
        }


@dataclass
class Summary:
    """What ``summary.json`` holds; times are seconds."""

    qps: int
    without_qpd: Loads
    with_qpd: Loads
    moved: list[int] = field(default_factory=list)
    unmoved: list[int] = field(default_factory=list)
    wrongly_moved: list[int] = field(default_factory=list)
    home: list[int] = field(default_factory=list)
    outage: float = 0.0
    outage_unmoved: float = 0.0
    nominal_gap: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The file's content; documented in docs/demo.md."""
        return {
            "qps": self.qps,
            "source_port": SOURCE_PORT,
            "without_qpd": self.without_qpd.to_json(),
            "with_qpd": self.with_qpd.to_json(),
            "cut": {
                "qps_moved": len(self.moved),
                "qps_unmoved": len(self.unmoved),
                "surviving_qps_moved": len(self.wrongly_moved),
                "outage_ms": round(self.outage * 1e3, 3),
                "outage_ms_of_unmoved": round(self.outage_unmoved * 1e3, 3),
                "nominal_gap_ms": round(self.nominal_gap * 1e3, 3),
            },
            "heal": {"qps_home": len(self.home), "qps_away": self.qps - len(self.home)},
        }


class Demo:
    """The story, told on ``out``."""

    def __init__(self, fabric: Fabric, out: Console, directory: Path, *, qps: int, seconds: float) -> None:
        self._fabric = fabric
        self._out = out
        self._directory = directory
        self._qps = list(range(FIRST_QP, FIRST_QP + qps))
        self._seconds = seconds
        self._uplinks = fabric.topology.uplinks(LEAF)
        self._marks: list[Mark] = []

    async def run(self) -> Summary:
        """All phases, on a fabric that is up without qpd."""
        flow = Flow(SOURCE, DESTINATION, self._qps, rate=RATE)
        ends = [link.end(LEAF) for link in self._uplinks]
        async with Sampler(self._fabric, ends, interval=0.1) as sampler:
            without = await self._without(flow, sampler)
            summary = await self._with(flow, sampler, without)
        self._write(summary, sampler.series)
        return summary

    # --- phases

    async def _without(self, flow: Flow, sampler: Sampler) -> Loads:
        self._say(
            f"{len(self._qps)} QPs from {SOURCE} to {DESTINATION}, one UDP source port, kernel ECMP alone"
        )
        async with Traffic(self._fabric, [flow]):
            self._mark("kernel ECMP")
            await asyncio.sleep(SETTLE)
            loads = await self._measure(sampler)
            await self._start_qpd()
            await asyncio.sleep(self._seconds / 2)
        return loads

    async def _start_qpd(self) -> None:
        self._say(f"qpd beside each of {len(self._fabric.leaves)} leaves")
        for leaf in self._fabric.leaves:
            await asyncio.to_thread(self._fabric.start_qpd, leaf, deadline=START_DEADLINE)
            if leaf == LEAF:
                self._mark("qpd steers")

    async def _with(self, flow: Flow, sampler: Sampler, without: Loads) -> Summary:
        self._say("the same traffic again, steered from its first packet")
        traffic = Traffic(self._fabric, [replace(flow, first_psn=NEW_PSN)])
        async with traffic:
            await asyncio.sleep(SETTLE)
            summary = Summary(len(self._qps), without, await self._measure(sampler), nominal_gap=1 / RATE)
            self._compare(summary)
            before = await self._homes()
            await self._show("qps", "--limit", "8")
            await self._show("explain", "--dst", self._fabric.address(DESTINATION), "--qp", str(self._qps[0]))

            link = self._busiest(before)
            peer = link.other(LEAF)
            name = self._path_names()[link.end(LEAF).interface]
            self._say(f"cut {link.end(LEAF)} -- {peer} (ip link set down)")
            self._mark("cut")
            await asyncio.to_thread(self._fabric.cut, link, LEAF)
            await self._until(partial(self._nobody_uses, name), f"no QP uses {name}")
            await asyncio.sleep(self._seconds / 2)
            during = await self._current()
            summary.moved = [qp for qp in self._qps if during[qp] != before[qp]]
            summary.unmoved = [qp for qp in self._qps if during[qp] == before[qp]]
            summary.wrongly_moved = [qp for qp in summary.moved if before[qp] != name]
            await self._show("paths")
            self._say(
                f"{len(summary.moved)} QPs moved, all of them {name}'s; {len(summary.unmoved)} stayed where they were"
                if not summary.wrongly_moved
                else f"{len(summary.wrongly_moved)} QPs moved although their path lived"
            )

            self._say("heal it; BGP comes back, then the path is held up for 1 s")
            self._mark("heal")
            await asyncio.to_thread(self._fabric.heal, link)
            await self._until(partial(self._all_as, before), "every QP is home")
            self._mark("home")
            await asyncio.sleep(self._seconds / 2)
            after = await self._current()
            summary.home = [qp for qp in self._qps if after[qp] == before[qp]]
            self._say(f"{len(summary.home)} of {len(self._qps)} QPs are home")
            await self._show("events", "--no-follow")
        self._outages(summary, traffic.result)
        return summary

    def _outages(self, summary: Summary, result: Result) -> None:
        gaps = {qp.qp: max(0.0, qp.arrivals.gap_ns / 1e9 - summary.nominal_gap) for qp in result.qps}
        summary.outage = max((gaps[qp] for qp in summary.moved), default=0.0)
        summary.outage_unmoved = max((gaps[qp] for qp in summary.unmoved), default=0.0)
        self._say(
            f"longest silence at the receiver: {summary.outage * 1e3:.1f} ms for a QP that moved, "
            f"{summary.outage_unmoved * 1e3:.1f} ms for one that did not"
        )

    # --- looking

    async def _measure(self, sampler: Sampler) -> Loads:
        """Bytes by uplink over the phase's seconds."""
        sampler.read()
        first = sampler.series.readings[-1]
        await asyncio.sleep(self._seconds)
        sampler.read()
        last = sampler.series.readings[-1]
        ends = [link.end(LEAF) for link in self._uplinks]
        return Loads(
            {
                str(link.other(LEAF).node): last[end].tx_bytes - first[end].tx_bytes
                for link, end in zip(self._uplinks, ends, strict=True)
            }
        )

    async def _rows(self) -> list[dict[str, Any]]:
        answer = await asyncio.to_thread(self._fabric.sidecar(LEAF).get, "/v1/qps")
        rows = [row for row in answer or [] if row["dest_qp"] in self._qps]
        if len(rows) != len(self._qps):
            raise LabError(f"qpd on {LEAF} knows {len(rows)} of {len(self._qps)} QPs")
        return rows

    async def _homes(self) -> dict[int, str]:
        return {row["dest_qp"]: row["home"] for row in await self._rows()}

    async def _current(self) -> dict[int, str]:
        return {row["dest_qp"]: row["path"] for row in await self._rows()}

    async def _nobody_uses(self, name: str) -> bool:
        return name not in (await self._current()).values()

    async def _all_as(self, wanted: dict[int, str]) -> bool:
        return await self._current() == wanted

    def _path_names(self) -> dict[str, str]:
        """Interface to path name."""
        return {row["interface"]: row["name"] for row in self._fabric.sidecar(LEAF).get("/v1/paths") or []}

    def _busiest(self, homes: dict[int, str]) -> Link:
        """The uplink with the most QPs at home."""
        names = self._path_names()
        counts = {
            link: sum(home == names[link.end(LEAF).interface] for home in homes.values())
            for link in self._uplinks
        }
        return max(counts, key=lambda link: counts[link])

    async def _until(self, holds: Callable[[], Any], what: str) -> None:
        limit = time.monotonic() + PATIENCE
        while not await holds():
            if time.monotonic() > limit:
                raise LabError(f"waited {PATIENCE:.0f} s in vain until {what}")
            await asyncio.sleep(0.05)

    # --- telling

    def _say(self, line: str) -> None:
        self._out.print(Text("==> ", style="bold green") + Text(line, style="bold"), soft_wrap=True)

    def _mark(self, label: str) -> None:
        self._marks.append(Mark(time.monotonic_ns(), label))

    async def _show(self, *arguments: str) -> None:
        """What qpctl on the leaf says, in its own words."""
        self._out.print(Text(f"{LEAF}# qpctl {' '.join(arguments)}", style="cyan"))
        answer = await asyncio.to_thread(self._fabric.sidecar(LEAF).qpctl, *arguments)
        if answer.returncode != 0:
            raise LabError(f"qpctl {' '.join(arguments)}: {answer.stderr.strip()}")
        self._out.out(answer.stdout.rstrip() + "\n", highlight=False)

    def _compare(self, summary: Summary) -> None:
        table = Table(title=f"load of {LEAF}'s uplinks")
        table.add_column("uplink to")
        table.add_column("kernel ECMP", justify="right")
        table.add_column("qpd", justify="right")
        without, with_qpd = summary.without_qpd.to_json(), summary.with_qpd.to_json()
        for uplink in summary.with_qpd.by_uplink:
            table.add_row(
                uplink, f"{without['uplink_shares'][uplink]:.1%}", f"{with_qpd['uplink_shares'][uplink]:.1%}"
            )
        table.add_section()
        table.add_row("max / mean", f"{without['max_to_mean']:.3f}", f"{with_qpd['max_to_mean']:.3f}")
        table.add_row("Jain's index", f"{without['jain']:.3f}", f"{with_qpd['jain']:.3f}")
        self._out.print(table)

    def _write(self, summary: Summary, series: Series) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "summary.json").write_text(json.dumps(summary.to_json(), indent=2) + "\n")
        (self._directory / "load.json").write_text(json.dumps(series.to_json()) + "\n")
        names: dict[Endpoint, str] = {link.end(LEAF): link.other(LEAF).node for link in self._uplinks}
        draw(series, names, self._marks, self._directory / "load.png", f"{LEAF}: load of its uplinks")


@contextmanager
def _fabric(out: Console) -> Iterator[Fabric]:
    """The two data centres, up without qpd; gone afterwards."""
    fabric = Fabric.load(TOPOLOGY, "qpd-demo")
    fabric.check_free()
    begun = time.monotonic()
    try:
        fabric.up(qpd=False, progress=lambda line: out.print(f"    {line}", style="dim", soft_wrap=True))
        out.print(f"    up in {time.monotonic() - begun:.0f} s", style="dim")
        yield fabric
    finally:
        out.print("==> clean up", style="bold green")
        fabric.down()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; exit status 0: it held what it promises."""
    parser = argparse.ArgumentParser(
        prog="make demo", description="Two data centres, 32 queue pairs, one cut link."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo", help="where results go")
    parser.add_argument("--qps", type=int, default=32, help="queue pairs (default 32)")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measured phase")
    options = parser.parse_args(arguments)
    out = Console(highlight=False)
    try:
        out.print(
            Text(
                "==> two data centres, each 2 spines and 3 leaves, in network namespaces", style="bold green"
            )
        )
        with _fabric(out) as fabric:
            demo = Demo(fabric, out, options.out, qps=options.qps, seconds=options.seconds)
            summary = asyncio.run(demo.run())
    except LabError as error:
        Console(stderr=True, highlight=False).print(f"make demo: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("make demo: interrupted; everything has been removed", style="red")
        return 130
    for file in ("summary.json", "load.png"):
        out.print(f"    {options.out / file}")
    good = not summary.wrongly_moved and len(summary.home) == summary.qps
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
