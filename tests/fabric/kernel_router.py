"""A namespace with uplinks u0 to u3 into a second one, for tests of netlink: ``ip`` acts, sockets are opened inside.

Uplink n: 10.1.n.0/31 and 2001:db8:n::/127 here, the addresses after these on the other side.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable
from functools import partial

from qpd.kernel.netlink_socket import open_netlink
from qpd.lab import namespaces

UPLINKS = range(4)


class KernelRouter:
    """Two namespaces of this process; ``close`` removes them."""

    def __init__(self, name: str) -> None:
        self.name = f"qpdt-{os.getpid()}-{name}"
        self.far = f"{self.name}-far"
        self.index: dict[str, int] = {}

    def open(self) -> KernelRouter:
        for name in (self.name, self.far):
            namespaces.add(name)
            # A second spent on duplicate address detection would be a second in every test.
            namespaces.set_sysctls(
                name, [("net.ipv6.conf.default.accept_dad", "0"), ("net.ipv6.conf.all.forwarding", "1")]
            )
        for n in UPLINKS:
            link = f"u{n}"
            self.ip("link", "add", link, "type", "veth", "peer", "name", link, "netns", self.far)
            for name, last in ((self.name, 0), (self.far, 1)):
                self._ip(name, "addr", "add", f"10.1.{n}.{last}/31", "dev", link)
                self._ip(name, "addr", "add", f"2001:db8:{n}::{last}/127", "dev", link, "nodad")
                self._ip(name, "link", "set", link, "up")
            self.index[link] = namespaces.inside(self.name, partial(socket.if_nametoindex, link))
        return self

    def close(self) -> None:
        for name in (self.name, self.far):
            namespaces.delete(name)

    def ip(self, *arguments: str, batch: Iterable[str] = ()) -> str:
        """``ip`` inside; with ``batch``, many of its commands at once."""
        return self._ip(self.name, *arguments, batch=batch)

    def ip_far(self, *arguments: str) -> str:
        return self._ip(self.far, *arguments)

    def sysctl(self, key: str, value: str) -> None:
        assert namespaces.set_sysctls(self.name, [(key, value)]) == []

    def open_socket(self, groups: Iterable[int] = (), receive_buffer: int = 1 << 20) -> socket.socket:
        return namespaces.inside(self.name, lambda: open_netlink(groups, receive_buffer))

    def udp_socket(self) -> socket.socket:
        return namespaces.inside(self.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    @staticmethod
    def _ip(name: str, *arguments: str, batch: Iterable[str] = ()) -> str:
        lines = "\n".join(batch)
        command = ["ip", "-n", name, *(("-batch", "-") if lines else arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, input=lines)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout


def nexthops4(*uplinks: int) -> list[str]:
    """The next hops of an IPv4 route over these uplinks, in the words of ``ip route``."""
    return [word for n in uplinks for word in ("nexthop", "via", f"10.1.{n}.1", "dev", f"u{n}")]


def nexthops6(*uplinks: int) -> list[str]:
    """The same for IPv6."""
    return [word for n in uplinks for word in ("nexthop", "via", f"2001:db8:{n}::1", "dev", f"u{n}")]
