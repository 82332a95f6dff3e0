"""What all tiers share: why a test cannot run here, the tally of outcomes, that nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import uuid
from collections import Counter
from pathlib import Path

import pytest

# Every process that a test starts inherits this, so that one which outlives the session is known as ours.
SESSION_VARIABLE = "QPDT_SESSION"
# Tests name namespaces, pins and bridges `qpdt-<pid>...` with the pid of the test session.
PREFIX = f"qpdt-{os.getpid()}"
FRR_DAEMONS = Path("/usr/lib/frr")
NETNS_DIR = Path("/run/netns")
BPFFS = Path("/sys/fs/bpf")
ROOT_TIERS = ("ebpf", "fabric", "guest", "container")
# TCX came with kernel 6.6.
FIRST_WITH_TCX = (6, 6)
# Python's own helper of multiprocessing lives as long as the interpreter.
HARMLESS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

_leftovers = pytest.StashKey[list[str]]()
_counts = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tally",
        type=Path,
        default=None,
        metavar="FILE",
        help="append 'passed|failed|skipped TEST' for every test as it ends (scripts/run-tiers sums these)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whoever ends the session, `timeout` or a shell that ignores SIGINT for its background jobs: fixtures clean up.
        signal.signal(number, _interrupt)
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    config.stash[_leftovers] = []
    config.stash[_counts] = Counter()
    tally: Path | None = config.getoption("--tally")
    if tally is not None:
        tally.parent.mkdir(parents=True, exist_ok=True)
        tally.write_text("")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


# --- what cannot run here, and why


def kernel() -> tuple[int, int]:
    """The running kernel's release, such as (6, 1)."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert match is not None, os.uname().release
    return int(match[1]), int(match[2])


def missing(markers: set[str]) -> str | None:
    """Why a test with these markers cannot run on this machine, in one line; None where it can."""
    if "root" in markers and os.geteuid() != 0:
        return "needs root: network namespaces and BPF; run as root"
    if "frr" in markers and not (FRR_DAEMONS / "zebra").exists():
        return "needs FRR: run 'scripts/setup lab'"
    if "long" in markers and os.environ.get("QPDT_LONG") != "1":
        return "takes minutes and wants a machine of its own: set QPDT_LONG=1"
    if "guest" in markers and shutil.which("qemu-system-x86_64") is None:
        return "needs QEMU: run 'scripts/setup guest'"
    if "tcx" in markers and kernel() < FIRST_WITH_TCX:
        return f"needs TCX, which came with kernel 6.6 (this is {os.uname().release})"
    if "container" in markers and (shutil.which("dockerd") is None or shutil.which("debootstrap") is None):
        return "needs a Docker engine and debootstrap: run 'scripts/setup container'"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        tier = item.path.relative_to(tests).parts[0] if item.path.is_relative_to(tests) else ""
        if tier in ROOT_TIERS:
            item.add_marker("root")
        if tier in ("guest", "container"):
            item.add_marker(tier)
        # A test that is run for each way of attaching says so by a parameter of that name.
        parameters = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        if "tcx" in [value for value in parameters.values() if isinstance(value, str)]:
            item.add_marker("tcx")


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = missing({marker.name for marker in item.iter_markers()})
    if reason is not None:
        pytest.skip(reason)


# --- one outcome for each test


def _record(config: pytest.Config, outcome: str, what: str) -> None:
    config.stash[_counts][outcome] += 1
    tally: Path | None = config.getoption("--tally")
    if tally is not None:
        with tally.open("a") as file:
            file.write(f"{outcome} {what}\n")


class _Outcomes:
    """Turns the reports of set-up, call and tear-down into one outcome a test, told when it has ended."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seen: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        worst = self._seen.get(report.nodeid)
        if report.failed or worst == "failed":
            self._seen[report.nodeid] = "failed"
        elif report.skipped:
            self._seen[report.nodeid] = "skipped"
        elif report.when == "call":
            self._seen[report.nodeid] = "passed"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = self._seen.pop(nodeid, None)
        if outcome is not None:
            _record(self._config, outcome, nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _record(self._config, "failed", f"{report.nodeid} (cannot be collected)")
        elif report.skipped:
            _record(self._config, "skipped", report.nodeid)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Outcomes(session.config), "qpd-outcomes")


# --- nothing left behind


def leftover_namespaces() -> list[str]:
    """Network namespaces with this session's prefix."""
    if not NETNS_DIR.is_dir():
        return []
    return [
        f"network namespace {entry.name}" for entry in NETNS_DIR.iterdir() if entry.name.startswith(PREFIX)
    ]


def leftover_pins() -> list[str]:
    """Entries of bpffs with this session's prefix."""
    if not os.access(BPFFS, os.R_OK | os.X_OK):
        return []
    return [f"BPF pin {entry}" for entry in BPFFS.iterdir() if entry.name.startswith(PREFIX)]


def leftover_processes() -> list[str]:
    """Processes that descend from this session and have outlived their test."""
    mark = f"{SESSION_VARIABLE}={os.environ[SESSION_VARIABLE]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended, or is not ours to read
            continue
        if mark in environment and not any(name in command for name in HARMLESS):
            found.append(
                f"process {entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}"
            )
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    found = leftover_namespaces() + leftover_pins() + leftover_processes()
    session.config.stash[_leftovers] = found
    for what in found:
        _record(session.config, "failed", f"left behind: {what}")
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for what in config.stash[_leftovers]:
        terminalreporter.write_line(f"FAILED left behind after the tests: {what}", red=True)
    counts = config.stash[_counts]
    terminalreporter.write_line(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    )
