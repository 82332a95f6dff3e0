"""What a configuration means, and that what is wrong with one is said in a line: where, which key, how to mend it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qpd import settings_docs
from qpd.settings import (
    Settings,
    SettingsError,
    as_mapping,
    leaves,
    load_settings,
    parse_duration,
    variable_of,
)

ROOT = Path(__file__).parents[3]

# DESIGN: "starts with no configuration at all"; these keys and defaults are a contract with programs and people.
DEFAULTS = {
    "node": socket.gethostname(),
    "uplinks": "auto",
    "planes": {},
    "weights": {},
    "placement": "balanced",
    "hold_up": 1.0,
    "symmetric": True,
    "gray.action": "report",
    "frr.socket_dir": "/var/run/frr",
    "bpf.pin_dir": "/sys/fs/bpf/qpd",
    "bpf.qps_max": 131072,
    "api.socket": "/run/qpd/qpd.sock",
    "metrics.listen": "127.0.0.1:9791",
}

Load = Callable[[str], Settings]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("QPD_") and name != "QPD_TEST_SESSION":
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str) -> Settings:
        file = tmp_path / "qpd.yaml"
        file.write_text(text)
        return load_settings(file)

    return load


def flat(mapping: dict[str, object], prefix: str = "") -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and key not in ("planes", "weights"):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def errors(load: Load, text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(text)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems), "each error is one line"
    return [line.rpartition("qpd.yaml")[2].lstrip(": ") for line in lines]


# --- what it means


def test_without_any_configuration_the_documented_defaults_hold() -> None:
    effective = flat(as_mapping(load_settings(None)))
    assert {key: effective[key] for key in DEFAULTS} == DEFAULTS


def test_an_empty_file_and_empty_sections_mean_the_defaults(load: Load) -> None:
    assert load("") == load("# nothing\n") == load("bpf:\nmetrics:\n") == load_settings(None)


def test_every_key_can_be_set_and_is_read_back(load: Load) -> None:
    text = """
node: leaf1
uplinks: [eth1, eth2]
planes: {spine1: red, eth2: 2}
weights: {spine1: 400}
placement: hash
symmetric: false
symmetric_idle: 20ms
hold_up: 500ms
idle_after: 2m
reconcile_interval: 30
frr: {socket_dir: /var/run/frr/leaf1}
bpf: {pin_dir: /sys/fs/bpf/leaf1, attach: clsact, qps_max: 4096}
api: {socket: /run/qpd/leaf1.sock, group: qpd}
metrics: {listen: "[::1]:9792", qp_series_max: 0}
override: {table: 100, priority: 5}
gray: {action: drain, loss: 0.02, factor: 2, delay: 10ms, min_samples: 100, window: 2, hold: 1m}
log: {level: debug, format: json}
"""
    settings = load(text)
    effective = flat(as_mapping(settings))
    defaults = flat(as_mapping(load_settings(None)))
    assert set(effective) == set(defaults)
    assert [key for key in effective if effective[key] == defaults[key]] == [], "all of them differ"
    assert settings.uplinks == ("eth1", "eth2")
    assert settings.planes == {"spine1": "red", "eth2": "2"}
    assert (settings.hold_up, settings.idle_after) == (0.5, 120.0)
    assert settings.metrics.address == ("::1", 9792)


def test_what_is_printed_can_be_read_again(load: Load) -> None:
    first = load("uplinks: [eth1]\nweights: {eth1: 3}\nhold_up: 1.5s\nmetrics: {listen: off}\n")
    assert load(yaml.safe_dump(as_mapping(first))) == first


def test_settings_do_not_change() -> None:
    settings = load_settings(None)
    with pytest.raises(ValueError, match="frozen"):
        setattr(settings, "placement", "hash")  # noqa: B010 - mypy knows that it cannot be assigned
    with pytest.raises(ValueError, match="frozen"):
        setattr(settings.bpf, "qps_max", 5)  # noqa: B010


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9791", ("127.0.0.1", 9791)),
        ("'[::1]:9791'", ("::1", 9791)),
        ("'[fe80::1%eth0]:1'", ("fe80::1%eth0", 1)),
        ("localhost:0", ("localhost", 0)),
        ("off", None),
        ("'off'", None),
    ],
)
def test_where_metrics_listen(load: Load, listen: str, address: tuple[str, int] | None) -> None:
    assert load(f"metrics: {{listen: {listen}}}").metrics.address == address


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h", 3600), ("3", 3), (2, 2), (0.25, 0.25)],
)
def test_durations(given: object, seconds: float) -> None:
    assert parse_duration(given) == pytest.approx(seconds)


@given(st.text())
def test_a_duration_is_read_or_refused_but_nothing_else_happens(text: str) -> None:
    said = ""
    try:
        assert isinstance(parse_duration(text), float)
    except ValueError as error:
        said = str(error)
    assert "500ms" in said or not said


# --- the environment


def test_the_environment_wins_over_the_file(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPD_PLACEMENT", "hash")
    monkeypatch.setenv("QPD_BPF__QPS_MAX", "4096")
    monkeypatch.setenv("QPD_UPLINKS", "eth3, eth4")
    monkeypatch.setenv("QPD_WEIGHTS", "eth3=2,eth4=5")
    monkeypatch.setenv("QPD_PLANES", '{"eth3": "red"}')
    monkeypatch.setenv("QPD_HOLD_UP", "250ms")
    settings = load("placement: balanced\nbpf: {qps_max: 2048, attach: tcx}\n")
    assert settings.placement == "hash"
    assert (settings.bpf.qps_max, settings.bpf.attach) == (4096, "tcx"), "other keys of the section stay"
    assert settings.uplinks == ("eth3", "eth4")
    assert settings.weights == {"eth3": 2, "eth4": 5}
    assert settings.planes == {"eth3": "red"}
    assert settings.hold_up == 0.25


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPD_BPF__QPS_MAX", "3")
    with pytest.raises(SettingsError) as caught:
        load_settings(None)
    assert str(caught.value) == (
        "environment variable QPD_BPF__QPS_MAX: bpf.qps_max: '3' is too small; give 1024 or more"
    )


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("QPD_HOLDUP", "holdup: no such key; did you mean QPD_HOLD_UP?"),
        ("QPD_BPF__NOTHING_LIKE_IT", "bpf.nothing_like_it: no such key; unset it"),
        ("QPD_BPF", "bpf: is no JSON; set QPD_BPF__KEY instead"),
        (
            "QPD_PLANES",
            "planes: '{x' is no JSON (Expecting property name enclosed in double quotes); give {\"eth1\": 1}",
        ),
        ("QPD_WEIGHTS", "weights: '{x' is no JSON"),
    ],
)
def test_a_variable_that_cannot_be_meant_so_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "{x")
    with pytest.raises(SettingsError) as caught:
        load_settings(None)
    assert str(caught.value).startswith(f"environment variable {variable}: {said}")


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Kubernetes gives the neighbours of a service named qpd.
    monkeypatch.setenv("QPD_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("QPD_PORT_9791_TCP_ADDR", "10.0.0.1")
    load_settings(None)


# --- errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("holdup: 3", "1: holdup: no such key; did you mean hold_up?"),
        ("\n\nbpf:\n  atach: tcx", "4: bpf.atach: no such key; did you mean bpf.attach?"),
        ("zebra: 3", "1: zebra: no such key; remove it"),
        ("_env_file: /etc/passwd", "1: _env_file: no such key; remove it"),
        ("node: ''", "1: node: '' must be one word, not empty and without blanks"),
        ("node: a b", "1: node: 'a b' must be one word, not empty and without blanks"),
        ("uplinks: eth1 eth2", "1: uplinks: 'eth1 eth2' 'eth1 eth2' is no interface name"),
        ("uplinks: []", "1: uplinks: [] must be auto or a list of interface names, such as [eth1, eth2]"),
        ("uplinks: [eth1, eth1]", "1: uplinks: ['eth1', 'eth1'] names an interface twice; name each once"),
        ("uplinks: [an-interface-name-too-long]", "1: uplinks:"),
        ("planes: 3", "1: planes: 3 is no mapping; put keys under it (name: value)"),
        ("planes: {eth1: [a]}", "1: planes.eth1: ['a'] is no text; put it in quotes if it is meant so"),
        ("weights: {eth1: 0}", "1: weights.eth1: 0 is too small; give 1 or more"),
        ("weights: {eth1: 65536}", "1: weights.eth1: 65536 is too large; give 65535 or less"),
        ("weights:\n  eth1: heavy", "2: weights.eth1: 'heavy' is no whole number; give one such as 1024"),
        ("placement: random", "1: placement: 'random' is not possible; give 'balanced' or 'hash'"),
        (
            "hold_up: soon",
            "1: hold_up: 'soon' is no duration; give seconds (1.5) or a number with ms, s, m or h",
        ),
        ("hold_up: -1", "1: hold_up: -1 is too small; give 0 or more"),
        ("hold_up: .nan", "1: hold_up: nan"),
        ("hold_up: true", "1: hold_up: True is no duration"),
        (
            "frr: {socket_dir: run/frr}",
            "1: frr.socket_dir: 'run/frr' must be an absolute path, beginning with /",
        ),
        ("bpf: 5", "1: bpf: 5 is no mapping; put keys under it (pin_dir, attach, qps_max)"),
        ("bpf: {qps_max: many}", "1: bpf.qps_max: 'many' is no whole number; give one such as 1024"),
        ("bpf: {qps_max: 1.5}", "1: bpf.qps_max: 1.5 is no whole number; give one such as 1024"),
        (f"api: {{socket: /{'x' * 107}}}", "1: api.socket: "),
        ("metrics: {listen: 9791}", "1: metrics.listen: 9791 must be ADDRESS:PORT, such as 127.0.0.1:9791"),
        ("metrics: {listen: '::1:9791'}", "1: metrics.listen: '::1:9791' must be ADDRESS:PORT"),
        ("metrics: {listen: 'x:65536'}", "1: metrics.listen: 'x:65536' must be ADDRESS:PORT"),
        (
            "override: {table: 254}",
            "1: override.table: 254 is the kernel's own table main; give another number",
        ),
        ("override: {priority: 32766}", "1: override.priority: 32766 is too large; give 32765 or less"),
        (
            "log: {level: loud}",
            "1: log.level: 'loud' is not possible; give 'debug', 'info', 'warning' or 'error'",
        ),
        ("placement: hash\nplacement: balanced", "2: placement: is given twice, first on line 1; keep one"),
        ("bpf: {attach: tcx, attach: tcx}", "1: bpf.attach: is given twice, first on line 1; keep one"),
        ("- node", "1: must map keys to values, such as `placement: hash`"),
        ("just words", "1: must map keys to values, such as `placement: hash`"),
        (
            "node: [",
            "1: is no YAML: expected the node content, but found '<stream end>' in column 8; mend the line",
        ),
        ("node: a\n\tbpf: 3", "2: is no YAML: "),
        ("node: a\n---\nnode: b", "2: is no YAML: "),
        ("node: 2024-13-01", "is no YAML: month must be in 1..12; mend the file"),
        ("node: !!python/object:os.system x", "1: is no YAML: could not determine a constructor"),
    ],
)
def test_every_error_says_where_what_and_how_to_mend_it(load: Load, text: str, said: str) -> None:
    found = errors(load, text)
    assert len(found) == 1
    assert found[0].startswith(said)


def test_all_errors_are_told_at_once_in_the_files_order(load: Load) -> None:
    found = errors(load, "hold_up: x\nbpf:\n  atach: tcx\n  qps_max: 1\nweights: {a: 0, b: x}\nholdup: 1\n")
    assert [line.split(": ")[:2] for line in found] == [
        ["1", "hold_up"],
        ["3", "bpf.atach"],
        ["4", "bpf.qps_max"],
        ["5", "weights.a"],
        ["5", "weights.b"],
        ["6", "holdup"],
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            load_settings(path)
        return str(caught.value)

    assert said(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file; check its name"
    assert said(tmp_path) == f"{tmp_path}: is a directory; give the YAML file in it"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"node: caf\xe9\n")
    assert said(latin) == f"{latin}: byte 9 is no UTF-8; save the file as UTF-8 text"


@given(st.text(alphabet="abc:{}[]-'\"#&*!|>% \n\t0159_.", max_size=60))
def test_any_text_is_either_a_configuration_or_errors_of_a_line_each(text: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        lines = []
        try:
            load_settings(Path(file.name))
        except SettingsError as error:
            lines = str(error).splitlines()
        assert all(line.startswith(file.name) for line in lines)


# --- what is written down


def test_the_example_file_lists_every_key_with_its_default() -> None:
    path = ROOT / "configs/qpd.yaml"
    listed = flat(yaml.safe_load(path.read_text()))
    assert list(listed) == [key for key, _ in leaves()]
    assert load_settings(path) == load_settings(None)


def test_the_example_file_explains_every_key() -> None:
    lines = (ROOT / "configs/qpd.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("#"), f"no explanation above: {line}"


@pytest.mark.parametrize(
    ("path", "text"),
    [("configs/qpd.yaml", settings_docs.example_file()), ("docs/configuration.md", settings_docs.document())],
)
def test_written_documents_are_current(path: str, text: str) -> None:
    assert (ROOT / path).read_text() == text, f"write {path} anew: python -m qpd.settings_docs"


def test_every_key_is_described_and_has_a_variable() -> None:
    document = settings_docs.document()
    for key, info in leaves():
        assert info.description, key
        assert variable_of(key) in document
