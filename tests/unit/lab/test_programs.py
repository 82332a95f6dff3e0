"""The two wire programs, as bytes: what the kernel verifies and runs is tested on the fabric."""

from __future__ import annotations

import struct

import pytest

from qpd.lab import programs


def decode(code: bytes) -> list[tuple[int, int, int, int]]:
    """(opcode, destination register, jump, immediate) of each instruction."""
    return [(op, regs & 0xF, off, imm) for op, regs, off, imm in struct.iter_unpack("<BBhi", code)]


def run_lossy(probability: float, random: int) -> int:
    """Interpret the handful of instructions that `lossy` may use; returns r0."""
    program, counter, r0, threshold = decode(programs.lossy_code(5, 8)), 0, 0, 0
    while True:
        opcode, _, jump, immediate = program[counter]
        counter += 1
        if opcode == 0x18:
            assert (immediate, program[counter][3]) == (5, 8), "map, and offset in its value"
            counter += 1
        elif opcode == 0x61:
            threshold = programs.loss_word(probability)
        elif opcode == 0x85:
            assert immediate == 7, "bpf_get_prandom_u32"
            r0 = random
        elif opcode == 0x77:
            r0 >>= immediate
        elif opcode == 0x3D:
            counter += jump if r0 >= threshold else 0
        elif opcode == 0xB7:
            r0 = immediate
        else:
            assert opcode == 0x95, hex(opcode)
            return r0


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.999])
def test_loss_is_the_part_of_the_random_numbers_that_was_asked_for(probability: float) -> None:
    samples = 20_000
    dropped = sum(run_lossy(probability, i * (2**32 - 1) // (samples - 1)) == 1 for i in range(samples))
    assert dropped / samples == pytest.approx(probability, abs=1 / samples)


@pytest.mark.parametrize(("probability", "result"), [(1.0, 1), (0.0, 2)])
def test_everything_and_nothing(probability: float, result: int) -> None:
    assert {run_lossy(probability, value) for value in (0, 2**31, 2**32 - 1)} == {result}


@pytest.mark.parametrize("probability", [-0.1, 1.01])
def test_other_probabilities_are_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="give 0 to 1"):
        programs.loss_word(probability)


def test_forgetting_the_hash_lets_the_next_program_run() -> None:
    call, result, leave = decode(programs.forget_hash_code())
    assert call[0] == 0x85
    assert call[3] == 41, "bpf_set_hash_invalid"
    assert result == (0xB7, 0, 0, -1), "TC_ACT_UNSPEC: go on"
    assert leave[0] == 0x95
