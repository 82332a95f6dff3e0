"""Paths that are alive and yet worse than their siblings: gray failures. Pure.

A path is gray when it loses, or delays, clearly more than the paths that serve beside it: what is lost for everybody
(at the far host, say) speaks against none. "Clearly" is statistics: even the low end of what the counts allow (Wilson's
interval) is above both the limit and a multiple of the siblings' loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.model import Event, GrayFound, GrayOver

_Z = 3.3
"""Standard deviations: one look in two thousand shows so much by chance."""
_EASE = 0.5
"""A gray path that serves is no longer gray when it loses, over a whole window in which no part was worse than the
siblings', less than this part of the limit."""
_PARTS = (1, 2, 4, 8)
"""The whole window is judged, and so is its newest half, quarter and eighth: a loss that has just begun is not hidden
by what went well before it. That is what finds it within a second."""


@dataclass(frozen=True, slots=True)
class GrayConfig:
    """What makes a path gray. ``loss``: a fraction. ``delay``: seconds, None: delays are not compared."""

    loss: float = 0.01
    factor: float = 3.0
    """Its loss is so many times its siblings'."""
    delay: float | None = None
    """Its median round-trip time is longer than its siblings' by more than this."""
    min_samples: int = 256
    """Packets (for delay: round-trip times) on the path, and on its siblings together, below which nothing is said.
    Packets that are sent again do not count."""
    window: float = 5.0
    """Seconds that are looked back on."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A path's counters, which only grow. ``lost_*``: of the packets that leave, and that arrive, on it.

    A sender that has lost a packet goes back to it and sends again all that came behind (go-back-N), so that what is
    seen of a loss is one step back, however much was on its way. Every packet that is new and every step back is thus a
    trial, and the step back one that failed; ``resent_out``, the packets that were sent again, are none.
    """

    packets_out: int
    resent_out: int
    lost_out: int
    packets_in: int
    lost_in: int
    rtt: npt.NDArray[np.uint64] | None = None
    """Round-trip times by bucket."""


@dataclass(slots=True)
class _History:
    samples: deque[tuple[float, Sample]] = field(default_factory=deque)
    gray: set[str] = field(default_factory=set)
    """The directions in which it was found worse."""
    worse_at: float = 0.0
    """When it was last."""

    def since(self, time: float) -> Sample:
        """The newest sample that is at least as old, or else the oldest one."""
        found = self.samples[0]
        for sample in self.samples:
            if sample[0] > time:
                break
            found = sample
        return found[1]


class GrayBook:
    """Compares paths look by look. ``rtt_bounds``: upper bounds of the buckets of ``Sample.rtt``, in seconds."""

    def __init__(self, config: GrayConfig, rtt_bounds: npt.NDArray[np.float64]) -> None:
        self._config = config
        self._bounds = rtt_bounds
        self._paths: dict[int, _History] = {}

    def observe(
        self, samples: Mapping[int, Sample], serving: Iterable[int], groups: Iterable[int], now: float
    ) -> list[Event]:
        """What has changed.

        Args:
            samples: counters by path id.
            serving: ids of the paths that serve; others are forgotten, and judged anew when they do.
            groups: for each set of paths that share destinations, their ids as bits: siblings.
            now: the present, in seconds.
        """
        serving = set(serving) & samples.keys()
        for path in self._paths.keys() - serving:
            del self._paths[path]
        for path in serving:
            self._note(self._paths.setdefault(path, _History()), samples[path], now)
        masks = list(groups)
        events: list[Event] = []
        for path in sorted(serving):
            related = 0
            for mask in masks:
                related |= mask if mask >> path & 1 else 0
            siblings = [other for other in serving if other != path and related >> other & 1]
            event = self._judge(path, siblings, now)
            if event is not None:
                events.append(event)
        return events

    def _note(self, history: _History, sample: Sample, now: float) -> None:
        if history.samples and history.samples[-1][1].packets_out > sample.packets_out:
            history.samples.clear()  # another path has the id
        history.samples.append((now, sample))
        while len(history.samples) > 1 and history.samples[1][0] <= now - self._config.window:
            history.samples.popleft()

    def _judge(self, path: int, siblings: list[int], now: float) -> Event | None:
        history = self._paths[path]
        found = self._worse(path, siblings, now)
        if found is not None:
            history.worse_at = now
        if found is not None and found["direction"] not in history.gray:
            history.gray.add(found["direction"])
            return GrayFound(path, found)
        # A short loss is little of a whole window from its first second on: so that must pass without any.
        rested = now - history.worse_at >= self._config.window
        if history.gray and rested and self._eased(path, now):
            history.gray.clear()
            return GrayOver(path)
        return None

    def _worse(self, path: int, siblings: list[int], now: float) -> dict[str, Any] | None:
        """How it is worse: in a direction that is news, where there is one."""
        ways = [self._losing(path, siblings, direction, now) for direction in ("out", "in")]
        found = [way for way in (*ways, self._slower(path, siblings, now)) if way is not None]
        news = [way for way in found if way["direction"] not in self._paths[path].gray]
        return next(iter(news or found), None)

    def _losing(self, path: int, siblings: list[int], direction: str, now: float) -> dict[str, Any] | None:
        for begin in self._begins(now):
            lost, packets = self._counted(path, direction, begin)
            low, _ = interval(lost, packets)
            if packets < self._config.min_samples or low <= self._config.loss:
                continue
            others = [self._counted(sibling, direction, begin) for sibling in siblings]
            others_lost, others_packets = sum(one for one, _ in others), sum(all_ for _, all_ in others)
            if others_packets < self._config.min_samples:
                continue
            if low > self._config.factor * (others_lost + 0.5) / (others_packets + 1):
                return {
                    "direction": direction,
                    "loss": round(lost / packets, 5),
                    "siblings_loss": round(others_lost / others_packets, 5),
                    "samples": packets,
                }
        return None

    def _slower(self, path: int, siblings: list[int], now: float) -> dict[str, Any] | None:
        if self._config.delay is None:
            return None
        for begin in self._begins(now):
            mine = self._rtts(path, begin)
            if mine.sum() < self._config.min_samples or self._median(mine) <= self._config.delay:
                continue
            together = sum((self._rtts(sibling, begin) for sibling in siblings), np.zeros_like(mine))
            if together.sum() < self._config.min_samples:
                continue
            here, there = self._median(mine), self._median(together)
            if here > there + self._config.delay:
                return {
                    "direction": "out",
                    "rtt_ms": round(here * 1e3, 3),
                    "siblings_rtt_ms": round(there * 1e3, 3),
                    "samples": int(mine.sum()),
                }
        return None

    def _eased(self, path: int, now: float) -> bool:
        """Whether what the window holds is well below the limit, in both directions as far as there is traffic."""
        counts = [self._counted(path, direction, now - self._config.window) for direction in ("out", "in")]
        if sum(packets for _, packets in counts) < self._config.min_samples:
            return False
        return all(lost <= _EASE * self._config.loss * packets for lost, packets in counts)

    def _begins(self, now: float) -> list[float]:
        return [now - self._config.window / part for part in _PARTS]

    def _counted(self, path: int, direction: str, begin: float) -> tuple[int, int]:
        """Packets lost, and packets, since then."""
        history = self._paths[path]
        first, last = history.since(begin), history.samples[-1][1]
        if direction == "out":
            lost = max(last.lost_out - first.lost_out, 0)
            new = last.packets_out - first.packets_out - (last.resent_out - first.resent_out)
            return lost, max(new, 0) + lost
        lost = max(last.lost_in - first.lost_in, 0)
        return lost, last.packets_in - first.packets_in + lost

    def _rtts(self, path: int, begin: float) -> npt.NDArray[np.int64]:
        history = self._paths[path]
        first, last = history.since(begin).rtt, history.samples[-1][1].rtt
        if first is None or last is None:
            return np.zeros(len(self._bounds), np.int64)
        return last.astype(np.int64) - first.astype(np.int64)

    def _median(self, counts: npt.NDArray[np.int64]) -> float:
        upto = np.cumsum(counts)
        return float(self._bounds[int(np.searchsorted(upto, (upto[-1] + 1) // 2))])


def interval(events: int, trials: int) -> tuple[float, float]:
    """The low and high end of a fraction of which so many events were seen in so many trials (Wilson, 1927)."""
    if trials <= 0:
        return 0.0, 1.0
    part = min(events / trials, 1.0)
    middle = part + _Z * _Z / (2 * trials)
    spread = _Z * sqrt(part * (1 - part) / trials + _Z * _Z / (4 * trials * trials))
    scale = 1 + _Z * _Z / trials
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)
