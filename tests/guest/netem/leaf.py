"""A leaf in the guest: qpd and BFD on four uplinks, whose far end answers requests in the kernel; netem on any of them.

```
    leaf                  10.1.n.0 un -- un 10.1.n.1                  far
    qpd, zebra, bfdd          n = 0 to 3          zebra, bfdd, responder.c for all of 10.255.0.0/16
```
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qpd.kernel.loader import Spec
from qpd.lab import namespaces
from qpd.lab.frr import BINARIES, SOCKETS, USER
from tests.fabric.daemon_node import BGP, DaemonNode
from tests.fabric.judge import until, until_equal
from tests.fabric.kernel_router import UPLINKS, KernelRouter, nexthops4

from .responder import Responder

SOURCE = "10.255.0.1"
COMPILE = 3600.0
PATIENCE = 1200.0
"""Seconds, of virtual time: what reads files passes many of them."""
_SNAP = 128
_PCAP_HEADER, _PCAP_RECORD = 24, struct.Struct("=IIII")


class Leaf:
    """The leaf; ``close`` leaves nothing behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.router = KernelRouter("netem")
        self.node = DaemonNode(self.router.name, directory)
        self._closing = ExitStack()
        self._tc: dict[str, subprocess.Popen[str]] = {}

    def open(self) -> Leaf:
        """Make all but the daemon; ``start`` does that."""
        self._responder = Responder(self.directory)
        self._closing.callback(self._responder.close)
        self._closing.callback(self.router.close)
        self.router.open()
        self.router.ip("addr", "add", f"{SOURCE}/32", "dev", "lo")
        for name, own, peer in ((self.router.name, 0, 1), (self.router.far, 1, 0)):
            self._start_frr(name, own, peer)
        for uplink in UPLINKS:
            # zebra, as it begins, takes routes of bgpd away for those of an earlier life.
            self.route(f"10.255.1.{uplink}", uplink)
        self._closing.callback(self.node.close)
        self._load()
        return self

    def start(self, **settings: Any) -> None:
        """Start the daemon; all paths are up when this returns."""
        sockets = {"socket_dir": str(SOCKETS / self.router.name)}
        self.node.start({"reconcile_interval": 3600, "frr": sockets, **settings}, PATIENCE)
        until(self.not_up, PATIENCE)

    def restart(self, **settings: Any) -> None:
        """Another daemon, with another configuration; what is in the kernel stays."""
        assert self.node.process is not None
        self.node.process.terminate()
        self.node.process.wait(PATIENCE)
        self.start(**settings)

    def respond(self) -> None:
        """Let the far end answer."""
        self._responder.attach(self.router.far, [f"u{uplink}" for uplink in UPLINKS])

    def close(self) -> None:
        self._closing.close()

    def route(self, destination: str, *uplinks: int) -> None:
        self.router.ip("route", "add", f"{destination}/32", "proto", BGP, *nexthops4(*uplinks))

    def not_up(self) -> str | None:
        """What keeps a path, or its BFD session, from being up."""
        rows = self.by_interface()
        states = {name: (row["state"], (row["bfd"] or {}).get("state")) for name, row in rows.items()}
        wanted = {f"u{uplink}": ("up", "up") for uplink in UPLINKS}
        return None if states == wanted else f"paths: {states}"

    def not_alive(self) -> str | None:
        """A BFD session that is not up."""
        down = [name for name, row in self.by_interface().items() if (row["bfd"] or {}).get("state") != "up"]
        return f"BFD is not up at {down}" if down else None

    def by_interface(self) -> dict[str, dict[str, Any]]:
        """What qpd says of each uplink's path."""
        return {row["interface"]: row for row in self.node.get("/v1/paths")}

    def drain(self, name: str, verb: str = "drain") -> None:
        """As an operator does it, or with ``undrain`` undoes it; at once, without a program's start."""
        self.node.get(f"/v1/paths/{name}/{verb}", method="POST")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Qpd's events of this kind, the oldest first."""
        said = self.node.get("/v1/events")
        # A line an event; one alone reads as JSON.
        every = [said] if isinstance(said, dict) else [json.loads(line) for line in said.splitlines()]
        return [event for event in every if event["kind"] == kind]

    def settle(self) -> None:
        """Read what qpd and tc have mapped: to read it while something is measured would pass much virtual time."""
        assert self.node.process is not None
        for pid in (self.node.process.pid, *(process.pid for process in self._tc.values())):
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
            for file in {line.split(maxsplit=5)[5] for line in lines if "/" in line}:
                with suppress(OSError):
                    Path(file).read_bytes()

    def netem(self, end: str, words: Mapping[int, str]) -> None:
        """Let uplinks delay or lose what one end (a namespace) sends: at once, by a tc that is running already."""
        if end not in self._tc:
            command = namespaces.enter(end, ["tc", "-force", "-batch", "-"])
            self._tc[end] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
            self._closing.callback(self._tc[end].communicate)
        stdin = self._tc[end].stdin
        assert stdin is not None
        for uplink, what in words.items():
            stdin.write(f"qdisc replace dev u{uplink} root netem limit 10000 {what}\n")
        stdin.flush()

    def _load(self) -> None:
        """Compile and pin the classifier: the daemon would not wait for an emulated processor."""
        settings = self.node.settings({})
        spec = Spec(str(settings["bpf"]["pin_dir"]), settings["bpf"]["qps_max"], str(self.directory))
        command = [sys.executable, "-m", "qpd.kernel.loader"]
        done = subprocess.run(
            command,
            input=json.dumps(asdict(spec)),
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]

    def _start_frr(self, name: str, own: int, peer: int) -> None:
        sockets = SOCKETS / name
        self._closing.callback(shutil.rmtree, sockets, ignore_errors=True)
        sockets.mkdir(parents=True)
        shutil.chown(sockets, USER, USER)
        # Ten seconds of patience: what is lost here is RoCE's business, and BFD has to stay up.
        bfd = [
            "bfd",
            " profile patient",
            "  detect-multiplier 50",
            "  transmit-interval 200",
            "  receive-interval 200",
        ]
        for uplink in UPLINKS:
            bfd += [f" peer 10.1.{uplink}.{peer} local-address 10.1.{uplink}.{own} interface u{uplink}"]
            bfd += ["  profile patient"]
        for daemon, lines in (("zebra", ["no zebra nexthop kernel enable"]), ("bfdd", bfd)):
            # FRR's daemons give up root before they read it.
            configuration = sockets / f"{daemon}.conf"
            configuration.write_text("\n".join(lines) + "\n")
            command = [
                str(BINARIES / daemon),
                "-N",
                name,
                "-f",
                str(configuration),
                "-A",
                "127.0.0.1",
                "-P",
                "0",
            ]
            process = subprocess.Popen(
                namespaces.enter(name, command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._closing.callback(process.wait)
            self._closing.callback(process.kill)
            until_equal((sockets / f"{daemon}.vty").exists, wanted=True, deadline=PATIENCE)


class Tap:
    """tcpdump of RoCE at an interface (``any``: all of them). It listens when this has been made."""

    def __init__(self, namespace: str, interface: str, file: Path, *words: str) -> None:
        self.file = file
        command = ["tcpdump", "-i", interface, "-n", "-U", "-Z", "root", "-s", str(_SNAP), "-B", "16384"]
        command += ["--immediate-mode", *words, "-w", str(file), "udp port 4791"]
        self._process = subprocess.Popen(
            namespaces.enter(namespace, command), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if b"listening on" in line:
                break

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()

    def times(self) -> list[float]:
        """When each packet passed that has been written: by the kernel, seconds since the epoch."""
        octets, at, found = self.file.read_bytes(), _PCAP_HEADER, []
        while at + _PCAP_RECORD.size <= len(octets):
            seconds, microseconds, length, _ = _PCAP_RECORD.unpack_from(octets, at)
            found.append(seconds + microseconds / 1e6)
            at += _PCAP_RECORD.size + length
        return found
