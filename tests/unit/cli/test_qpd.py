"""qpd's own command: configuration checked, printed, refused."""

from __future__ import annotations

from pathlib import Path

import yaml

from qpd.settings import as_mapping, load_settings
from tests.unit.cli.conftest import ROOT, run


async def test_check_prints_the_effective_configuration(tmp_path: Path) -> None:
    file = tmp_path / "qpd.yaml"
    file.write_text("hold_up: 500ms\nuplinks: [eth1]\n")
    outcome = await run("qpd", "check", str(file))
    assert (outcome.status, outcome.err) == (0, "")
    assert yaml.safe_load(outcome.out) == as_mapping(load_settings(file))
    (tmp_path / "again.yaml").write_text(outcome.out)
    assert await run("qpd", "check", str(tmp_path / "again.yaml")) == outcome


async def test_check_counts_the_environment_in(tmp_path: Path) -> None:
    file = tmp_path / "qpd.yaml"
    file.write_text("placement: balanced\n")
    outcome = await run("qpd", "check", str(file), QPD_PLACEMENT="hash")
    assert yaml.safe_load(outcome.out)["placement"] == "hash"


async def test_check_tells_every_error_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "qpd.yaml"
    file.write_text("hold_up: soon\nbpf:\n  atach: tcx\n")
    outcome = await run("qpd", "check", str(file))
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [
        f"{file}:1: hold_up: 'soon' is no duration; give seconds (1.5) or a number with ms, s, m or h (500ms)",
        f"{file}:3: bpf.atach: no such key; did you mean bpf.attach?",
    ]


async def test_the_shipped_configuration_is_valid() -> None:
    assert (await run("qpd", "check", str(ROOT / "configs/qpd.yaml"))).status == 0


async def test_run_and_detach_refuse_a_wrong_configuration_before_they_touch_anything(tmp_path: Path) -> None:
    for command in ("run", "detach"):
        outcome = await run("qpd", command, "--config", str(tmp_path / "none.yaml"))
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err == f"{tmp_path}/none.yaml: no such file; check its name\n"


async def test_wrong_usage_is_one_line() -> None:
    for arguments in (("check",), ("stop",), ("run", "now")):
        outcome = await run("qpd", *arguments)
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err.startswith("qpd: ")
        assert outcome.err.count("\n") == 1
