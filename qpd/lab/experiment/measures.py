"""Every figure that a trial gives: its name, unit, which way is better, and what exactly it means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One figure of a trial."""

    name: str
    """The column of trials.csv and the key of summary.json."""
    label: str
    unit: str
    """As shown; '' for a ratio."""
    scale: float
    """What the stored value (base units) is multiplied by to be shown in `unit`."""
    better: str
    """`lower`, `higher`, or '' where neither is."""
    meaning: str
    digits: int = 2

    @property
    def axis(self) -> str:
        """The label of an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def show(self, value: float | None) -> str:
        """The value as people read it."""
        return "-" if value is None else f"{value * self.scale:,.{self.digits}f}"


MEASURES = (
    Measure(
        "leaf_max_to_mean",
        "leaf uplinks: busiest / mean",
        "",
        1,
        "lower",
        "Bytes sent on the busiest uplink of a sending leaf over the mean of its uplinks; of several leaves the "
        "worst. 1 is even, n is all on one of n.",
    ),
    Measure(
        "leaf_jain",
        "leaf uplinks: Jain's index",
        "",
        1,
        "higher",
        "Jain's fairness index of the same bytes: from 1/n (all on one) to 1 (even); the worst leaf.",
        3,
    ),
    Measure(
        "spine_max_to_mean",
        "inter-site links: busiest / mean",
        "",
        1,
        "lower",
        "The same over all links on which the spines of a sending site send to other sites.",
    ),
    Measure(
        "spine_jain",
        "inter-site links: Jain's index",
        "",
        1,
        "higher",
        "Jain's index of the same bytes.",
        3,
    ),
    Measure(
        "outage_s",
        "outage",
        "ms",
        1e3,
        "lower",
        "The longest silence during a fault at the receiver of any queue pair that was on a link hit by it, less the "
        "nominal gap between two packets. Where packets are acknowledged: the longest time without progress.",
        1,
    ),
    Measure(
        "outage_unhurt_s",
        "silence of the unhurt",
        "ms",
        1e3,
        "lower",
        "The same of queue pairs that were on other links: the machine's own unrest.",
        1,
    ),
    Measure(
        "left_s",
        "hurt link left after",
        "ms",
        1e3,
        "lower",
        "From the fault's begin to the last data packet seen on the hurt link before it was healed.",
        0,
    ),
    Measure("iteration_s", "iteration", "s", 1, "lower", "Mean time of an iteration, compute included.", 3),
    Measure(
        "communication_s",
        "communication per iteration",
        "s",
        1,
        "lower",
        "Mean time from the first rank's first byte to the last rank's last, of an iteration.",
        3,
    ),
    Measure(
        "stall_s",
        "stall of the iteration",
        "ms",
        1e3,
        "lower",
        "By how much the slowest iteration that a fault touched was longer than the median of those before it.",
        0,
    ),
    Measure(
        "lost_time_s",
        "time lost to the fault",
        "s",
        1,
        "lower",
        "By how much all iterations since the fault began were longer, together, than as many of those before it "
        "(their median): what it took, and what leaving its paths took.",
    ),
    Measure(
        "goodput_bps",
        "goodput",
        "Mbit/s",
        1e-6,
        "higher",
        "Data received in order, each byte once, over the time of the traffic.",
        1,
    ),
    Measure("lost_packets", "packets lost", "", 1, "lower", "Packets sent that never arrived.", 0),
    Measure(
        "retransmitted_packets",
        "packets sent again",
        "",
        1,
        "lower",
        "Retransmissions of all queue pairs.",
        0,
    ),
    Measure("qp_errors", "dead queue pairs", "", 1, "lower", "Queue pairs that gave up (retry exceeded).", 0),
    Measure(
        "qpd_resident_bytes",
        "memory of qpd",
        "MB",
        1e-6,
        "lower",
        "Resident memory of the largest qpd daemon when the traffic has ended.",
        0,
    ),
    Measure(
        "wrong_values", "wrong values", "", 1, "lower", "Elements of the reduced data that are not right.", 0
    ),
)

BY_NAME = {measure.name: measure for measure in MEASURES}
