"""Compiles and pins bench/programs.c beside the classifier: ``python -m bench.compile PIN_DIR QPS_MAX SOURCES CACHE``.

A process of its own, as qpd's loader is: bcc and its compiler stay out of the process that measures.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qpd.kernel import bpf, headers, loader, sources

PROGRAMS = (
    *("bench_same", "bench_random", "bench_next"),
    *("bench_empty", "bench_parse", "bench_floor", "bench_insert"),
)


def main(pin_dir: str, qps_max: str, folder: str, cache: str) -> None:
    """Compile with the flags and headers of the classifier; its maps are taken from their pins."""
    import bcc  # noqa: PLC0415 - 65 MB, in this process only

    spec = loader.Spec(pin_dir, int(qps_max), cache, folder)
    os.environ["BCC_KERNEL_SOURCE"] = str(headers.find(Path(cache)))
    module = bcc.BPF(text=sources.flattened(Path(folder), "programs.c"), cflags=list(spec.flags))
    for name in PROGRAMS:
        bpf.obj_pin(module.load_func(name, bcc.BPF.SCHED_CLS).fd, spec.pins.directory / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
