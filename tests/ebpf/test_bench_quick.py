"""`python -m bench --quick` runs, checks itself, leaves nothing behind; its JSON is complete. No figure is judged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.scope import BPFFS
from qpd.lab import namespaces

REPOSITORY = Path(__file__).resolve().parents[2]
SPREAD = {"median", "low", "high", "min", "max"}


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench", *arguments, "--output", str(tmp_path / "bench.json")]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(tmp_path: Path, part: str) -> tuple[dict[str, Any], str]:
    process = start(tmp_path, "--quick", "--only", part)
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert left_behind(process.pid) == []
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["schema"] == 1
    assert result["quick"] is True
    assert result["machine"]["kernel"]
    for target in result["targets"]:
        assert target.keys() >= {"name", "figure", "limit", "sense", "reached"}
        assert target["name"].partition(" : ")[0][:20] in output, "the table shows it"
    return result, output


def left_behind(pid: int) -> list[Path]:
    return [
        entry
        for folder in (BPFFS, namespaces.DIRECTORY)
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.startswith(f"qpdb-{pid}-")
    ]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_classifier_part_sets_every_row_against_a_floor_of_the_same_rounds(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "classifier")
    rows = {row["name"]: row for row in result["classifier"]["rows"]}
    assert rows.keys() >= {
        "empty",
        "parse only",
        "floor",
        "steer, own path",
        "steer, redirected",
        "steer, redirected, plain",
        "steer, redirected, over IPv6",
        "steer, TCP",
        "observe",
        "floor, 100 000 QPs",
        "steer, 100 000 QPs",
        "steer, new QP, hash",
        "steer, new QP, balanced",
    }
    for name, row in rows.items():
        assert row["ns"].keys() == SPREAD
        assert len(row["rounds_ns"]) == len(row["rounds_kernel_ns"]) == len(rows["floor"]["rounds_ns"])
        if name.startswith(("steer", "observe")) and "one of 1 QP" not in name:
            assert row["to_floor"]["net"].keys() == SPREAD
            assert row["to_floor"]["floor"] in rows
    assert len(result["targets"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_throughput_part_has_an_aa_pair_and_every_case(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "throughput")
    part = result["throughput"]
    rows = {row["name"]: row for row in part["rows"]}
    cases = {(row["mode"], row["case"], row["both_leaves"]) for row in part["rows"]}
    assert "A/A: without : without" in rows
    assert part["noise"] >= 0
    for mode in {row["mode"] for row in part["rows"]} - {None}:
        for case in ("nothing redirected", "half redirected", "all redirected"):
            assert (mode, case, False) in cases
    for row in part["rows"]:
        assert row["ratio"].keys() == row["wall_ratio"].keys() == SPREAD
        assert len(row["runs"]["with"]) == len(row["runs"]["without"]) == part["pairs"]
        assert all(run["packets"] == row["packets_a_run"] for side in row["runs"].values() for run in side)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_daemon_part_tells_start_memory_scrape_and_loop(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "daemon")
    names = {row["name"] for row in result["daemon"]["rows"]}
    assert names >= {
        "start to steering, compiling",
        "start to steering, adopting",
        "resident at rest",
        "scrape with 100000 QPs",
        "event loop blocked, during scrapes, worst",
    }
    assert all(row["spread"].keys() == SPREAD and row["unit"] for row in result["daemon"]["rows"])


def test_a_run_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "--quick", "--only", "throughput")
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "A/A" in line:  # namespaces, pins and links are there
                assert left_behind(process.pid)
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    finally:
        process.wait()
        process.stdout.close()
    assert process.returncode == 1
    assert "interrupted" in output
    assert left_behind(process.pid) == []
    assert not (tmp_path / "bench.json").exists()


def test_wrong_usage_gets_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--sources", str(tmp_path), "--only", "classifier")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("bench: ")
    assert "no qpd.c there" in output
