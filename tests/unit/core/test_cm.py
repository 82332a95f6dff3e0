"""Connections from CM messages, seen at the asker's leaf and at the other one."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from qpd.core.cm import REQUESTS_MAX, Change, CmBook, Connection
from qpd.model import CmKind, CmMessage, Hook, QueuePairKey

A, B, C = (ip_address(f"10.1.0.{last}") for last in (1, 2, 3))


def message(kind: CmKind, src: object, dst: object, hook: Hook, **more: int) -> CmMessage:
    fields = {"vni": 100, "local_id": 0, "remote_id": 0, "qpn": 0, "psn": 0, "kernel_ns": 0, **more}
    return CmMessage(kind, hook, src=src, dst=dst, **fields)  # type: ignore[arg-type]


def connect(book: CmBook, leaves: bool = True, *, asker: int = 17, asked: int = 23, ids: int = 1) -> Change:
    there, back = (Hook.STEER, Hook.OBSERVE) if leaves else (Hook.OBSERVE, Hook.STEER)
    assert book.take(message(CmKind.REQ, A, B, there, local_id=ids, qpn=asker)) == Change()
    return book.take(message(CmKind.REP, B, A, back, local_id=900 + ids, remote_id=ids, qpn=asked))


@pytest.mark.parametrize("leaves", [True, False], ids=["asker's leaf", "asked one's leaf"])
def test_a_reply_tells_both_qps(leaves: bool) -> None:
    asker, asked = QueuePairKey(100, A, 17), QueuePairKey(100, B, 23)
    wanted = Connection(asker, asked) if leaves else Connection(asked, asker)
    assert connect(CmBook(), leaves) == Change(wanted)


def test_a_repeated_reply_changes_nothing() -> None:
    book = CmBook()
    made = connect(book)
    reply = message(CmKind.REP, B, A, Hook.OBSERVE, local_id=901, remote_id=1, qpn=23)
    assert made.made is not None
    assert book.take(reply) == Change()


def test_packets_to_a_qp_are_in_its_hosts_network() -> None:
    """Routed between two networks at each end: the VNI differs by direction."""
    book = CmBook()
    book.take(message(CmKind.REQ, A, B, Hook.STEER, vni=200, local_id=1, qpn=17))
    change = book.take(message(CmKind.REP, B, A, Hook.OBSERVE, vni=100, local_id=2, remote_id=1, qpn=23))
    assert change.made == Connection(QueuePairKey(100, A, 17), QueuePairKey(200, B, 23))


def test_a_reply_to_nothing_or_to_another_says_nothing() -> None:
    book = CmBook()
    book.take(message(CmKind.REQ, A, B, Hook.STEER, local_id=1, qpn=17))
    for src, dst, remote, hook in ((C, A, 1, Hook.OBSERVE), (B, A, 2, Hook.OBSERVE), (B, A, 1, Hook.STEER)):
        assert book.take(message(CmKind.REP, src, dst, hook, remote_id=remote, qpn=23)) == Change()


def test_a_rejected_request_is_forgotten() -> None:
    book = CmBook()
    book.take(message(CmKind.REQ, A, B, Hook.STEER, local_id=1, qpn=17))
    book.take(message(CmKind.REJ, B, A, Hook.OBSERVE, remote_id=1))
    assert book.take(message(CmKind.REP, B, A, Hook.OBSERVE, remote_id=1, qpn=23)) == Change()


def test_a_disconnect_ends_it_from_either_side_once() -> None:
    for src, dst, qpn in ((A, B, 23), (B, A, 17)):
        book = CmBook()
        made = connect(book).made
        goodbye = message(CmKind.DREQ, src, dst, Hook.STEER, qpn=qpn)
        assert book.take(message(CmKind.DREQ, C, dst, Hook.STEER, qpn=qpn)) == Change()
        assert book.take(goodbye) == Change(None, (made,))  # type: ignore[arg-type]
        assert book.take(goodbye) == Change()


def test_a_number_that_is_connected_anew_ends_what_it_was() -> None:
    book = CmBook()
    first = connect(book).made
    assert first is not None
    second = connect(book, asked=24, ids=2)
    assert second.ended == (first,)
    assert second.made == Connection(QueuePairKey(100, A, 17), QueuePairKey(100, B, 24))


def test_requests_without_reply_do_not_pile_up() -> None:
    book = CmBook()
    for number in range(REQUESTS_MAX + 1):
        book.take(message(CmKind.REQ, A, B, Hook.STEER, local_id=number, qpn=number))
    assert book.take(message(CmKind.REP, B, A, Hook.OBSERVE, remote_id=0, qpn=9)) == Change()
    assert book.take(message(CmKind.REP, B, A, Hook.OBSERVE, remote_id=1, qpn=9)).made is not None
