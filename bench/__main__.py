"""`make bench`, or ``python -m bench [--quick] [--only PART]...``: measure, show, write build/bench/bench.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import classifier, daemon, machine, report, throughput
from bench.figures import BenchError, Target
from bench.scope import Terminated, scope
from qpd.kernel.sources import SourcesMissingError
from qpd.lab.errors import LabError

SCHEMA = 1
PARTS: dict[str, Callable[..., tuple[dict[str, Any], list[Target]]]] = {
    "classifier": classifier.run,
    "throughput": throughput.run,
    "daemon": daemon.run,
}


def main(arguments: list[str] | None = None) -> int:
    """0: measured, whether or not the targets were reached; 1: could not, for the reason printed; 2: wrong usage."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if os.geteuid() != 0:
        console.print("bench: needs root (network namespaces, BPF): sudo make bench")
        return 1
    try:
        result, targets = _measure(options)
    except (BenchError, LabError, SourcesMissingError, OSError) as error:
        console.print(f"bench: {error}", style="red", markup=False)
        return 1
    except (KeyboardInterrupt, Terminated):
        console.print("bench: interrupted; everything was removed")
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report.show(console, result, targets)
    console.print(f"{options.output}: written")
    return 0


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    begun = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - begun:5.1f} s] {line}", flush=True)

    result: dict[str, Any] = {
        "schema": SCHEMA,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": machine.facts(),
    }
    targets: list[Target] = []
    with scope() as names:
        for part in options.only or PARTS:
            result[part], more = PARTS[part](
                names, quick=options.quick, folder=options.sources, progress=progress
            )
            targets += more
    result["targets"] = [target.json() for target in targets]
    result["seconds"] = round(time.monotonic() - begun, 1)
    return result, targets


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under a minute")
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), help="this part alone (again for more)"
    )
    parser.add_argument(
        "--sources",
        type=Path,
        metavar="DIR",
        help="measure the classifier's C sources in DIR instead of ebpf/",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("build/bench/bench.json"), help="(%(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
