"""What a workload's run comes to: times of iterations, phases and ranks; queue pairs; wrong values. Pure.

All times are CLOCK_MONOTONIC nanoseconds, so that faults and counters can be put on the same axis.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpd.lab.endpoint.report import QpReport
from qpd.lab.workload.model import Workload
from qpd.lab.workload.rank import PhaseTimes


@dataclass(frozen=True)
class RankTimes:
    """One rank's iteration."""

    host: str
    begin_ns: int
    """It begins to compute."""
    communicate_ns: int
    """It begins to communicate."""
    end_ns: int
    """It has the sum, and all that it sent is acknowledged."""
    phases: tuple[PhaseTimes, ...]
    wrong_values: int
    """Elements that are not the sum."""

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return {
            "host": self.host,
            "begin_ns": self.begin_ns,
            "communicate_ns": self.communicate_ns,
            "end_ns": self.end_ns,
            "wrong_values": self.wrong_values,
        }


@dataclass(frozen=True)
class Iteration:
    """One iteration of all ranks."""

    number: int
    phases: tuple[str, ...]
    ranks: tuple[RankTimes, ...]
    """Workers first, then servers."""
    workers: int

    @property
    def begin_ns(self) -> int:
        """The first worker begins to compute."""
        return min(rank.begin_ns for rank in self.ranks[: self.workers])

    @property
    def communicate_ns(self) -> int:
        """The first worker begins to communicate."""
        return min(rank.communicate_ns for rank in self.ranks[: self.workers])

    @property
    def end_ns(self) -> int:
        """The last rank has ended."""
        return max(rank.end_ns for rank in self.ranks)

    @property
    def seconds(self) -> float:
        """All of it."""
        return (self.end_ns - self.begin_ns) / 1e9

    @property
    def communication(self) -> float:
        """Seconds from the first worker's first message to the last rank's end."""
        return (self.end_ns - self.communicate_ns) / 1e9

    @property
    def wrong_values(self) -> int:
        """Elements that are not the sum, at all ranks."""
        return sum(rank.wrong_values for rank in self.ranks)

    def _behind(self, at: Sequence[int]) -> tuple[str, float]:
        last = max(range(len(at)), key=at.__getitem__)
        return self.ranks[last].host, (at[last] - statistics.median(at)) / 1e9

    @property
    def straggler(self) -> tuple[str, float]:
        """The host that ends last, and the seconds by which it is behind the median."""
        return self._behind([rank.end_ns for rank in self.ranks])

    @property
    def late_start(self) -> tuple[str, float]:
        """The worker that begins to communicate last, and the seconds by which it is behind the median."""
        return self._behind([rank.communicate_ns for rank in self.ranks[: self.workers]])

    def to_json(self) -> dict[str, Any]:
        """One object, times in nanoseconds and durations in seconds."""
        (straggler, lag), (late, late_by) = self.straggler, self.late_start
        return {
            "number": self.number,
            "begin_ns": self.begin_ns,
            "communicate_ns": self.communicate_ns,
            "end_ns": self.end_ns,
            "seconds": self.seconds,
            "compute_s": (self.communicate_ns - self.begin_ns) / 1e9,
            "communication_s": self.communication,
            "straggler": straggler,
            "lag_s": lag,
            "late_start": late,
            "late_start_s": late_by,
            "wrong_values": self.wrong_values,
            "phases": [self._phase(index) for index in range(len(self.phases))],
            "ranks": [rank.to_json() for rank in self.ranks],
        }

    def _phase(self, index: int) -> dict[str, Any]:
        times = [rank.phases[index] for rank in self.ranks if rank.phases[index].begin_ns]
        begin = min((one.begin_ns for one in times), default=0)
        end = max((one.end_ns for one in times), default=0)
        return {
            "phase": index,
            "name": self.phases[index],
            "begin_ns": begin,
            "end_ns": end,
            "seconds": (end - begin) / 1e9,
        }


@dataclass
class Report:
    """A run."""

    workload: Workload
    iterations: list[Iteration] = field(default_factory=list)
    """Those that all ranks have ended."""
    qps: list[QpReport] = field(default_factory=list)
    adapters: dict[str, dict[str, int]] = field(default_factory=dict)
    """By host: what concerned no queue pair."""
    failures: list[str] = field(default_factory=list)
    """Ranks that gave up, and why."""

    @property
    def wrong_values(self) -> int:
        """Elements that were not the sum, of all iterations and ranks."""
        return sum(one.wrong_values for one in self.iterations)

    @property
    def ok(self) -> bool:
        """All iterations were done, all sums were right, no queue pair died."""
        return (
            len(self.iterations) == self.workload.iterations
            and self.wrong_values == 0
            and not self.failures
            and all(qp.error is None for qp in self.qps)
        )

    @property
    def begin_ns(self) -> int:
        """Begin of the first iteration; 0 where there is none."""
        return self.iterations[0].begin_ns if self.iterations else 0

    @property
    def end_ns(self) -> int:
        """End of the last iteration; 0 where there is none."""
        return self.iterations[-1].end_ns if self.iterations else 0

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return {
            "workload": self.workload.to_mapping(),
            "ok": self.ok,
            "wrong_values": self.wrong_values,
            "failures": self.failures,
            "begin_ns": self.begin_ns,
            "end_ns": self.end_ns,
            "iterations": [one.to_json() for one in self.iterations],
            "qps": [one.to_json() for one in self.qps],
            "adapters": self.adapters,
        }


def rank_times(host: str, said: Mapping[str, Any]) -> RankTimes:
    """What a rank's program says of an iteration."""
    return RankTimes(
        host=host,
        begin_ns=said["begin_ns"],
        communicate_ns=said["communicate_ns"],
        end_ns=said["end_ns"],
        phases=tuple(PhaseTimes(**one) for one in said["phases"]),
        wrong_values=said["wrong_values"],
    )
