"""qpd beside a router of the lab: its configuration, start, readiness and end."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qpd.lab import namespaces
from qpd.lab.errors import LabError
from qpd.lab.processes import Records

CONFIG = "/etc/qpd/qpd.yaml"
"""Where a sidecar container sees its configuration."""

METRICS = "127.0.0.1:9791"


@dataclass(frozen=True)
class Sidecar:
    """One router's qpd."""

    node: str
    namespace: str
    frr_sockets: Path
    pins: Path
    directory: Path
    """Its directory under /run/qplab: configuration and socket."""
    records: Records
    log: Path
    base: Path | None
    """The configuration that the topology binds into the sidecar; None where it has none."""

    @property
    def socket(self) -> Path:
        """The Unix socket of its API: for qpctl --socket."""
        return self.directory / "qpd.sock"

    @property
    def config(self) -> Path:
        """The configuration file that it was started with."""
        return self.directory / "qpd.yaml"

    @property
    def running(self) -> bool:
        """True while its process runs."""
        return self.records.find(self._record) is not None

    @property
    def _record(self) -> str:
        return f"{self.node}.qpd"

    def configuration(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The topology's configuration, over it what the lab must set, over it `extra`."""
        base: dict[str, Any] = {}
        if self.base is not None and self.base.exists():
            base = yaml.safe_load(self.base.read_text(encoding="utf-8")) or {}
        lab = {
            "node": self.node,
            "frr": {"socket_dir": str(self.frr_sockets)},
            "bpf": {"pin_dir": str(self.pins)},
            "api": {"socket": str(self.socket)},
            "metrics": {"listen": METRICS},
        }
        return merged(merged(base, lab), extra)

    def start(self, extra: Mapping[str, Any]) -> None:
        """Write the configuration and start the daemon."""
        if self.running:
            raise LabError(f"{self.node}: qpd runs already; stop it first")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.pins.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.configuration(extra), sort_keys=False), encoding="utf-8")
        self.restart()

    def restart(self) -> None:
        """Start the daemon with the configuration that it had before.

        Raises:
            LabError: where it has none.
        """
        if not self.config.exists():
            raise LabError(f"{self.node}: qpd has not been started here yet")
        self.records.start(self._record, self._enter("run", "--config", str(self.config)), self.log)

    def status(self, timeout: float = 2.0) -> dict[str, Any] | None:
        """The answer of GET /v1/status, None while the daemon does not answer."""
        answer = self.get("/v1/status", timeout)
        return answer if isinstance(answer, dict) else None

    def get(self, path: str, timeout: float = 5.0) -> Any:  # noqa: ANN401 - JSON
        """The JSON that the daemon's API answers to a GET; None while it does not answer."""
        connection = http.client.HTTPConnection("qpd", timeout=timeout)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(timeout)
            connection.sock.connect(str(self.socket))
            connection.request("GET", path)
            response = connection.getresponse()
            return json.loads(response.read()) if response.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def wait_steering(self, deadline: float) -> None:
        """Wait until the daemon says that it steers.

        Raises:
            LabError: with the last line of its log, where it ended or does not come to steer in `deadline` seconds.
        """
        limit = time.monotonic() + deadline
        state = "no answer"
        while time.monotonic() < limit:
            status = self.status()
            if status is not None:
                state = str(status.get("state"))
            if state == "steering":
                return
            if not self.running:
                raise LabError(f"{self.node}: qpd has ended: {self.last_words()}")
            time.sleep(0.05)
        raise LabError(
            f"{self.node}: qpd does not steer after {deadline:.0f} s ({state}): {self.last_words()}"
        )

    def last_words(self) -> str:
        """The last line of the daemon's log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1] if lines else 'it said nothing'} ({self.log})"

    def stop(self, *, detach: bool) -> None:
        """End the daemon; with `detach`, remove its programs, pins, rules and routes too."""
        self.records.end(self._record, grace=5.0)
        if not detach:
            return
        # A daemon that refused its configuration has left nothing, and detach would refuse it as well.
        if self.pins.exists():
            namespaces.run(self._enter("detach", "--config", str(self.config)), timeout=60)
            shutil.rmtree(self.pins, ignore_errors=True)
        self.config.unlink(missing_ok=True)

    def kill(self, number: int) -> None:
        """Send a signal to the daemon."""
        identity = self.records.find(self._record)
        if identity is None or not identity.send(number):
            raise LabError(
                f"{self.node}: qpd does not run; signal {signal.Signals(number).name} was not sent"
            )

    def qpctl(self, *arguments: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run qpctl on this daemon."""
        command = [sys.executable, "-m", "qpd.cli.qpctl", "--socket", str(self.socket), *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)

    def _enter(self, *arguments: str) -> list[str]:
        return namespaces.enter(self.namespace, [sys.executable, "-m", "qpd", *arguments])


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mappings merged key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
