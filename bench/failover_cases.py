"""What is measured, and what is to be reached. Milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.failover_rig import Mood
from bench.faults import Kind

SILENT = {"p50": 32.0, "p99": 40.0}
CARRIER = {"p99": 5.0}


@dataclass(frozen=True)
class Case:
    """One kind of fault in one mood of qpd."""

    name: str
    kind: Kind
    mood: Mood
    limits: Mapping[str, float] = field(default_factory=dict)


def _cases(kinds: tuple[Kind, ...], mood: Mood, what: str = "leaf link") -> tuple[Case, ...]:
    absent = mood is Mood.ABSENT
    return tuple(
        Case(
            f"{what} {kind.value}" if kind.silent else kind.value,
            kind,
            mood,
            {} if absent else SILENT if kind.silent else CARRIER,
        )
        for kind in kinds
    )


LEAF_CASES = (
    *_cases(tuple(Kind), Mood.ABSENT),
    *_cases(tuple(Kind), Mood.RUNS),
    *_cases((Kind.BOTH, Kind.FROM_LEAF), Mood.STOPPED),
    *_cases((Kind.BOTH, Kind.FROM_LEAF), Mood.KILLED),
    # The kernel tells no program of a lost carrier: there the tap has its own clock alone.
    *(replace(case, limits={}) for case in _cases((Kind.CUT_HERE, Kind.CUT_THERE), Mood.KILLED)),
)
RETURN_CASES = tuple(
    replace(case, name=f"traffic towards the leaf: {case.name}", limits={})
    for mood in (Mood.ABSENT, Mood.RUNS)
    for case in _cases((Kind.BOTH,), mood)
)
"""What no node beside the link's own two can mend before BGP has withdrawn the route: shown, with nothing to reach."""
DOWN_PACKET = tuple(
    Case("bfdd's Down to the last packet", Kind.BOTH, mood, {"p99": 1.0}) for mood in (Mood.RUNS, Mood.KILLED)
)
SITE_CASES = (
    *_cases((Kind.BOTH,), Mood.ABSENT, "inter-site link"),
    *_cases((Kind.BOTH,), Mood.RUNS, "inter-site link"),
)
STRESS_CASES = tuple(
    replace(case, name=f"{case.name}, under stress")
    for mood in (Mood.ABSENT, Mood.RUNS)
    for case in _cases((Kind.BOTH,), mood, "leaf link")
)
FOLLOW = "groups follow the kernel's routes"
