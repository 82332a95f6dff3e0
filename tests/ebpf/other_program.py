"""Somebody else's tc program: counts what it sees and returns what it is told to."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from qpd.kernel import bpf

TC_ACT_UNSPEC, TC_ACT_OK = -1, 0


def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> int:
    """One instruction of struct bpf_insn, as a 64-bit word."""
    return int.from_bytes(struct.pack("=BBhi", code, src << 4 | dst, offset, immediate), "little")


@dataclass
class OtherProgram:
    """A program with a counter of its own. ``verdict``: what it returns."""

    verdict: int = TC_ACT_UNSPEC

    def __post_init__(self) -> None:
        self._map = bpf.map_create(bpf.MapType.ARRAY, 4, 8, 1, name="other")
        self.fd = bpf.prog_load(
            [
                instruction(0x62, dst=10, offset=-4),  # key = 0
                instruction(0xBF, dst=2, src=10),
                instruction(0x07, dst=2, immediate=-4),
                instruction(0x18, dst=1, src=1, immediate=self._map),
                0,
                instruction(0x85, immediate=1),  # bpf_map_lookup_elem
                instruction(0x15, offset=2),
                instruction(0xB7, dst=1, immediate=1),
                instruction(0xDB, dst=0, src=1),  # *value += 1, atomically
                instruction(0xB7, immediate=self.verdict),
                instruction(0x95),
            ],
            name="other",
        )

    @property
    def id(self) -> int:
        return bpf.prog_info(self.fd).id

    def seen(self) -> int:
        """Packets so far."""
        return int.from_bytes(bpf.lookup(self._map, bytes(4), 8) or b"", "little")

    def pin(self, path: Path) -> Path:
        bpf.obj_pin(self.fd, path)
        return path

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._map)
