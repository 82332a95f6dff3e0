"""What stands in configs/ for Prometheus and Grafana speaks of metrics that exist, and Prometheus accepts it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qpd.metrics import METRICS
from qpd.model import PathState, Verdict
from qpd.settings import load_settings
from tests.unit.metrics.test_metrics import ROOT, promtool

RULES = ROOT / "configs/rules.yml"
RULES_TESTS = sorted(Path(__file__).parent.glob("rules*_test.yml"))
DASHBOARD = ROOT / "configs/grafana-dashboard.json"
LABELS = {
    metric.name + suffix: set(metric.labels)
    for metric in METRICS
    for suffix in ("", "_bucket", "_count", "_sum")
}
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
# What Prometheus itself adds, and what the client library exports of every process.
ADDED = {"instance", "job"}
OF_THE_LIBRARY = {"process_resident_memory_bytes", "process_cpu_seconds_total", "up"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def expressions() -> list[str]:
    found = [rule["expr"] for rule in rules()]
    found += [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    found += [
        variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable
    ]
    return found


@pytest.mark.parametrize("expression", expressions())
def test_expressions_use_metrics_that_are_measured(expression: str) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    measured = {metric.name + suffix for metric in METRICS for suffix in SUFFIXES[metric.kind]}
    names = set(re.findall(r"\b(?:\w+:qpd_[\w:]+|qpd_\w+|process_\w+|up)\b", expression))
    assert names
    assert names - OF_THE_LIBRARY - recorded <= measured


@pytest.mark.parametrize("expression", expressions())
def test_expressions_select_by_labels_and_values_that_exist(expression: str) -> None:
    values = {
        "verdict": {verdict.name.lower() for verdict in Verdict},
        "state": {state.value for state in PathState},
        "direction": {"out", "in"},
        "hook": {"steer", "observe"},
        "cause": {"drained"},
    }
    for name, selector in re.findall(r"\b(qpd_\w+)\{([^}]*)\}", expression):
        for label, given in re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"', selector):
            assert label in LABELS[name] | ADDED, f"{name} has no label {label}"
            assert given in values.get(label, {given}), f"{label} is never {given}"


def test_prometheus_accepts_rules_and_configuration() -> None:
    assert promtool("check", "rules", str(RULES)).returncode == 0
    assert promtool("check", "config", str(ROOT / "configs/prometheus.yml")).returncode == 0


def test_alerts_fire_when_they_shall_and_not_otherwise() -> None:
    done = promtool("test", "rules", *map(str, RULES_TESTS))
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_every_alert_is_tested() -> None:
    tests = [test for file in RULES_TESTS for test in yaml.safe_load(file.read_text())["tests"]]
    fired = {
        case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


def test_the_scrape_file_names_the_default_address() -> None:
    scrape = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [load_settings(None).metrics.listen]


def test_panels_have_a_title_a_description_and_a_place_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        assert panel["title"]
        assert panel.get("description") or panel["type"] == "row", panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    identities = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(identities)) == len(identities)
