"""Two routers on two veth links, with an FRR each: one BGP session numbered, one unnumbered, BFD on both.

```
            n0  10.77.0.0/31 -------- 10.77.0.1/31  n0
    west AS 65001                              east AS 65002
            n1  fe80::/64 ---- unnumbered --------  n1
```
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from qpd.lab import namespaces

SIDES = {"west": ("10.77.0.0", 65001, "10.77.0.1"), "east": ("10.77.0.1", 65002, "10.77.0.0")}
DAEMONS = ("zebra", "bfdd", "bgpd")
_SOCKETS = Path("/var/run/frr")

_CONFIGURATION = {
    "zebra": "hostname {side}\nno zebra nexthop kernel enable\n",
    "bfdd": "hostname {side}\nbfd\n profile quick\n  transmit-interval 100\n  receive-interval 100\n",
    "bgpd": """hostname {side}
router bgp {asn}
 bgp router-id {address}
 no bgp ebgp-requires-policy
 neighbor {peer} remote-as external
 neighbor {peer} timers connect 1
 neighbor {peer} bfd profile quick
 neighbor n1 interface remote-as external
 neighbor n1 timers connect 1
 neighbor n1 bfd profile quick
""",
}


def until(what: str, condition: Callable[[], object], patience: float = 30.0) -> None:
    """Poll until ``condition`` is true; fail with ``what`` when ``patience`` seconds have passed."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}"
        time.sleep(0.02)


class FrrPair:
    """The pair; ``close`` leaves nothing behind. Names: ``qpdt-PID-west`` and ``-east`` (namespace and ``-N``)."""

    def __init__(self, directory: Path) -> None:
        self.names = {side: f"qpdt-{os.getpid()}-{side}" for side in SIDES}
        self._directory = directory
        self._processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    def open(self) -> FrrPair:
        for name in self.names.values():
            namespaces.add(name)
        for link in ("n0", "n1"):
            peer = ["peer", "name", link, "netns", self.names["east"]]
            self.ip("west", "link", "add", link, "type", "veth", *peer)
        for side, (address, asn, peer_address) in SIDES.items():
            self.ip(side, "addr", "add", f"{address}/31", "dev", "n0")
            for link in ("n0", "n1"):
                self.ip(side, "link", "set", link, "up")
            sockets = self.sockets(side)
            sockets.mkdir(parents=True)
            shutil.chown(sockets, "frr", "frr")
            # FRR's daemons give up root before they read their configuration.
            self._directory.chmod(0o755)
            for daemon in DAEMONS:
                text = _CONFIGURATION[daemon].format(side=side, address=address, asn=asn, peer=peer_address)
                (self._directory / f"{side}-{daemon}.conf").write_text(text)
            for daemon in DAEMONS:
                self.start(side, daemon)
        return self

    def close(self) -> None:
        for side, daemon in list(self._processes):
            self.kill(side, daemon)
        for side, name in self.names.items():
            namespaces.delete(name)
            shutil.rmtree(self.sockets(side), ignore_errors=True)

    def sockets(self, side: str) -> Path:
        return _SOCKETS / self.names[side]

    def start(self, side: str, daemon: str) -> None:
        name = self.names[side]
        configuration = self._directory / f"{side}-{daemon}.conf"
        log = self._directory / f"{side}-{daemon}.log"
        command = [f"/usr/lib/frr/{daemon}", "-N", name, "-f", str(configuration), "--log", f"file:{log}"]
        command += ["-A", "127.0.0.1", "-P", "0"]
        self._processes[side, daemon] = subprocess.Popen(
            namespaces.enter(name, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(f"{daemon} of {side} listens", (self.sockets(side) / f"{daemon}.vty").exists)

    def kill(self, side: str, daemon: str) -> None:
        process = self._processes.pop((side, daemon))
        process.kill()
        process.wait()
        (self.sockets(side) / f"{daemon}.pid").unlink(missing_ok=True)

    def ip(self, side: str, *arguments: str) -> str:
        return namespaces.run(["ip", "-n", self.names[side], *arguments]).stdout
