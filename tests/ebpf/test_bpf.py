"""The system call itself: what it gives back, and how it fails."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from qpd.kernel import bpf
from tests.conftest import BPFFS, PREFIX
from tests.ebpf.other_program import OtherProgram, instruction


@pytest.fixture
def table() -> Iterator[int]:
    fd = bpf.map_create(bpf.MapType.HASH, 4, 8, 3, name="a_name_that_is_longer_than_it_may_be")
    yield fd
    os.close(fd)


def key(number: int) -> bytes:
    return struct.pack("=I", number)


def value(number: int) -> bytes:
    return struct.pack("=Q", number)


def test_a_map_says_what_it_is(table: int) -> None:
    info = bpf.map_info(table)
    assert (info.type, info.key_size, info.value_size, info.max_entries) == (bpf.MapType.HASH, 4, 8, 3)
    assert info.name == "a_name_that_is_"
    fd = bpf.map_get_fd_by_id(info.id)
    assert bpf.map_info(fd) == info
    os.close(fd)


def test_one_entry(table: int) -> None:
    assert bpf.lookup(table, key(1), 8) is None
    assert bpf.get_next_key(table, None, 4) is None
    bpf.update(table, key(1), value(10))
    assert bpf.lookup(table, key(1), 8) == value(10)
    assert bpf.get_next_key(table, None, 4) == key(1)
    with pytest.raises(FileExistsError, match="BPF_MAP_UPDATE_ELEM"):
        bpf.update(table, key(1), value(11), bpf.NOEXIST)
    assert bpf.delete(table, key(1))
    assert not bpf.delete(table, key(1))
    with pytest.raises(FileNotFoundError):
        bpf.update(table, key(1), value(11), bpf.EXIST)


def test_a_batch_stops_where_the_map_is_full(table: int) -> None:
    keys, values = bytearray(b"".join(map(key, range(4)))), bytearray(b"".join(map(value, range(4))))
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_BATCH"):
        bpf.update_batch(table, keys, values, 4)
    assert [bpf.lookup(table, key(number), 8) for number in range(4)] == [value(0), value(1), value(2), None]
    assert bpf.delete_batch(table, bytearray(key(2) + key(9) + key(0)), 3) == 1


def test_a_test_run_gives_back_packet_context_and_verdict() -> None:
    program = bpf.prog_load(
        [
            instruction(0x62, dst=1, offset=48, immediate=77),  # skb->cb[0] = 77
            instruction(0xB7, immediate=7),
            instruction(0x95),
        ],
        name="seven",
    )
    try:
        assert bpf.prog_info(program).name == "seven"
        packet = bytes(range(60))
        result = bpf.prog_test_run(program, packet, ctx_in=bytes(192), repeat=10)
        assert (result.retval, result.data_out) == (7, packet)
        assert struct.unpack_from("=I", result.ctx_out, 48) == (77,)
        assert bpf.prog_test_run(program, packet).ctx_out == b""
    finally:
        os.close(program)


def test_a_program_names_its_maps() -> None:
    program = OtherProgram()
    assert len(bpf.prog_info(program.fd).map_ids) == 1
    fd = bpf.prog_get_fd_by_id(program.id)
    assert bpf.prog_info(fd) == bpf.prog_info(program.fd)
    os.close(fd)
    program.close()


def test_pins_and_their_errors_name_call_and_path(table: int) -> None:
    path = BPFFS / f"{PREFIX}-pin"
    with pytest.raises(FileNotFoundError, match=rf"BPF_OBJ_GET.*{path}"):
        bpf.obj_get(path)
    bpf.obj_pin(table, path)
    try:
        with pytest.raises(FileExistsError, match=rf"BPF_OBJ_PIN.*{path}"):
            bpf.obj_pin(table, path)
        fd = bpf.obj_get(path)
        assert bpf.map_info(fd).id == bpf.map_info(table).id
        os.close(fd)
    finally:
        path.unlink()


def test_an_unknown_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(OSError, match="pdp11"):
        bpf.map_create(bpf.MapType.ARRAY, 4, 4, 1)
