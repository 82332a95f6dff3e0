"""A Soft-RoCE endpoint: a virtual machine on a leaf's bridge, beside a host of the fabric.

The guest runs the distribution's own kernel, which has rdma_rxe, on this machine's files (scripts/in-guest). Its wire
is a tap device in the leaf's namespace, a port of the bridge that the host's port is in: what it sends enters the
fabric as the host's packets do. QEMU itself makes the tap device, and ends when the machine's end of the guest's
command port closes: a crash of whoever started the guest leaves neither a process nor a device.
"""

from __future__ import annotations

import ipaddress
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpd.lab import namespaces, rxe_agent
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric

IN_GUEST = Path(__file__).resolve().parents[2] / "scripts" / "in-guest"
DEVICE = "rxe0"
GID_INDEX = 1
"""The GID of the first IPv4 address; index 0 is the link-local IPv6 address."""

_LIFETIME = 4 * 3600
"""Seconds after which a guest ends itself, should everything else fail."""

Sink = Callable[[str, str], None]
"""Called with "stdout" or "stderr" and a piece of text."""


@dataclass(frozen=True)
class Place:
    """Where a guest is attached, read from the running fabric."""

    host: str
    leaf: str
    port: str
    """The leaf's port to the host."""
    bridge: str
    mtu: int
    address: ipaddress.IPv4Interface

    @property
    def tap(self) -> str:
        """The tap device's name in the leaf's namespace."""
        return f"rxe-{self.port}"[:15]

    @property
    def mac(self) -> str:
        """A locally administered MAC made of the address: no two guests of a lab share it."""
        return "02:00:" + ":".join(f"{byte:02x}" for byte in self.address.ip.packed)


def place(fabric: Fabric, host: str, address: str | None = None) -> Place:
    """Where a guest beside `host` goes; its address is the host's plus 100 unless one is given (ADDRESS/LENGTH).

    Raises:
        LabError: where there is no such host, its leaf does not bridge it, or the address is taken.
    """
    if host not in fabric.hosts:
        raise LabError(f"lab {fabric.name} has no host {host}; it has {', '.join(fabric.hosts) or 'none'}")
    leaf = fabric.topology.leaf_of(host)
    port = fabric.topology.links_of(host)[0].other(host).interface
    (device,) = json.loads(fabric.exec(leaf, "ip", "-j", "link", "show", "dev", port).stdout)
    if "master" not in device:
        raise LabError(
            f"{leaf}: {port}, the port of {host}, is in no bridge: a guest cannot be put beside it"
        )
    interface = guest_address(ipaddress.IPv4Interface(_interface(fabric, host)), address)
    for other in fabric.hosts:
        if fabric.address(other) == str(interface.ip):
            raise LabError(f"{interface.ip} is the address of {other}; give another by --address")
    return Place(host, leaf, port, device["master"], device["mtu"], interface)


def guest_address(host: ipaddress.IPv4Interface, wanted: str | None) -> ipaddress.IPv4Interface:
    """The guest's address: the wanted one, else the host's plus 100, in the host's subnet."""
    try:
        interface = (
            ipaddress.IPv4Interface(wanted)
            if wanted
            else ipaddress.IPv4Interface(f"{host.ip + 100}/{host.network.prefixlen}")
        )
    except ValueError as error:
        raise LabError(f"--address {wanted}: {error}; write ADDRESS/LENGTH") from None
    if wanted and "/" not in wanted:
        interface = ipaddress.IPv4Interface(f"{wanted}/{host.network.prefixlen}")
    if interface.ip not in host.network:
        raise LabError(
            f"{interface.ip} is not in {host.network}, the subnet of the host; give one by --address"
        )
    return interface


def _interface(fabric: Fabric, host: str) -> str:
    name = fabric.topology.links_of(host)[0].end(host).interface
    (device,) = json.loads(fabric.exec(host, "ip", "-j", "-4", "address", "show", "dev", name).stdout)
    for entry in device["addr_info"]:
        if entry["scope"] == "global":
            return f"{entry['local']}/{entry['prefixlen']}"
    raise LabError(f"{host}: {name} has no IPv4 address; a guest beside it needs its subnet")


class Command:
    """A command that runs in a guest."""

    def __init__(self, argv: Sequence[str], send: Callable[[int], None], sink: Sink | None) -> None:
        self.argv = tuple(argv)
        self._send = send
        self._sink = sink
        self._texts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._ended = threading.Event()
        self._status: int | None = None

    @property
    def stdout(self) -> str:
        """What it has said so far."""
        return "".join(self._texts["stdout"])

    @property
    def stderr(self) -> str:
        """What it has complained of so far."""
        return "".join(self._texts["stderr"])

    @property
    def status(self) -> int | None:
        """Its exit status (negative: the signal that ended it); None while it runs."""
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status.

        Raises:
            LabError: where it has not ended after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise LabError(f"{' '.join(self.argv)}: not done after {timeout:g} s: {self._last_words()}")
        assert self._status is not None
        return self._status

    def check(self, timeout: float | None = None) -> str:
        """Wait for its end and return its output.

        Raises:
            LabError: where it fails, or has not ended after `timeout` seconds.
        """
        if self.wait(timeout) != 0:
            raise LabError(f"{' '.join(self.argv)}: exit status {self._status}: {self._last_words()}")
        return self.stdout

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended."""
        self._send(number)

    def _last_words(self) -> str:
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return " | ".join(lines[-3:]) or "it said nothing"

    def _heard(self, stream: str, text: str) -> None:
        self._texts[stream].append(text)
        if self._sink is not None:
            self._sink(stream, text)

    def _has_ended(self, status: int) -> None:
        self._status = status
        self._ended.set()


class Guest:
    """A guest with rxe0, beside a host of a running fabric. `start` any number of them, then `wait` for each.

    Args:
        fabric: a fabric that is up.
        host: the host whose leaf and subnet the guest shares.
        address: ADDRESS or ADDRESS/LENGTH; by default the host's plus 100.
        memory: the guest's memory, as QEMU takes it.
        cpus: its virtual processors.
    """

    def __init__(
        self, fabric: Fabric, host: str, address: str | None = None, memory: str = "512M", cpus: int = 1
    ) -> None:
        self.fabric = fabric
        self.place = place(fabric, host, address)
        self._memory = memory
        self._cpus = cpus
        self._record = f"{host}.rxe"
        self._directory = fabric.state.directory / host
        self._log = fabric.state.logs / f"{host}.rxe.log"
        self._mine = False
        self._socket: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()
        self._gone = threading.Event()
        self._commands: dict[int, Command] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The guest's IPv4 address."""
        return str(self.place.address.ip)

    @property
    def host(self) -> str:
        """The host that it stands beside."""
        return self.place.host

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- beginning and end --------------------------------------------------------------------------------------------

    def start(self, deadline: float = 60.0) -> None:
        """Start QEMU and connect its tap device; the guest boots meanwhile.

        Raises:
            LabError: where no guest can run here, or one stands beside this host already.
        """
        if not IN_GUEST.exists():
            raise LabError(f"{IN_GUEST} is not there: guests are started from qpd's repository")
        if self.fabric.records.find(self._record) is not None:
            raise LabError(f"a guest stands beside {self.host} already; end it first")
        self._directory.mkdir(parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        path = self._directory / "rxe.sock"
        path.unlink(missing_ok=True)
        command = [
            str(IN_GUEST),
            f"--deadline={_LIFETIME}",
            f"--memory={self._memory}",
            f"--cpus={self._cpus}",
        ]
        command += [f"--qemu-opts={' '.join(self._devices(path))}", "--", "sh", "-exc", self._script()]
        limit = time.monotonic() + deadline
        self._mine = True
        self.fabric.records.start(
            self._record, namespaces.enter(self.fabric.namespace(self.place.leaf), command), self._log
        )
        try:
            self._socket = self._connect(path, limit)
            self._attach_tap(limit)
        except BaseException:
            self.close()
            raise
        self._reader = threading.Thread(target=self._read, name=f"rxe-{self.host}", daemon=True)
        self._reader.start()

    def wait(self, deadline: float = 600.0) -> None:
        """Wait until the guest has booted and rxe0 is up.

        Raises:
            LabError: with the guest's last words, where it ends instead or takes longer than `deadline` seconds.
        """
        limit = time.monotonic() + deadline
        while not self._ready.wait(0.1):
            if self._gone.is_set():
                raise LabError(f"the guest beside {self.host} has ended: {self._last_words()}")
            if time.monotonic() > limit:
                raise LabError(
                    f"the guest beside {self.host} is not up after {deadline:.0f} s: {self._last_words()}"
                )

    def close(self) -> None:
        """End the guest that `start` started; its tap device goes with it."""
        if not self._mine:
            return
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        if self._reader is not None:
            self._reader.join()
        self.fabric.records.end(self._record, grace=10.0)
        (self._directory / "rxe.sock").unlink(missing_ok=True)
        with suppress(OSError):  # a lab's other files may be in it
            self._directory.rmdir()

    def _devices(self, path: Path) -> list[str]:
        return [
            # QEMU waits for us before it goes on: the port is connected before the guest looks at it.
            f"-chardev socket,id=qplab,path={path},server=on,wait=on",
            "-device virtio-serial-pci,id=qplab-serial",
            f"-device virtserialport,bus=qplab-serial.0,chardev=qplab,name={rxe_agent.PORT_NAME}",
            f"-netdev tap,id=qplab-wire,ifname={self.place.tap},script=no,downscript=no",
            f"-device virtio-net-pci,netdev=qplab-wire,mac={self.place.mac},host_mtu={self.place.mtu}",
        ]

    def _script(self) -> str:
        lines = [
            "modprobe -a rdma_rxe rdma_ucm",
            f"wire=$(grep -l {self.place.mac} /sys/class/net/*/address | cut -d/ -f5)",
            # Duplicate address detection would keep the link-local GID from its place for a second.
            "sysctl -q -w net.ipv6.conf.$wire.accept_dad=0",
            f"ip link set $wire mtu {self.place.mtu} up",
            f"ip address add {self.place.address} dev $wire",
            f"rdma link add {DEVICE} type rxe netdev $wire",
            f"exec /usr/bin/python3 -I -S {rxe_agent.__file__} {rxe_agent.PORT_NAME}",
        ]
        return "\n".join(lines)

    def _connect(self, path: Path, limit: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        while connection.connect_ex(str(path)) != 0:
            self._check_alive(limit, "QEMU does not start")
            time.sleep(0.05)
        return connection

    def _attach_tap(self, limit: float) -> None:
        leaf, tap = self.place.leaf, self.place.tap
        while self.fabric.exec(leaf, "ip", "link", "show", "dev", tap, check=False).returncode != 0:
            self._check_alive(limit, f"{tap} does not appear")
            time.sleep(0.05)
        self.fabric.exec(leaf, "ip", "link", "set", tap, "addrgenmode", "none")
        self.fabric.exec(leaf, "ip", "link", "set", tap, "mtu", str(self.place.mtu))
        self.fabric.exec(leaf, "ip", "link", "set", tap, "master", self.place.bridge, "up")

    def _check_alive(self, limit: float, what: str) -> None:
        if self.fabric.records.find(self._record) is None:
            raise LabError(f"the guest beside {self.host} has ended: {self._last_words()}")
        if time.monotonic() > limit:
            raise LabError(f"the guest beside {self.host}: {what}: {self._last_words()}")

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1].strip() if lines else 'it said nothing'} ({self._log})"

    # -- commands ----------------------------------------------------------------------------------------------------

    def popen(self, *argv: str, env: Mapping[str, str] | None = None, sink: Sink | None = None) -> Command:
        """Start a command in the guest."""
        with self._lock:
            number = len(self._commands)

            def send(signal_number: int) -> None:
                self._tell(id=number, signal=signal_number)

            command = self._commands[number] = Command(argv, send, sink)
        self._tell(id=number, argv=list(argv), env=dict(env or {}))
        return command

    def run(
        self, *argv: str, timeout: float = 60.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the guest to its end; one that takes longer than `timeout` seconds is ended.

        Raises:
            LabError: where it takes longer.
        """
        command = self.popen(*argv, env=env)
        try:
            status = command.wait(timeout)
        except LabError:
            command.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(argv, status, command.stdout, command.stderr)

    def _tell(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        assert self._socket is not None, "start() it first"
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError as error:
            raise LabError(f"the guest beside {self.host} does not listen: {error}") from None

    def _read(self) -> None:
        assert self._socket is not None
        with suppress(OSError), self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self._heard(json.loads(line))
        self._gone.set()
        for command in list(self._commands.values()):
            if command.status is None:
                command._heard("stderr", f"the guest has ended: {self._last_words()}\n")  # noqa: SLF001
                command._has_ended(-signal.SIGKILL)  # noqa: SLF001

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("ready"):
            self._ready.set()
        elif "status" in message:
            self._commands[message["id"]]._has_ended(message["status"])  # noqa: SLF001
        else:
            self._commands[message["id"]]._heard(message["stream"], message["text"])  # noqa: SLF001
