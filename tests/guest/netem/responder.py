"""The program of ``responder.c``, attached where requests arrive.

``python -m tests.guest.netem.responder PIN_DIR CACHE`` compiles and pins it: a process of its own, since bcc is large.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qpd.kernel import bpf, headers
from qpd.lab import wires
from tests.conftest import BPFFS, PREFIX

SOURCE = Path(__file__).with_suffix(".c")
RC_SEND_ONLY, RC_ACKNOWLEDGE = 0x04, 0x11
NAK_SEQUENCE = 0x60
RESPONSE_TO = 0x100
"""A request to QP n is answered to QP n + 0x100."""
_PROGRAM = "respond"


class Responder:
    """Compiles from its making on; ``close`` leaves nothing behind. ``cache``: a folder for merged kernel headers."""

    def __init__(self, cache: Path) -> None:
        self._pins = BPFFS / f"{PREFIX}-responder"
        self._pins.mkdir()
        command = [sys.executable, "-m", "tests.guest.netem.responder", str(self._pins), str(cache)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def attach(self, namespace: str, interfaces: Sequence[str]) -> None:
        """Answer what arrives at these interfaces, as long as they are there."""
        assert self._process.stdout is not None
        said = self._process.stdout.read()
        assert self._process.wait() == 0, said
        program = bpf.obj_get(self._pins / _PROGRAM)
        try:
            wires.attach_clsact(program, namespace, interfaces, self._pins)
        finally:
            os.close(program)

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        for pin in self._pins.iterdir():
            pin.unlink()
        self._pins.rmdir()


def main(pins: str, cache: str) -> None:
    """Compile, load, pin."""
    import bcc

    os.environ["BCC_KERNEL_SOURCE"] = str(headers.find(Path(cache)))
    module = bcc.BPF(text=SOURCE.read_text(encoding="utf-8"), cflags=["-O2", f'-DPIN_DIR="{pins}"'])
    bpf.obj_pin(module.load_func(_PROGRAM, bcc.BPF.SCHED_CLS).fd, Path(pins) / _PROGRAM)


if __name__ == "__main__":
    main(*sys.argv[1:])
