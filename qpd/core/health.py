"""Whether a path may serve: what speaks against it, and how long it must have been well again."""

from __future__ import annotations

from dataclasses import dataclass

from qpd.core.config import PlannerConfig
from qpd.model import Reason

_DOUBLINGS_MAX = 30
_BFD = (Reason.BFD_DOWN, Reason.BFD_SILENT)


@dataclass(slots=True)
class Health:
    """Up, failing, or held after a failure; flaps lengthen the hold (as RFC 2439 does, by doubling, not decay).

    ``judge`` is called with the worst reason that holds now, or ``Reason.NONE``. The first judgement makes no hold: a
    path that is well when it is first seen serves at once.
    """

    config: PlannerConfig
    failing: Reason = Reason.NONE
    hold_until: float | None = None
    flaps: int = 0
    """Falls in a row with less than ``stable_after`` of service before each."""
    _serving_since: float | None = None
    _judged: bool = False
    _fell: bool = False
    _last: Reason = Reason.NONE
    """What spoke against it last."""
    _last_at: float = 0.0
    """Since when that was the worst."""
    _hold: float = 0.0
    """How long the last return was held."""

    @property
    def serving(self) -> bool:
        """Neither failing nor held."""
        return self.failing is Reason.NONE and self.hold_until is None

    def judge(self, failure: Reason, now: float, bfd_up_since: float | None = None) -> None:
        """Take in what speaks against the path at this time.

        ``bfd_up_since``: since when its BFD session is known to be Up, where that is longer than it is told; the hold
        counts from then if BFD was what spoke against the path last.
        """
        self._end_hold(now)
        if failure is not Reason.NONE:
            if self.failing is Reason.NONE:
                self._fall(now)
            if failure is not self.failing:
                self._last, self._last_at = failure, now
            self.failing = failure
        elif self.failing is not Reason.NONE:
            self.failing = Reason.NONE
            self._return(now)
        elif not self._judged:
            self._serving_since = now
        self._judged = True
        if self.hold_until is not None and bfd_up_since is not None and self._last in _BFD:
            self.hold_until = min(self.hold_until, max(bfd_up_since, self._last_at) + self._hold)
            self._end_hold(now)

    def _end_hold(self, now: float) -> None:
        if self.hold_until is not None and now >= self.hold_until:
            self._serving_since, self.hold_until = self.hold_until, None

    def _fall(self, now: float) -> None:
        served = 0.0 if self._serving_since is None else now - self._serving_since
        if self._fell:
            stable = served >= self.config.stable_after
            self.flaps = 0 if stable else min(self.flaps + 1, _DOUBLINGS_MAX)
        self._fell = True
        self.hold_until = None
        self._serving_since = None

    def _return(self, now: float) -> None:
        longest = max(self.config.hold_up, self.config.hold_up_max)
        self._hold = min(self.config.hold_up * 2.0**self.flaps, longest)
        if self._hold > 0:
            self.hold_until = now + self._hold
        else:
            self._serving_since = now


@dataclass(slots=True)
class Grayness:
    """Whether a path loses or delays more than its siblings, and how long it is out of service for that.

    Out of service nobody sees how it fares, so after a while it gets another chance; a path that is soon gray again has
    to wait twice as long.
    """

    config: PlannerConfig
    found: bool = False
    until: float | None = None
    """Out of service until then, where another path can take its place; None: it may serve."""
    _times: int = 0
    """How often in a row it was gray again soon after its return."""
    _returned: float | None = None

    def hold(self, now: float) -> float:
        """Take it out of service; returns for how many seconds."""
        soon = self._returned is not None and now - self._returned < self.config.stable_after
        self._times = min(self._times + 1, _DOUBLINGS_MAX) if soon else 0
        longest = max(self.config.gray_hold, self.config.gray_hold_max)
        seconds = min(self.config.gray_hold * 2.0**self._times, longest)
        self.until = now + seconds
        return seconds

    def is_over(self, now: float) -> bool:
        """Whether it has waited long enough."""
        return self.until is not None and now >= self.until

    def look_again(self, now: float) -> None:
        """It could not be spared: its traffic judges it all the time, and only for as long as that is no better."""
        self.until = now + self.config.gray_hold

    def give_back(self, now: float) -> None:
        """Another chance: only traffic can tell."""
        self._returned = now
        self.forgive()

    def forgive(self) -> None:
        """It is as good as others."""
        self.found, self.until = False, None
