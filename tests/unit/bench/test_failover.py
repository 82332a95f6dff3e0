"""What the failover bench makes of packets and of trials."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from bench.arrivals import _RECORD, _gap
from bench.down_packet import Sent, read
from bench.failover_report import quantile, summarise
from bench.figures import BenchError

MS = 1_000_000


def ipv4_udp(port: int, payload: bytes) -> bytes:
    ip = bytes([0x45, 0]) + bytes(7) + bytes([17]) + bytes(10)
    return ip + struct.pack(">HHHH", 1, port, 8 + len(payload), 0) + payload


def ethernet(payload: bytes) -> bytes:
    return bytes(12) + b"\x08\x00" + payload


def capture(*packets: tuple[int, bytes], magic: int = 0xA1B23C4D) -> bytes:
    data = struct.pack("=IHHIIII", magic, 2, 4, 0, 0, 65535, 1)
    for time_ns, frame in packets:
        data += struct.pack("=4I", time_ns // 10**9, time_ns % 10**9, len(frame), len(frame)) + frame
    return data


BFD_DOWN = ethernet(ipv4_udp(3784, bytes([0x20, 1 << 6]) + bytes(22)))
BFD_UP = ethernet(ipv4_udp(3784, bytes([0x20, 3 << 6]) + bytes(22)))
ROCE = ethernet(ipv4_udp(4789, bytes(8) + ethernet(ipv4_udp(4791, bytes(16)))))
OTHER = ethernet(ipv4_udp(4789, bytes(8) + ethernet(ipv4_udp(53, bytes(16)))))


def test_captures_tell_bfd_states_and_roce() -> None:
    data = capture((5, BFD_UP), (6, ROCE), (2 * 10**9 + 7, BFD_DOWN), (2 * 10**9 + 8, OTHER))
    assert list(read(data)) == [
        Sent(5, 3, roce=False),
        Sent(6, None, roce=True),
        Sent(2 * 10**9 + 7, 1, roce=False),
        Sent(2 * 10**9 + 8, None, roce=False),
    ]


def test_a_capture_cut_short_ends_at_its_last_whole_packet() -> None:
    assert len(list(read(capture((5, BFD_UP), (6, ROCE))[:-1]))) == 2
    assert len(list(read(capture((5, BFD_UP)) + b"\0" * 7))) == 1


def test_microseconds_are_refused() -> None:
    with pytest.raises(BenchError, match="nanoseconds"):
        list(read(capture((5, ROCE), magic=0xA1B2C3D4)))


def records(*packets: tuple[int, int]) -> Any:
    made = np.zeros(len(packets), _RECORD)
    made["psn"], made["time"] = zip(*packets, strict=True)
    return made


def test_the_gap_and_what_was_lost_in_it() -> None:
    gap = _gap(records((0, 0), (1, MS), (30, 30 * MS), (31, 31 * MS)), 32 * MS)
    assert (gap.length_ns, gap.begin_ns, gap.lost) == (29 * MS, MS, 28)


def test_psns_that_wrap_and_come_late_are_no_loss() -> None:
    gap = _gap(records((0xFFFFFF, 0), (1, MS), (0, 2 * MS), (2, 3 * MS)), 4 * MS)
    assert gap.lost == 0


def test_silence_to_the_end_is_a_gap() -> None:
    assert _gap(records((0, 0), (1, MS)), 100 * MS).length_ns == 99 * MS


def test_quantiles_are_trials_and_the_worst_counts() -> None:
    values = [float(value) for value in range(30, 0, -1)]
    assert quantile(values, 0.5) == 15
    assert quantile(values, 0.99) == 30
    assert quantile([7.0], 0.99) == 7


def row(*outages: float, limits: dict[str, float], **more: Any) -> dict[str, Any]:
    trials = [{"outage_ms": outage, "lost": 1, **more} for outage in outages]
    return {"name": "it", "kind": "silent", "mood": "with qpd", "limits": limits, "trials": trials}


def test_a_limit_is_reached_or_it_is_not() -> None:
    result = {"rows": [row(20.0, 41.0, limits={"p50": 32.0, "p99": 40.0})]}
    summarise(result)
    assert result["rows"][0]["reached"] == {"p50": True, "p99": False}
    assert result["rows"][0]["figure"] == "outage"


def test_what_followed_the_down_packet_is_judged_where_it_was_watched() -> None:
    result = {"rows": [row(25.0, limits={"p99": 1.0}, extra={"down_to_last_ms": 0.2})]}
    summarise(result)
    assert result["rows"][0]["summary"]["p99"] == 0.2
    assert result["rows"][0]["reached"] == {"p99": True}
