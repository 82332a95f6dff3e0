"""Network namespaces of a test's own, joined by a veth pair, and code that runs inside them."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Node:
    """A namespace. A thread enters it, not the process: bpffs stays visible and other tests undisturbed."""

    name: str

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Run a function inside; its result or its exception."""
        results: list[_T] = []
        failures: list[BaseException] = []

        def enter() -> None:
            try:
                fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
                try:
                    if _libc.setns(fd, _CLONE_NEWNET):
                        code = ctypes.get_errno()
                        raise OSError(code, f"setns {self.name}: {os.strerror(code)}")
                finally:
                    os.close(fd)
                results.append(function(*arguments))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                failures.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def run(self, *command: str) -> str:
        """Run a command inside, with this mount namespace's /sys; its output."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.name}", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def ifindex(self, interface: str) -> int:
        return self.call(socket.if_nametoindex, interface)

    def transmitted(self, interface: str) -> int:
        """Packets that left by an interface: the kernel's own count."""
        (link,) = json.loads(self.run("ip", "-j", "-s", "link", "show", "dev", interface))
        return int(link["stats64"]["tx"]["packets"])

    def send(self, interface: str, count: int) -> None:
        """Send UDP datagrams to the other end of the interface's wire."""

        def sending() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(count):
                    sender.sendto(b"x", ("192.0.2.2", 9))

        self.call(sending)


@contextmanager
def wire(prefix: str, interface: str = "up0") -> Iterator[tuple[Node, Node]]:
    """Two namespaces and one wire: 192.0.2.1 on ``interface`` of the first, 192.0.2.2 on the second's."""
    here, there = Node(f"{prefix}-a"), Node(f"{prefix}-b")
    try:
        for node in (here, there):
            _ip("netns", "add", node.name)
        join(here, there, interface)
        yield here, there
    finally:
        for node in (here, there):
            if Path("/run/netns", node.name).exists():
                _ip("netns", "del", node.name)


def join(here: Node, there: Node, interface: str = "up0", *, index: int | None = None) -> None:
    """Lay a wire between two nodes; ``index``: the interface index that it shall have on the first."""
    number = ["index", str(index)] if index else []
    peer = ["peer", "name", interface, "netns", there.name]
    _ip("-n", here.name, "link", "add", interface, *number, "type", "veth", *peer)
    for node, address in ((here, "192.0.2.1/24"), (there, "192.0.2.2/24")):
        node.run("sysctl", "-qw", f"net.ipv6.conf.{interface}.disable_ipv6=1")
        node.run("ip", "addr", "add", address, "dev", interface)
        node.run("ip", "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
