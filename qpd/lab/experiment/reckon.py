"""The figures of a trial, from what was seen of it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.lab import faults
from qpd.lab.experiment.drive import Done, Outcome, QpOutcome
from qpd.lab.faults import Fault
from qpd.lab.topology import Endpoint, Link, Topology

Key = tuple[str, int]
"""A queue pair as the wire shows it: destination address, number."""

STAYED_NS = 300_000_000
"""A link on which packets are seen so shortly before it is healed has not been left."""


def hurt_links(fault: Fault, topology: Topology) -> frozenset[Link]:
    """The links that a fault hits; none where it is a daemon that suffers."""
    if isinstance(fault, faults.Cut | faults.Loss | faults.Delay):
        return frozenset({topology.link(*fault.link.split())})
    if isinstance(fault, faults.Reboot):
        return frozenset(topology.links_of(fault.node))
    if isinstance(fault, faults.Partition):
        return frozenset(fault.links(topology))
    return frozenset()


def hurt_qps(
    done: Collection[Done], placement: Mapping[Key, Collection[Endpoint]], topology: Topology
) -> set[Key]:
    """The queue pairs that were on a link that a fault hits, by where they were before it.

    All of them where a fault hits no link: then whatever happens is its doing.
    """
    found: set[Key] = set()
    for one in done:
        links = hurt_links(one.fault, topology)
        ends = {end for link in links for end in link.ends}
        found |= {key for key, places in placement.items() if not links or ends & set(places)}
    return found


def silences(outcome: Outcome, hurt: Collection[Key]) -> tuple[dict[str, float], set[str]]:
    """The measures of outage, and the names of those that are lower bounds."""
    if not outcome.faults:
        return {}, set()
    found: dict[str, float] = {}
    bounds: set[str] = set()
    for name, chosen in (
        ("outage_s", [qp for qp in outcome.qps if (qp.destination, qp.qp) in hurt]),
        ("outage_unhurt_s", [qp for qp in outcome.qps if (qp.destination, qp.qp) not in hurt]),
    ):
        known = [qp for qp in chosen if qp.silence_ns is not None]
        if known:
            worst = max(known, key=lambda qp: qp.silence_ns or 0)
            found[name] = max(0, (worst.silence_ns or 0) - outcome.nominal_gap_ns) / 1e9
            if _ended_by_healing(worst, outcome):
                bounds.add(name)
    return found, bounds


def _ended_by_healing(qp: QpOutcome, outcome: Outcome) -> bool:
    """True where a silence lasted until a fault was undone: who knows how long it would have lasted."""
    begin = qp.silence_at_ns or 0
    end = begin + (qp.silence_ns or 0)
    return any(
        one.end_ns is not None and begin < one.end_ns <= end and begin >= one.begin_ns - 1_000_000_000
        for one in outcome.faults
    ) or (end >= outcome.end_ns)


def left_after(
    outcome: Outcome,
    sightings: npt.NDArray[np.void],
    links: Mapping[int, Link],
    destinations: Collection[int],
    topology: Topology,
) -> tuple[dict[str, float], set[str]]:
    """How long data packets were still seen on a link of gray loss; a lower bound where it was never left.

    Args:
        outcome: of the trial.
        sightings: seen packets, in the order of time.
        links: what the sightings' `link` means.
        destinations: addresses (as numbers) to which data flow: answers of the hosts there are no choice of the leaf.
        topology: of the fabric.
    """
    for one in outcome.faults:
        if not isinstance(one.fault, faults.Loss) or one.fault.percent >= 100 or one.end_ns is None:
            continue
        hurt = [index for index, link in links.items() if link in hurt_links(one.fault, topology)]
        during = sightings[(sightings["time_ns"] >= one.begin_ns) & (sightings["time_ns"] < one.end_ns)]
        seen = during[
            np.isin(during["link"], hurt)
            & np.isin(during["destination"], np.array(list(destinations), dtype=np.uint32))
        ]
        if not len(seen):
            continue
        last = int(seen["time_ns"][-1])
        stayed = one.end_ns - last < STAYED_NS
        return {"left_s": (last - one.begin_ns) / 1e9}, {"left_s"} if stayed else set()
    return {}, set()


def iterations(rows: Collection[Mapping[str, Any]], done: Collection[Done]) -> dict[str, float]:
    """The measures of iterations: each row has `begin_ns`, `end_ns`, `seconds`, `communication_s`, `wrong_values`.

    Those that a fault touches count for the stall, the others for the means; where a fault touches all, all count. What
    they are compared with are those before the first fault, where there are any: what comes after may still be slower,
    on the paths that are left.
    """
    if not rows:
        return {}
    touched = [row for row in rows if any(_overlap(row, one) for one in done)]
    calm = [row for row in rows if row not in touched] or list(rows)
    found = {
        "iteration_s": float(np.mean([row["seconds"] for row in calm])),
        "communication_s": float(np.mean([row["communication_s"] for row in calm])),
        "wrong_values": float(sum(row["wrong_values"] for row in rows)),
    }
    if touched and len(touched) < len(rows):
        first = min(one.begin_ns for one in done)
        before = [row for row in rows if row["end_ns"] <= first]
        usual = median(row["seconds"] for row in before or calm)
        found["stall_s"] = max(0.0, max(row["seconds"] for row in touched) - usual)
        late = [row["seconds"] - usual for row in rows if row["end_ns"] > first]
        found["lost_time_s"] = max(0.0, sum(late))
    return found


def _overlap(row: Mapping[str, Any], one: Done) -> bool:
    end = one.end_ns if one.end_ns is not None else row["end_ns"]
    return bool(row["begin_ns"] < end and one.begin_ns < row["end_ns"])


def totals(outcome: Outcome) -> dict[str, float]:
    """Sums over all queue pairs."""
    found: dict[str, float] = {"qp_errors": sum(qp.error is not None for qp in outcome.qps)}
    if all(qp.received_packets is not None for qp in outcome.qps):
        found["lost_packets"] = sum(qp.sent_packets - (qp.received_packets or 0) for qp in outcome.qps)
    if all(qp.retransmitted_packets is not None for qp in outcome.qps):
        found["retransmitted_packets"] = sum(qp.retransmitted_packets or 0 for qp in outcome.qps)
    seconds = (outcome.end_ns - outcome.begin_ns) / 1e9
    if seconds > 0 and all(qp.received_bytes is not None for qp in outcome.qps):
        found["goodput_bps"] = sum(qp.received_bytes or 0 for qp in outcome.qps) * 8 / seconds
    return found
