"""qpd on a router without FRR: a namespace, routes by ``ip``, and the real daemon."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qpd.lab import namespaces

from .judge import until

BGP = "186"
"""The protocol number of FRR's bgpd."""


class DaemonNode:
    """One daemon's surroundings, all of names of their own; ``close`` ends and removes everything."""

    def __init__(self, namespace: str, directory: Path) -> None:
        self.namespace = namespace
        self.pins = Path("/sys/fs/bpf") / namespace
        self.directory = directory
        self.socket = directory / "qpd.sock"
        self.config = directory / "qpd.yaml"
        self.log = directory / "qpd.log"
        self.process: subprocess.Popen[bytes] | None = None

    def settings(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration that touches nothing outside this node."""
        return {
            "node": "node",
            "frr": {"socket_dir": str(self.directory / "frr")},
            "bpf": {"pin_dir": str(self.pins), "qps_max": 4096},
            "api": {"socket": str(self.socket)},
            **extra,
        }

    def command(self, *arguments: str, wrapper: Sequence[str] = ()) -> list[str]:
        """``qpd`` with these arguments, in the namespace; ``wrapper`` goes between."""
        return namespaces.enter(self.namespace, [*wrapper, sys.executable, "-m", "qpd", *arguments])

    def write_config(self, extra: Mapping[str, Any] | None = None) -> None:
        self.config.write_text(yaml.safe_dump(self.settings(extra or {})))

    def start(self, extra: Mapping[str, Any] | None = None, deadline: float = 120.0) -> None:
        """Start the daemon and wait until it steers."""
        self.write_config(extra)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("run", "--config", str(self.config)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._not_steering, deadline)

    def run(
        self, *arguments: str, wrapper: Sequence[str] = (), **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """``qpd`` to its end."""
        return subprocess.run(
            self.command(*arguments, wrapper=wrapper),
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )

    def stop(self) -> int:
        """End the daemon with SIGTERM; its exit status."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(20)
        self.process = None
        return status

    def get(self, question: str, host: str | None = None, method: str = "GET") -> Any:
        """The API's answer, or with ``host`` (ADDRESS:PORT) that of a server in the namespace; else text."""
        connection = http.client.HTTPConnection(host or "qpd", timeout=10)
        if host is None:
            connection.sock = socket.socket(socket.AF_UNIX)
            try:
                connection.sock.connect(str(self.socket))
            except OSError:
                connection.close()
                raise
        else:
            address, _, port = host.rpartition(":")
            connection.sock = namespaces.inside(
                self.namespace, lambda: socket.create_connection((address, int(port)), timeout=10)
            )
        try:
            connection.request(method, question)
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def paths(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.get("/v1/paths")}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self.pins.exists() and namespaces.exists(self.namespace):
            self.write_config()
            self.run("detach", "--config", str(self.config))
        shutil.rmtree(self.pins, ignore_errors=True)

    def _not_steering(self) -> str | None:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            state = self.get("/v1/status")["state"]
        except OSError as error:
            return str(error)
        return None if state == "steering" else f"state {state}"


def tmp_name(what: str) -> str:
    """A name of this process."""
    return f"qpdt-{os.getpid()}-{what}"
