"""Which direction follows which, seen from both leaves."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from qpd.core.symmetry import Directions, Follow, follow, leads
from qpd.model import NO_PATH, Path, PathState, Reason

RED, BLUE, BLUE_TOO = 0, 1, 2


def path(number: int, plane: str, state: PathState = PathState.UP) -> Path:
    return Path(
        id=number,
        name=f"p{number}",
        interface=f"eth{number}",
        ifindex=number + 1,
        next_hop=ip_address(f"10.0.0.{number}"),
        plane=plane,
        weight=1,
        state=state,
        reason=Reason.NONE,
        since=0.0,
        sole=True,
    )


PATHS = [path(RED, "red"), path(BLUE, "blue")]


def pairs(*rows: tuple[tuple[bytes, int], tuple[bytes, int], int, int], **more: Sequence[int]) -> Directions:
    """Rows: near end, far end, home, where the other direction arrives."""

    def octets(place: int) -> npt.NDArray[np.uint8]:
        return np.array([list(row[place][0]) for row in rows], np.uint8).reshape(len(rows), 16)  # type: ignore[index]

    return Directions(
        near=octets(0),
        near_qp=np.array([row[0][1] for row in rows], np.uint32),
        far=octets(1),
        far_qp=np.array([row[1][1] for row in rows], np.uint32),
        asks=np.array(more.get("asks", [1] * len(rows)), np.bool_),
        asked=np.array(more.get("asked", [1] * len(rows)), np.bool_),
        home=np.array([row[2] for row in rows], np.uint8),
        wish=np.array(more.get("wish", [NO_PATH] * len(rows)), np.uint8),
        arrives=np.array([row[3] for row in rows], np.uint8),
        moves=np.array(more.get("moves", [0] * len(rows)), np.uint32),
    )


LOW, HIGH = bytes(15) + b"\x01", bytes(15) + b"\x02"


def test_the_greater_end_follows() -> None:
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, BLUE)), PATHS) == [Follow(0, BLUE)]
    assert follow(pairs(((LOW, 1), (HIGH, 2), RED, BLUE)), PATHS) == []


def test_answers_follow_what_they_answer() -> None:
    """Whoever the lesser end is: data stay where they were placed."""
    for near, far in ((LOW, HIGH), (HIGH, LOW)):
        rows = ((near, 1), (far, 2), RED, BLUE)
        assert follow(pairs(rows, asks=[0]), PATHS) == [Follow(0, BLUE)]
        assert follow(pairs(rows, asked=[0]), PATHS) == []


def test_who_is_there_stays() -> None:
    assert follow(pairs(((HIGH, 1), (LOW, 2), BLUE, BLUE)), PATHS) == []
    both = [*PATHS, path(BLUE_TOO, "blue")]
    assert follow(pairs(((HIGH, 1), (LOW, 2), BLUE, BLUE_TOO)), both) == []


def test_only_after_a_direction_that_never_moved() -> None:
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, BLUE), moves=[1]), PATHS) == []


def test_what_waits_is_not_asked_again() -> None:
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, BLUE), wish=[BLUE]), PATHS) == []


def test_not_onto_a_dead_path_nor_after_an_unknown_one() -> None:
    dead = [PATHS[RED], path(BLUE, "blue", PathState.DOWN)]
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, BLUE)), dead) == []
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, NO_PATH)), PATHS) == []
    assert follow(pairs(((HIGH, 1), (LOW, 2), RED, 9)), PATHS) == []


def test_parallel_paths_of_a_plane_share() -> None:
    rows = [((HIGH, qp), (LOW, 2), RED, BLUE) for qp in range(8)]
    found = follow(pairs(*rows), [*PATHS, path(BLUE_TOO, "blue")])
    assert sorted(one.path for one in found) == [BLUE] * 4 + [BLUE_TOO] * 4


ends = st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, (1 << 24) - 1))


rows_of_pairs = st.lists(st.tuples(ends, ends, st.booleans(), st.booleans()), min_size=1, max_size=8)


@given(rows_of_pairs)
def test_both_leaves_agree_who_leads(
    rows: list[tuple[tuple[bytes, int], tuple[bytes, int], bool, bool]],
) -> None:
    asks, asked = [row[2] for row in rows], [row[3] for row in rows]
    here = leads(pairs(*[(near, far, RED, BLUE) for near, far, *_ in rows], asks=asks, asked=asked))
    there = leads(pairs(*[(far, near, RED, BLUE) for near, far, *_ in rows], asks=asked, asked=asks))
    for (near, far, out, back), mine, others in zip(rows, here, there, strict=True):
        assert mine == (near < far if out == back else out)
        assert others == (far < near if out == back else back)


def test_nothing_is_known() -> None:
    assert follow(pairs(), PATHS) == []
