"""The metrics: accepted by Prometheus' own checker, documented, absent where not measured."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from qpd.metrics import (
    FAILOVER_CAUSES,
    METRICS,
    NATIVE,
    Distribution,
    FaultSample,
    MetricsSnapshot,
    NeverFalling,
    document,
    exposition,
)
from tests.unit.api.fake_state import FakeState

ROOT = Path(__file__).parents[3]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

# DESIGN, section 5: others write dashboards against these.
NAMES = {
    "qpd_path_up",
    "qpd_path_packets_total",
    "qpd_path_bytes_total",
    "qpd_path_lost_packets_total",
    "qpd_path_rtt_seconds",
    "qpd_path_qps",
    "qpd_failovers_total",
    "qpd_verdicts_total",
    "qpd_bfd_session_up",
    "qpd_qp_packets_total",
    "qpd_qp_bytes_total",
    "qpd_qp_lost_packets_total",
    "qpd_qp_retransmitted_packets_total",
    "qpd_qp_rtt_seconds",
    "qpd_qp_series_dropped",
}
OPENMETRICS_2 = "application/openmetrics-text; version=2.0.0"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def snapshot() -> MetricsSnapshot:
    state = FakeState(count=500)
    await state.drain("dc1-spine2", drain=True)
    return await state.metrics()


def samples(snapshot: MetricsSnapshot) -> Samples:
    body, _ = exposition(snapshot)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def promtool(*arguments: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: run 'scripts/setup test' (Debian package prometheus)")
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, check=False, timeout=60)


def test_the_names_of_the_contract_are_declared() -> None:
    assert {metric.name for metric in METRICS} >= NAMES


def test_prometheus_own_checker_accepts_every_declared_metric(snapshot: MetricsSnapshot) -> None:
    measured = replace(
        snapshot,
        bfd_sessions=tuple(replace(session, downs=1) for session in snapshot.bfd_sessions),
        reactions=Distribution((0.001, 0.01), (3, 2, 1), 0.75),
    )
    body, _ = exposition(measured)
    exported = {line.split()[2] for line in body.decode().splitlines() if line.startswith("# TYPE qpd_")}
    assert exported == {metric.name for metric in METRICS}
    done = promtool("check", "metrics", text=body)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_a_distribution_is_a_histogram_of_cumulative_buckets(snapshot: MetricsSnapshot) -> None:
    found = samples(replace(snapshot, reactions=Distribution((0.001, 0.01), (3, 2, 1), 0.75)))
    buckets = {le: value(found, "qpd_reaction_seconds_bucket", le=le) for le in ("0.001", "0.01", "+Inf")}
    assert buckets == {"0.001": 3, "0.01": 5, "+Inf": 6}
    assert value(found, "qpd_reaction_seconds_count") == 6
    assert value(found, "qpd_reaction_seconds_sum") == 0.75


def test_the_checker_can_refuse(snapshot: MetricsSnapshot) -> None:
    body, _ = exposition(snapshot)
    assert promtool("check", "metrics", text=body + b"# TYPE qpd_x counter\nqpd_x 1\n").returncode != 0


def test_openmetrics_is_given_to_who_asks_for_it(snapshot: MetricsSnapshot) -> None:
    body, content_type = exposition(snapshot, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    parsed = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parsed}
    assert families["qpd_failovers"].type == "counter"
    assert exposition(snapshot)[1].startswith("text/plain")


def test_the_figures_are_those_of_the_snapshot(snapshot: MetricsSnapshot) -> None:
    found = samples(snapshot)
    spine1, spine2 = snapshot.paths[0], snapshot.paths[1]
    assert value(found, "qpd_path_packets_total", path="dc1-spine1", direction="out") == spine1.packets_out
    assert value(found, "qpd_path_bytes_total", path="dc1-spine1", direction="in") == spine1.bytes_in
    assert value(found, "qpd_path_up", path="dc1-spine1") == 1
    assert value(found, "qpd_path_up", path="dc1-spine2") == 0
    assert value(found, "qpd_path_state", path="dc1-spine2", state="drained") == 1
    assert value(found, "qpd_path_state", path="dc1-spine2", state="down") == 0
    assert (spine2.qps, spine2.homes) == (0, 125)
    assert value(found, "qpd_path_qps", path="dc1-spine2") == 0
    assert value(found, "qpd_path_homes", path="dc1-spine2") == 125
    assert value(found, "qpd_failovers_total", path="dc1-spine2", cause="drained") == 1
    assert value(found, "qpd_verdicts_total", hook="steer", verdict="not_roce") == 812
    qp = snapshot.busiest[0]
    labels = {"vni": "10010", "src": qp.src, "dst": qp.dst, "dest_qp": str(qp.dest_qp), "path": qp.path}
    assert value(found, "qpd_qp_packets_total", **labels) == qp.packets


def test_the_busiest_qps_have_series_and_the_others_are_counted(snapshot: MetricsSnapshot) -> None:
    found = samples(snapshot)
    series = [labels for name, labels in found if name == "qpd_qp_bytes_total"]
    assert len(series) == 200
    assert value(found, "qpd_qp_series_dropped") == 300
    least = min(amount for (name, _), amount in found.items() if name == "qpd_qp_bytes_total")
    state = FakeState(count=500)
    assert sum(int(octets) > least for octets in state.values["bytes"]) == 199


def test_what_is_not_measured_is_absent_not_zero(snapshot: MetricsSnapshot) -> None:
    """The busiest QP sends datagrams; a path without an answer has no round-trip times."""
    silent = replace(snapshot, paths=(replace(snapshot.paths[0], rtt=None), *snapshot.paths[1:]))
    found = samples(silent)
    datagrams = snapshot.busiest[0]
    assert datagrams.lost is None
    of_it = {
        name
        for name, labels in found
        if ("dest_qp", str(datagrams.dest_qp)) in labels and ("dst", datagrams.dst) in labels
    }
    assert of_it == {
        "qpd_qp_packets_total",
        "qpd_qp_bytes_total",
        "qpd_qp_cnps_total",
        "qpd_qp_ecn_marked_packets_total",
    }
    timed = {dict(labels)["path"] for name, labels in found if name == "qpd_path_rtt_seconds_count"}
    assert snapshot.paths[0].name not in timed
    assert timed


def test_losses_are_told_by_direction_and_side(snapshot: MetricsSnapshot) -> None:
    found = samples(snapshot)
    path = snapshot.paths[2]
    labels = {"path": path.name}
    assert path.faults_out.lost > 0
    assert value(found, "qpd_path_lost_packets_total", direction="out", **labels) == path.faults_out.lost
    assert value(found, "qpd_path_lost_packets_total", direction="in", **labels) == path.faults_in.lost == 2
    assert value(found, "qpd_host_lost_packets_total", direction="out", **labels) == 3
    assert value(found, "qpd_path_retransmitted_packets_total", direction="in", **labels) == 5


@pytest.mark.skipif(not NATIVE, reason="needs prometheus-client 0.23, which writes native histograms")
def test_native_histograms_are_for_who_can_read_them(snapshot: MetricsSnapshot) -> None:
    native = 'qpd_path_rtt_seconds{path="dc1-spine1"} {'
    assert native not in exposition(snapshot)[0].decode()
    assert native not in exposition(snapshot, OPENMETRICS)[0].decode()
    body, content_type = exposition(snapshot, OPENMETRICS_2)
    assert "version=2.0.0" in content_type
    (line,) = [line for line in body.decode().splitlines() if line.startswith(native)]
    assert line.partition("} ")[2] == (
        "{count:60.0,sum:0.006,schema:2,zero_threshold:0.0,zero_count:0.0,"
        "positive_spans:[-54:1,9:1,4:1],positive_deltas:[50,-41,-8]}"
    )
    assert 'qpd_path_rtt_seconds_bucket{le="0.001",path="dc1-spine1"} 59' in body.decode()


def test_failovers_of_every_cause_start_at_zero(snapshot: MetricsSnapshot) -> None:
    found = samples(snapshot)
    causes = [labels for name, labels in found if name == "qpd_failovers_total"]
    assert len(causes) == len(snapshot.paths) * len(FAILOVER_CAUSES)
    assert value(found, "qpd_failovers_total", path="dc1-spine1", cause="bfd-silent") == 0


def test_a_node_without_paths_exports_what_it_has() -> None:
    found = samples(MetricsSnapshot(version="1", node="leaf1", placement="hash"))
    assert value(found, "qpd_info", node="leaf1", version="1", placement="hash") == 1
    assert value(found, "qpd_qp_series_dropped") == 0
    assert not [name for name, _ in found if name.startswith("qpd_path")]


def test_names_with_quotes_and_newlines_are_escaped(snapshot: MetricsSnapshot) -> None:
    odd = replace(snapshot, paths=(replace(snapshot.paths[0], name='spine "1"\n\\'),))
    assert value(samples(odd), "qpd_path_up", path='spine "1"\n\\') == 1


def test_names_follow_the_rules() -> None:
    for metric in METRICS:
        assert metric.name.startswith("qpd_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        assert metric.name.endswith("_seconds") == (metric.unit == "seconds"), metric.name


def test_the_document_is_current() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == document(), (
        "write docs/metrics.md anew: python -m qpd.metrics"
    )


def test_metric_names_are_written_nowhere_else_in_the_code() -> None:
    names = {metric.name for metric in METRICS}
    for path in (ROOT / "qpd").rglob("*.py"):
        if path.name not in ("metrics.py", "settings.py") and "lab" not in path.parts:
            text = path.read_text()
            assert not [name for name in names if name in text], path


def test_a_late_packet_does_not_make_a_counter_fall(snapshot: MetricsSnapshot) -> None:
    """Prometheus takes a fall for a restart, and would count everything once more."""
    held = NeverFalling()

    def path(packets: int, lost: int) -> int:
        faults = FaultSample(lost=lost)
        (kept,) = held.paths([replace(snapshot.paths[0], packets_in=packets, faults_in=faults)])
        return kept.faults_in.lost

    assert [path(10, 3), path(12, 2), path(14, 4), path(5, 1)] == [3, 3, 4, 1]

    def qp(packets: int, at_host: int | None) -> int | None:
        (kept,) = held.qps([replace(snapshot.busiest[1], packets=packets, lost_at_host=at_host)])
        return kept.lost_at_host

    assert [qp(10, 3), qp(12, 2), qp(13, None), qp(14, 4), qp(5, 1)] == [3, 3, None, 4, 1]
    held.qps([])
    assert qp(20, 0) == 0, "forgotten with its series"
    assert path(6, 0) == 1, "paths are not forgotten with QPs"
