"""Experiment files: what they mean, and that whatever is wrong with one is told by its key and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpd.lab import topology
from qpd.lab.experiment.model import NO_BFD, ConstantRate, Steering, read
from qpd.lab.experiment.run import topology_of
from qpd.lab.experiment.runner import plans
from qpd.lab.workload import Workload
from qpd.yamlfile import SettingsError

ROOT = Path(__file__).parents[4]
READY = sorted((ROOT / "configs/experiments").glob("*.yaml"))

GOOD = """\
name: spread
title: Spread
question: How even?
fabric:
  topology: lab
workload:
  kind: constant-rate
  flows: [{source: a, destination: b}]
conditions:
  - ecmp
  - {name: fast, steering: balanced, bfd: 10x3}
figures: [leaf_jain]
faults:
  - {at: 1, for: 2, cut: leaf1--spine1}
sweep: {key: workload.qps, values: [4, 8], label: queue pairs}
repetitions: 3
small:
  repetitions: 1
  workload: {duration: 0.5}
"""


def write(directory: Path, text: str) -> Path:
    file = directory / "experiment.yaml"
    file.write_text(text)
    return file


def problems(directory: Path, text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(write(directory, text))
    return [str(problem).removeprefix(f"{directory}/") for problem in caught.value.problems]


def test_a_file_means_what_it_says(tmp_path: Path) -> None:
    experiment = read(write(tmp_path, GOOD))
    assert [(one.name, one.steering, one.bfd) for one in experiment.conditions] == [
        ("ecmp", Steering.ECMP, None),
        ("fast", Steering.BALANCED, (10, 3)),
    ]
    assert experiment.topology == tmp_path / "lab"
    assert experiment.base == "ecmp", "the first condition is the baseline"
    workloads = [point.experiment.workload for point in experiment.points()]
    assert [one.qps for one in workloads if isinstance(one, ConstantRate)] == [4, 8]


def test_the_small_form_stands_over_the_rest(tmp_path: Path) -> None:
    experiment = read(write(tmp_path, GOOD), small=True, seed=7)
    assert isinstance(experiment.workload, ConstantRate)
    assert (experiment.repetitions, experiment.workload.duration, experiment.seed) == (1, 0.5, 7)
    assert [flow.source for flow in experiment.workload.flows] == ["a"], "what small does not say stays"
    with pytest.raises(SettingsError, match="small: is missing"):
        read(write(tmp_path, GOOD[: GOOD.index("small:")]), small=True)


def test_no_bfd_is_slower_than_bgp(tmp_path: Path) -> None:
    experiment = read(write(tmp_path, GOOD.replace("bfd: 10x3", "bfd: off")))
    assert experiment.conditions[1].bfd == NO_BFD
    assert NO_BFD[0] * NO_BFD[1] > 180_000, "BGP's hold time ends first"


def test_an_unknown_key_is_told_with_the_nearest(tmp_path: Path) -> None:
    text = GOOD.replace("  flows", "  qqs: 1\n  flows")
    assert problems(tmp_path, text) == [
        "experiment.yaml:8: workload.qqs: no such key; did you mean workload.qps?"
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("steering: balanced", "steering: best", 'experiment.yaml:11: conditions.1.steering: "best" is not possible'),
        ("10x3", "1x3", "experiment.yaml:11: conditions.1.bfd: \"1x3\" is no BFD timer"),
        ("{at: 1,", "{", "experiment.yaml:13: faults: "),
        ("kind: constant-rate", "kind: storm", "experiment.yaml:6: workload: kind: give one of constant-rate"),
        ("[leaf_jain]", "[leaf_jam]", 'experiment.yaml:12: figures.0: "leaf_jam" is no measure'),
        ("[4, 8]", "[0]", "experiment.yaml:6: workload.qps: 0 is too small; give 1 or more"),
        ("name: fast", "name: ecmp", "experiment.yaml: conditions: 'ecmp' is there twice"),
        ("title: Spread", "baseline: none", "experiment.yaml: title: is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_line_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    found = problems(tmp_path, GOOD.replace(old, new))
    assert any(line.startswith(told) for line in found), found


def test_a_workload_is_one_of_the_labs_or_a_profile_of_it(tmp_path: Path) -> None:
    text = GOOD.replace(
        "kind: constant-rate\n  flows: [{source: a, destination: b}]", "profile: allreduce\n  bytes: 1000"
    )
    experiment = read(
        write(tmp_path, text.replace("sweep", "# sweep").replace("  workload: {duration: 0.5}", ""))
    )
    assert isinstance(experiment.workload, Workload)
    assert (experiment.workload.kind, experiment.workload.bytes) == ("allreduce", 1000)
    told = problems(tmp_path, text.replace("bytes: 1000", "qqs: 3"))
    assert any("workload.qqs" in line for line in told), told


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
def test_ready_experiments_fit_their_labs(file: Path, small: bool, tmp_path: Path) -> None:
    experiment = read(file, small=small)
    lab = topology.load(topology_of(experiment, tmp_path))
    for point in experiment.points():
        point.experiment.faults.check(lab)
        assert set(point.experiment.workload.hosts) <= set(lab.nodes)
    assert experiment.name == file.stem
    trials = plans(experiment)
    assert [plan.number for plan in trials] == list(range(len(trials)))
    if small:
        assert len(trials) <= 4, "CI runs it: seconds"
    else:
        assert experiment.repetitions >= 5, "intervals want repetitions"


def test_all_that_was_promised_is_ready() -> None:
    names = {file.stem for file in READY}
    assert {
        "distribution",
        "failover",
        "gray-failure",
        "allreduce",
        "parameter-server",
        "wan-sweep",
        "scale",
    } <= names


def test_conditions_take_turns(tmp_path: Path) -> None:
    order = [
        (plan.repetition, plan.sweep, plan.condition.name) for plan in plans(read(write(tmp_path, GOOD)))
    ]
    assert order[:4] == [(0, "4", "ecmp"), (0, "4", "fast"), (0, "8", "ecmp"), (0, "8", "fast")]
    assert order[4:6] == [(1, "4", "fast"), (1, "4", "ecmp")]
    assert len(order) == len(set(order)) == 12
