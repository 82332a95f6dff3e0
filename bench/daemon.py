"""The daemon on a leaf of the small fabric: start, memory, scrapes and event loop with 100 000 QPs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.figures import BenchError, Spread, Target
from bench.frames import PEER, ROCE, host_payload
from bench.scope import Scope
from bench.sender import SOURCE_PORT
from bench.topology import SPINES, Fabric, fabric, receiving_socket
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.lab import namespaces
from qpd.model import Hook, Verdict

QPS = 100_000
QPS_HELD = 99_000
"""Of so many QPs an LRU map of 131 072 must hold at least these; it may give up some before it is full."""
_METRICS = ("127.0.0.1", 9791)
_START_DEADLINE, _COUNT_DEADLINE, _STOP_DEADLINE = 90.0, 60.0, 20.0
_BTH_AND_ICRC = 16
_PROBE_PAUSE = 0.002
Progress = Callable[[str], None]


def run(
    scope: Scope, *, quick: bool, folder: Path | None, progress: Progress
) -> tuple[dict[str, Any], list[Target]]:
    """Measure. ``folder`` is of no use here: a daemon loads its own classifier."""
    if folder is not None:
        return {"rows": [], "skipped": ["the daemon: it loads its own classifier, not --sources"]}, []
    starts, scrapes = (1, 3) if quick else (5, 15)
    rows = _Rows()
    progress("daemon: building the fabric")
    with _leaf(scope) as leaf:
        targets = _starts(leaf, rows, starts, progress)
        targets += _many_qps(leaf, rows, scrapes, progress)
    return {"qps": QPS, "rows": rows.rows, "skipped": []}, targets


class _Rows:
    """What the report shows, one figure a row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, unit: str, values: list[float]) -> Spread:
        """One row; gives its spread."""
        spread = Spread.of(values)
        self.rows.append({"name": name, "unit": unit, "spread": spread.json(), "values": values})
        return spread


def _starts(leaf: _Leaf, rows: _Rows, starts: int, progress: Progress) -> list[Target]:
    """From nothing, and where an earlier daemon's programs run. The last daemon stays."""
    cold, warm, cpu, cpu_again = [], [], [], []
    for number in range(starts):
        progress(f"daemon: start {number + 1} of {starts}, compiling; then again, adopting")
        leaf.stop()
        leaf.forget()
        cold.append(leaf.timed_start())
        cpu.append(leaf.processor_seconds())
        leaf.stop()
        warm.append(leaf.timed_start())
        cpu_again.append(leaf.processor_seconds())
    first = rows.add("start to steering, compiling", "s", cold)
    rows.add("its processor time, children's included", "s", cpu)
    again = rows.add("start to steering, adopting", "s", warm)
    rows.add("its processor time, children's included (adopting)", "s", cpu_again)
    return [
        Target("start to steering, compiling", first.median, 2, "at most", "s", _busy(first, cpu)),
        Target("start to steering, adopting", again.median, 2, "at most", "s", _busy(again, cpu_again)),
    ]


def _many_qps(leaf: _Leaf, rows: _Rows, scrapes: int, progress: Progress) -> list[Target]:
    """At rest, then with 100 000 QPs: memory, scrapes, and how long either makes others wait."""
    rest = rows.add("resident at rest", "MB", [leaf.resident()])
    rows.add("proportional at rest", "MB", [leaf.resident("Pss")])
    idle = leaf.watch_loop(lambda: time.sleep(1.0))
    progress(f"daemon: {QPS} queue pairs")
    leaf.send_first_packets()
    leaf.wait_for_census()
    progress(f"daemon: {scrapes} scrapes, and all QPs listed")
    answers: list[tuple[float, int]] = []
    scraping = leaf.watch_loop(lambda: answers.extend(leaf.scrape() for _ in range(scrapes)))
    scraped = rows.add(f"scrape with {QPS} QPs", "s", [seconds for seconds, _ in answers])
    rows.add(f"size of a scrape with {QPS} QPs", "MB", [octets / 1e6 for _, octets in answers])
    listings: list[tuple[float, bytes]] = []
    listing = leaf.watch_loop(lambda: listings.append(leaf.list_qps()))
    rows.add(f"all {QPS} QPs listed by the API", "s", [taken for taken, _ in listings])
    for _, body in listings:
        leaf.check_listing(body)
    for what, wait in (("at rest", idle), ("during scrapes", scraping), ("during the listing", listing)):
        rows.add(f"event loop blocked, {what}, worst", "ms", [wait.blocked])
        rows.add(f"slowest small API answer, {what}", "ms", [wait.wall])
    full = rows.add(f"resident with {QPS} QPs, after all this", "MB", [leaf.resident()])
    rows.add(f"proportional with {QPS} QPs, after all this", "MB", [leaf.resident("Pss")])
    note = f"at rest {idle.blocked:.1f} ms"
    return [
        Target(f"resident with {QPS} QPs", full.max, 80, "at most", "MB", f"at rest {rest.median:.0f} MB"),
        Target(f"scrape with {QPS} QPs", scraped.max, 1, "at most", "s"),
        Target("event loop blocked, scrapes", scraping.blocked, 20, "at most", "ms", note),
        Target("event loop blocked, listing", listing.blocked, 20, "at most", "ms", note),
    ]


@dataclass(frozen=True)
class Wait:
    """The worst of many small questions to the API, in milliseconds.

    ``wall``: until the answer. ``blocked``: that, or the processor time that the daemon used meanwhile, whichever is
    less: a machine that gives the daemon no processor does not block its loop, and what blocks it works.
    """

    wall: float
    blocked: float


def _busy(wall: Spread, cpu: list[float]) -> str:
    return f"{Spread.of(cpu).median:.2f} s of processor time" if wall.median > 1 else ""


class _Leaf:
    """A leaf with a daemon of its own configuration."""

    def __init__(self, scope: Scope, built: Fabric) -> None:
        self._fabric = built
        self._pin_dir = scope.pin_dir("daemon")
        self._socket = scope.folder / "qpd.sock"
        self._log = scope.folder / "qpd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._config = scope.folder / "qpd.yaml"
        configuration = {
            "node": "bench",
            "bpf": {"pin_dir": str(self._pin_dir)},
            "api": {"socket": str(self._socket)},
            "frr": {"socket_dir": str(scope.folder / "frr")},
            "metrics": {"listen": f"{_METRICS[0]}:{_METRICS[1]}"},
        }
        self._config.write_text(yaml.safe_dump(configuration), encoding="utf-8")

    # --- life -----------------------------------------------------------------------------------------------------

    def timed_start(self) -> float:
        """Seconds from the start of the process to both uplinks steering; traffic must then agree."""
        begun = time.monotonic()
        command = [sys.executable, "-m", "qpd", "run", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                namespaces.enter(self._fabric.left.namespace, command), stdout=log, stderr=log
            )
        while not self._steers():
            if self._process.poll() is not None:
                raise BenchError(
                    f"qpd run ended with status {self._process.returncode}: {self._last_words()}"
                )
            if time.monotonic() - begun > _START_DEADLINE:
                raise BenchError(f"qpd does not steer after {_START_DEADLINE:.0f} s: {self._last_words()}")
            time.sleep(0.005)
        taken = time.monotonic() - begun
        self._see_it_steer()
        return taken

    def stop(self) -> None:
        """End the daemon; what it pinned goes on."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def forget(self) -> None:
        """`qpd detach`: the next start compiles and places anew."""
        command = [sys.executable, "-m", "qpd", "detach", "--config", str(self._config)]
        namespaces.run(namespaces.enter(self._fabric.left.namespace, command))

    def _steers(self) -> bool:
        try:
            status = self._ask("/v1/status")
        except (OSError, http.client.HTTPException, BenchError):
            return False
        return bool(status["state"] == "steering" and status["paths"]["up"] == len(SPINES))

    def _see_it_steer(self) -> None:
        """Packets of a few QPs must be steered, each one."""
        sent = 64
        with Maps(Pins.of(self._pin_dir).directory) as maps:
            before = maps.counters().verdicts[Hook.STEER].astype(int)
            with self._sending_socket() as sender:
                for qp in range(sent):
                    sender.send(host_payload(0x700000 + qp))
            counted = maps.counters().verdicts[Hook.STEER].astype(int) - before
        steered = int(counted[Verdict.OWN_PATH] + counted[Verdict.REDIRECTED])
        if steered != sent:
            raise BenchError(f"qpd says it steers, but steered {steered} of {sent} packets")

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    # --- queue pairs ----------------------------------------------------------------------------------------------

    def send_first_packets(self) -> None:
        """One packet of each of many QPs, through host, bridge and VXLAN."""
        with self._sending_socket() as sender:
            payload = bytearray(host_payload(0)[:_BTH_AND_ICRC])
            for qp in range(1, QPS + 1):
                payload[5:8] = qp.to_bytes(3, "big")
                sender.send(payload)

    def wait_for_census(self) -> None:
        """Until the daemon has counted them."""
        deadline = time.monotonic() + _COUNT_DEADLINE
        while True:
            known = int(self._ask("/v1/status")["qps"]["known"])
            if known >= QPS_HELD:
                return
            if time.monotonic() > deadline:
                raise BenchError(
                    f"the daemon knows {known} QPs, {_COUNT_DEADLINE:.0f} s after {QPS} have sent"
                )
            time.sleep(0.1)

    def _sending_socket(self) -> socket.socket:
        def make() -> socket.socket:
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender.bind(("", SOURCE_PORT))
            sender.connect((str(PEER), ROCE))
            return sender

        return namespaces.inside(self._fabric.sender, make)

    def processor_seconds(self) -> float:
        """What the daemon and the children it has waited for (the compiler) have used until now; to 10 ms (proc(5))."""
        assert self._process is not None
        fields = (
            Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    # --- figures --------------------------------------------------------------------------------------------------

    def resident(self, field: str = "Rss") -> float:
        """Megabytes of the daemon's process (smaps_rollup)."""
        assert self._process is not None
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text(encoding="ascii")
        for line in rollup.splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise BenchError(f"no {field} in smaps_rollup")

    def scrape(self) -> tuple[float, int]:
        """Seconds and octets of one scrape."""
        namespace = self._fabric.left.namespace
        connection = http.client.HTTPConnection(*_METRICS)
        connection.sock = namespaces.inside(namespace, lambda: socket.create_connection(_METRICS))
        with contextlib.closing(connection):
            begun = time.monotonic()
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            body = answer.read()
            taken = time.monotonic() - begun
        if answer.status != http.client.OK or b"qpd_path_up" not in body:
            raise BenchError(f"/metrics answered {answer.status}: {body[:80]!r}")
        return taken, len(body)

    def list_qps(self) -> tuple[float, bytes]:
        """Seconds until the API has told all QPs, and its answer."""
        begun = time.monotonic()
        body = self._fetch("/v1/qps")
        return time.monotonic() - begun, body

    @staticmethod
    def check_listing(body: bytes) -> None:
        """All must be in it. Parsing it would hold up the probes, so this comes after them."""
        told = len(json.loads(body))
        if told < QPS_HELD:
            raise BenchError(f"/v1/qps told {told} QPs of {QPS}")

    def watch_loop(self, work: Callable[[], None]) -> Wait:
        """Ask small questions, one after the other, while ``work`` is done."""
        ended = threading.Event()
        worst = Wait(0.0, 0.0)
        failure: list[BaseException] = []

        def probe() -> None:
            nonlocal worst
            try:
                with contextlib.closing(_UnixConnection(self._socket)) as connection:
                    while not ended.is_set():
                        used, begun = self._processor_ns(), time.monotonic_ns()
                        connection.request("GET", "/v1/status")
                        connection.getresponse().read()
                        wall, used = time.monotonic_ns() - begun, self._processor_ns() - used
                        worst = Wait(max(worst.wall, wall / 1e6), max(worst.blocked, min(wall, used) / 1e6))
                        ended.wait(_PROBE_PAUSE)
            except (OSError, http.client.HTTPException) as error:
                failure.append(error)

        prober = threading.Thread(target=probe, name="probe")
        prober.start()
        try:
            work()
        finally:
            ended.set()
            prober.join()
        if failure:
            raise BenchError(f"the daemon's API did not answer: {failure[0]}")
        return worst

    def _processor_ns(self) -> int:
        """Processor time of all threads of the daemon; of one that runs, up to its last timer tick."""
        assert self._process is not None
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        return total

    def _ask(self, path: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._fetch(path))
        return content

    def _fetch(self, path: str) -> bytes:
        with contextlib.closing(_UnixConnection(self._socket)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status != http.client.OK:
            raise BenchError(f"{path} answered {answer.status}: {body[:120]!r}")
        return body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


@contextmanager
def _leaf(scope: Scope) -> Iterator[_Leaf]:
    with contextlib.ExitStack() as stack:
        built = stack.enter_context(fabric(scope))
        hops = " ".join(f"nexthop via {address}" for _, address in built.left.uplinks.values())
        route = f"ip -n {built.left.namespace} route replace {built.left.remote_vtep}/32 proto bgp {hops}"
        namespaces.run(route.split())
        stack.enter_context(contextlib.closing(receiving_socket(built.receiver)))
        leaf = _Leaf(scope, built)
        stack.callback(leaf.stop)
        yield leaf
