"""The independent reckoning itself: it must be right, and able to be wrong, before it judges anyone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ebpf.reckoning import Key, Packet, Reckoning, agreed, answered, packets, reckon

DATA = Path(__file__).parents[1] / "data" / "roce"
QP = Key(0, "10.0.0.2", 7)
WRITE, READ = 0x07, 0x0C


def requests(*psns: int, opcode: int = WRITE, length: int | None = None) -> list[Packet]:
    return [
        Packet(frame, QP, "10.0.0.1", 0, opcode, psn % (1 << 24), None, length, 1024, b"")
        for frame, psn in enumerate(psns)
    ]


@pytest.mark.parametrize(
    ("psns", "lost", "retransmitted", "out_of_order"),
    [
        pytest.param((5, 6, 7, 8), 0, 0, 0, id="in order"),
        pytest.param((-2, -1, 0, 1), 0, 0, 0, id="around the end of 24 bits"),
        pytest.param((5, 6, 9), 2, 0, 0, id="two never come"),
        pytest.param((5, 7, 6, 8), 0, 0, 1, id="one comes late"),
        pytest.param(
            (5, 7, 8, 6, 7, 8, 9), 1, 3, 0, id="one is lost and go-back-N sends it and two more again"
        ),
        pytest.param((5, 6, 7, 5, 6, 7, 8), 0, 3, 0, id="lost behind the observer: repetition without a gap"),
        pytest.param((5, 7, 6, 6, 8), 1, 2, 0, id="a filling that is repeated was a repetition itself"),
        pytest.param((5, 6, 5_000_000, 5_000_001), 0, 0, 0, id="a new connection of the same number"),
        pytest.param((100, 100 - 3, 98, 99, 101), 0, 0, 3, id="late ones from before the first"),
    ],
)
def test_what_is_missing_late_and_sent_again(
    psns: tuple[int, ...], lost: int, retransmitted: int, out_of_order: int
) -> None:
    found = reckon(requests(*psns))[QP]
    assert (found.lost, found.retransmitted, found.out_of_order) == (lost, retransmitted, out_of_order)
    assert found.packets == len(psns)


def test_a_read_takes_a_number_for_each_packet_of_its_answer() -> None:
    mtu = requests(0)
    reads = requests(1, 9, 17, opcode=READ, length=8192)
    assert reckon([*mtu, *reads])[QP] == Reckoning(packets=4, connections=1)
    short = requests(1, 9, 18, opcode=READ, length=8192)
    assert reckon([*mtu, *short])[QP].lost == 1


@pytest.mark.parametrize("capture", sorted(DATA.glob("*.pcap")), ids=lambda path: path.stem)
def test_both_kinds_of_evidence_for_pairs_agree(capture: Path) -> None:
    """What connection managers say is what acknowledgements show; and nobody has two peers at one time."""
    frames = packets(capture)
    said = {frozenset((pair.asked, pair.answered)) for pair in agreed(frames)}
    shown = {frozenset((pair.asked, pair.answered)) for pair in answered(frames)}
    assert said
    assert said <= shown
    assert len(shown) >= 20
