"""The judge: what tcpdump sees arrive at the far ends of links, decoded by tshark. Nothing here knows what qpd says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint

ROCE_FILTER = "udp port 4789 or udp port 4791"
_SNAP = 192
"""Bytes kept of a packet: enough for two IPv6 headers, VXLAN, VLAN tags and the BTH."""

_FIELDS = (
    "frame.time_epoch",
    "vxlan.vni",
    "ip.dst",
    "ipv6.dst",
    "udp.srcport",
    "infiniband.bth.opcode",
    "infiniband.bth.destqp",
    "infiniband.bth.psn",
)


@dataclass(frozen=True)
class RocePacket:
    """One RoCE packet as tshark decodes it."""

    time: float
    """Seconds since the epoch."""
    vni: int | None
    host: str
    """Destination of the inner IP header."""
    outer_destination: str | None
    """Destination of the outer IP header: the remote VTEP; None without VXLAN."""
    outer_source_port: int | None
    source_port: int
    opcode: int
    destination_qp: int
    psn: int


@dataclass
class Sightings:
    """Which QP was seen where."""

    packets: dict[Endpoint, list[RocePacket]] = field(default_factory=dict)

    def links_by_qp(self, qps: Iterable[int] | None = None) -> dict[int, Counter[Endpoint]]:
        """For each destination QP, the packets by endpoint where they arrived."""
        wanted = None if qps is None else set(qps)
        found: dict[int, Counter[Endpoint]] = {}
        for endpoint, packets in self.packets.items():
            for packet in packets:
                if wanted is None or packet.destination_qp in wanted:
                    found.setdefault(packet.destination_qp, Counter())[endpoint] += 1
        return found

    def path_of(self, qp: int) -> Endpoint:
        """The one endpoint where a QP was seen.

        Raises:
            LabError: where it was seen nowhere, or at several.
        """
        places = self.links_by_qp([qp]).get(qp, Counter())
        if len(places) != 1:
            seen = ", ".join(f"{end} ({count})" for end, count in places.items()) or "nowhere"
            raise LabError(f"QP {qp:#x} was seen at {seen}, not at one place")
        return next(iter(places))

    def loads(self) -> dict[Endpoint, int]:
        """RoCE packets by endpoint."""
        return {endpoint: len(packets) for endpoint, packets in self.packets.items()}


class Capture:
    """Captures what arrives at endpoints for the time of an `async with` block.

    A capture that lost packets is an error: its word would be worth nothing. It ends when nothing comes any more;
    with `live`, at once: traffic goes on, and what is on its way is left out.
    """

    def __init__(
        self,
        fabric: Fabric,
        endpoints: Sequence[Endpoint],
        *,
        filter_: str = ROCE_FILTER,
        directory: Path | None = None,
        live: bool = False,
    ) -> None:
        self.fabric = fabric
        self.endpoints = tuple(endpoints)
        self._filter = filter_
        self._live = live
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="qplab-wire-"))
        self._tcpdumps: dict[Endpoint, asyncio.subprocess.Process] = {}

    @classmethod
    def of_uplinks(cls, fabric: Fabric, leaf: str, *, live: bool = False) -> Capture:
        """At the far ends of a leaf's uplinks: what the leaf has sent, by uplink."""
        return cls(fabric, [link.other(leaf) for link in fabric.topology.uplinks(leaf)], live=live)

    def file(self, endpoint: Endpoint) -> Path:
        """The capture file of an endpoint."""
        return self.directory / f"{endpoint.node}-{endpoint.interface}.pcap"

    async def __aenter__(self) -> Capture:
        for tool in ("tcpdump", "tshark"):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is not installed; apt-get install {tool}")
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            for endpoint in self.endpoints:
                self._tcpdumps[endpoint] = await self._spawn(endpoint)
        except BaseException:
            await self._end(signal.SIGKILL)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and not self._live:
            await self._settle()
        lost = await self._end(signal.SIGTERM)
        if self._temporary and (kind is not None or lost):
            shutil.rmtree(self.directory, ignore_errors=True)
        if kind is None and lost:
            raise LabError(f"tcpdump lost packets: {'; '.join(lost)}; capture less or send slower")

    async def _spawn(self, endpoint: Endpoint) -> asyncio.subprocess.Process:
        command = [
            "tcpdump",
            "-i",
            endpoint.interface,
            "-Q",
            "in",
            "-s",
            str(_SNAP),
            "-n",
            "-U",
            "-Z",
            "root",
        ]
        # Without immediate mode the kernel hands packets over by blocks, and the last block is lost at the end.
        command += ["-B", "65536", "--immediate-mode", "-w", str(self.file(endpoint)), self._filter]
        process = await asyncio.create_subprocess_exec(
            *self.fabric.enter(endpoint.node, *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        said = b""
        while b"listening on" not in said:
            line = await process.stderr.readline()
            if not line:
                await process.wait()
                raise LabError(f"tcpdump at {endpoint}: {said.decode(errors='replace').strip()}")
            said += line
        return process

    async def _settle(self) -> None:
        """Wait until the files have stopped growing: what was on its way has been written."""
        sizes: list[int] = []
        calm = 0
        while calm < 2:
            await asyncio.sleep(0.05)
            now = [self.file(end).stat().st_size if self.file(end).exists() else 0 for end in self.endpoints]
            calm = calm + 1 if now == sizes else 0
            sizes = now

    async def _end(self, number: int) -> list[str]:
        lost = []
        for endpoint, process in self._tcpdumps.items():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            _, errors = await process.communicate()
            said = errors.decode(errors="replace").splitlines()
            lost += [
                f"{endpoint}: {line}"
                for line in said
                if "dropped by kernel" in line and not line.startswith("0 ")
            ]
        self._tcpdumps = {}
        return lost

    async def decode(self) -> Sightings:
        """Let tshark decode the files; those in a temporary directory are removed then."""
        found = Sightings()
        for endpoint in self.endpoints:
            found.packets[endpoint] = await decode(self.file(endpoint))
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)
        return found


async def decode(file: Path) -> list[RocePacket]:
    """The RoCE packets of a capture file, by tshark."""
    command = [
        "tshark",
        "-n",
        "-r",
        str(file),
        "-d",
        "udp.port==4789,vxlan",
        "-Y",
        "infiniband",
        "-T",
        "fields",
    ]
    command += ["-E", "separator=/t", "-E", "occurrence=a", "-E", "aggregator=,"]
    for name in _FIELDS:
        command += ["-e", name]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise LabError(f"tshark {file}: {errors.decode(errors='replace').strip().splitlines()[-1:]}")
    return [_packet(line.split("\t")) for line in output.decode().splitlines()]


def _packet(columns: Sequence[str]) -> RocePacket:
    values: Mapping[str, list[str]] = {
        name: column.split(",") if column else [] for name, column in zip(_FIELDS, columns, strict=True)
    }
    addresses, v6 = values["ip.dst"], values["ipv6.dst"]
    encapsulated = bool(values["vxlan.vni"])
    # IPv4 and IPv6 are columns of their own: over VXLAN the inner one is the last, or the only one of its family.
    if not encapsulated:
        outer, host = None, (addresses or v6)[0]
    elif len(addresses) == 1 and len(v6) == 1:
        outer, host = addresses[0], v6[0]
    else:
        outer, host = (addresses or v6)[0], (addresses or v6)[-1]
    ports = values["udp.srcport"]
    return RocePacket(
        time=float(values["frame.time_epoch"][0]),
        vni=int(values["vxlan.vni"][0]) if encapsulated else None,
        host=host,
        outer_destination=outer,
        outer_source_port=int(ports[0]) if encapsulated else None,
        source_port=int(ports[-1]),
        opcode=int(values["infiniband.bth.opcode"][0], 0),
        destination_qp=int(values["infiniband.bth.destqp"][0], 0),
        psn=int(values["infiniband.bth.psn"][0], 0),
    )
