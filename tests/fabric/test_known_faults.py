"""What qpd says of lost and late packets, against programs on the wire that count what they do to each queue pair."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.lab.traffic import Flow, Result, Traffic

from .known_faults import Faults, loaded
from .test_steering import QUIET, START, Leaf, eventually, leaf_of

pytestmark = [pytest.mark.frr]

IN_THE_FABRIC, REORDERED, BEFORE_THE_LEAF = range(0x300, 0x320), range(0x340, 0x360), range(0x380, 0x3A0)
RATE = 200.0
ENOUGH = 200
"""Faults to wait for, over all QPs."""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with loaded(tmp_path_factory.mktemp("headers")) as programs:
        yield programs


async def traffic_under(
    fabric: Fabric,
    flow: Flow,
    near: Leaf,
    fault: AbstractContextManager[object, bool | None],
    faults: Callable[[], int],
) -> Result:
    """Traffic of which the middle part meets a fault: whatever is lost, a later packet of its QP arrives."""
    traffic = Traffic(fabric, [flow])
    async with traffic:
        await eventually(
            lambda: None if len(near.rows(flow.qps)) == len(flow.qps) else "QPs have not begun", START
        )
        with fault:
            await eventually(lambda: None if faults() >= ENOUGH else f"{faults()} faults", START)
        seen = {qp: row["packets"] for qp, row in near.rows(flow.qps).items()}
        await eventually(
            lambda: (
                None
                if all(row["packets"] > seen[qp] + 5 for qp, row in near.rows(flow.qps).items())
                else "no packets behind the fault"
            )
        )
    return traffic.result


def rows_in(leaf: Leaf, qps: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The QPs that arrive at a leaf."""
    return {row["dest_qp"]: row for row in leaf.get("/v1/qps?direction=in") if row["dest_qp"] in qps}


def of(counts: Mapping[int, int], qps: Sequence[int]) -> dict[int, int]:
    return {qp: counts.get(qp, 0) for qp in qps}


def column(rows: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, int]:
    return {qp: row[name] for qp, row in rows.items()}


def gained(leaf: Leaf, before: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, int]:
    """What a leaf's paths have counted since."""
    return {path: row[name] - before[path][name] for path, row in leaf.paths().items()}


@pytest.mark.timeout(420)
def test_losses_are_those_of_the_wire(four_spine: Fabric, faults: Faults) -> None:
    """Lost in the fabric, in order and amid late packets, and lost before the leaf: each is told where it happened."""
    fabric = four_spine
    source, destination = fabric.hosts[0], fabric.hosts[-1]
    near, far = Leaf(fabric, leaf_of(fabric, source)), Leaf(fabric, leaf_of(fabric, destination))
    for leaf in (near, far):
        fabric.start_qpd(leaf.name, QUIET, wait=False)
    for leaf in (near, far):
        fabric.wait_qpd(leaf.name, START)
    victim = min(near.paths())
    link = near.link(victim)
    spine = link.other(near.name).node

    def dropped(qps: Sequence[int]) -> dict[int, int]:
        return of(faults.dropped(), qps)

    def happened(qps: Sequence[int]) -> int:
        return sum(dropped(qps).values())

    def run(
        qps: Sequence[int],
        fault: AbstractContextManager[object, bool | None],
        counts: Callable[[Sequence[int]], int] = happened,
    ) -> Result:
        flow = Flow(source, destination, qps, rate=RATE)
        return asyncio.run(traffic_under(fabric, flow, near, fault, lambda: counts(qps)))

    # In order: exact, for every QP and path; the sender's leaf has nothing to say, as nothing is sent again.
    paths_near, paths_far = near.paths(), far.paths()
    result = run(IN_THE_FABRIC, faults.losing(fabric, link, spine))
    wanted = dropped(IN_THE_FABRIC)
    assert sum(wanted.values()) >= ENOUGH
    assert {qp.qp: qp.lost for qp in result.qps} == wanted, (
        "what the receiver misses is what the wire dropped"
    )
    assert column(rows_in(far, IN_THE_FABRIC), "lost") == wanted
    lost = gained(far, paths_far, "lost_in")
    assert lost == {path: sum(wanted.values()) if path == arriving_by(far, spine) else 0 for path in lost}
    assert set(column(near.rows(IN_THE_FABRIC), "lost_at_host").values()) == {0}
    assert set(gained(near, paths_near, "lost_at_host").values()) == {0}
    assert {qp for qp, count in wanted.items() if count} <= {
        qp for qp, path in near.current(IN_THE_FABRIC).items() if path == victim
    }

    # Late packets are not lost ones: within 1 %.
    def both_happened(qps: Sequence[int]) -> int:
        return min(happened(qps), 2 * sum(of(faults.delayed(), qps).values()))

    with ExitStack() as both:
        both.enter_context(faults.delaying(fabric, link, spine))
        both.enter_context(faults.losing(fabric, link, spine))
        run(REORDERED, both.pop_all(), both_happened)
    wanted, rows = dropped(REORDERED), rows_in(far, REORDERED)
    assert sum(wanted.values()) >= ENOUGH
    assert sum(column(rows, "out_of_order").values()) >= ENOUGH / 4, "the delay puts packets behind others"
    counted = column(rows, "lost")
    assert sum(abs(counted[qp] - wanted[qp]) for qp in wanted) <= 0.01 * sum(wanted.values()), (
        counted,
        wanted,
    )

    # Before the leaf: told apart from the fabric, exact.
    port: Link = fabric.topology.links_of(source)[0]
    paths_near = near.paths()
    run(BEFORE_THE_LEAF, faults.losing(fabric, port, near.name))
    wanted, rows = dropped(BEFORE_THE_LEAF), near.rows(BEFORE_THE_LEAF)
    assert column(rows, "lost_at_host") == wanted
    assert set(column(rows, "lost").values()) == {0}
    assert sum(gained(near, paths_near, "lost_at_host").values()) == sum(wanted.values())
    assert set(gained(near, paths_near, "lost").values()) == {0}


def arriving_by(leaf: Leaf, spine: str) -> str:
    """The leaf's path to a spine."""
    return next(name for name in leaf.paths() if leaf.link(name).other(leaf.name).node == spine)
