"""What the programs take of the verifier and of the stack: room is left for older kernels and for more code."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess

import pytest

from qpd.kernel import bpf
from qpd.model import Hook
from tests.ebpf.harness import Classifier

pytestmark = pytest.mark.root

VERIFIED_MAX = 250_000
"""Of the kernel's 1 000 000 instructions: Linux 6.1 needs about twice what 6.18 does."""
STACK_MAX = 384
"""Of 512 octets."""
_VERIFIED_INSNS = 216
"""Offset in struct bpf_prog_info (Linux 5.16 and later)."""


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
def test_the_verifier_s_work(classifier: Classifier, hook: Hook) -> None:
    (verified,) = struct.unpack_from("=I", bpf._info(classifier.programs[hook], 232), _VERIFIED_INSNS)
    if not verified:
        pytest.skip("this kernel does not tell (Linux 5.16 does)")
    assert 1_000 < verified < VERIFIED_MAX


@pytest.mark.parametrize("hook", list(Hook), ids=lambda hook: hook.name.lower())
def test_the_stack(classifier: Classifier, hook: Hook) -> None:
    if shutil.which("bpftool") is None:
        pytest.skip("needs bpftool (Debian package bpftool)")
    ident = str(bpf.prog_info(classifier.programs[hook]).id)
    dump = subprocess.run(
        ["bpftool", "-j", "prog", "dump", "xlated", "id", ident], capture_output=True, text=True, check=True
    )
    instructions = [one["disasm"] for one in json.loads(dump.stdout) if "disasm" in one]
    depths = [int(depth) for text in instructions for depth in re.findall(r"\(r10 -(\d+)\)", text)]
    assert 16 < max(depths) <= STACK_MAX


def test_the_entry_points_are_nothing_else() -> None:
    from qpd.kernel import sources

    assert len((sources.directory() / "qpd.c").read_text().splitlines()) < 80
