"""The override table: routes of qpd's own that take traffic off a dead next hop until BGP has converged.

Everything here carries qpd's protocol number and stands in qpd's own table, found by a rule before main's; zebra's
routes, rules and nexthop objects are never touched. A rule that finds a match before main hides main's more specific
routes, so a prefix with an empty next-hop set is written as a ``throw`` route, which sends the look-up on to main.

Protocol number: 79, which neither linux/rtnetlink.h nor iproute2's rt_protos uses (FRR's are 186 to 197). To see it:
``ip route show table 4791``, ``ip rule show``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import TypeVar

import structlog

from qpd.kernel import netlink_decode as nl
from qpd.kernel import netlink_socket as ns
from qpd.kernel.netlink import OpenSocket
from qpd.model import EraseOverrides, Network, NextHop, WriteOverrides

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

TABLE = 4791
"""Default of ``override.table``."""
PRIORITY = 32000
"""Default of ``override.priority``: before main's 32766, behind the rule for VRFs (1000): they have own tables."""
PROTOCOL = 79
"""The rtm_protocol of every route and rule that qpd makes."""

_WEIGHT_MAX = 256
_BATCH = 128
"""Messages per sendmsg: with the acknowledgements of a batch in which all fail, still far below the receive buffer."""
_ACK_TIMEOUT = 10.0
_LOGGED = 16
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_NOWHERE = 0, 253, 255
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

# linux/fib_rules.h
_RULE = struct.Struct("=BBBBBBBBI")
_FR_ACT_TO_TBL = 1
_FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 6, 15, 21
_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class OverrideFailure:
    """A route that the kernel did not take. ``error``: errno; ``reason``: one line for people."""

    prefix: Network
    error: int
    reason: str


@dataclass(frozen=True, slots=True)
class OverrideResult:
    """What an operation came to. ``changed``: routes written or erased; what was so already counts as changed."""

    changed: int
    failures: tuple[OverrideFailure, ...] = ()


@dataclass(slots=True)
class OverrideCounters:
    """What has been done since start."""

    written: int = 0
    erased: int = 0
    failed: int = 0
    leftovers: int = 0
    """Routes of an earlier life that were found and erased at start."""


@dataclass(frozen=True, slots=True)
class _Rule:
    family: int
    table: int
    priority: int
    protocol: int


@dataclass(slots=True)
class _Reply:
    bodies: list[tuple[int, bytes]] = field(default_factory=list)
    error: int = 0
    reason: str = ""


class OverrideTable:
    """Puts routes into qpd's own table and takes them out again; all verbs are idempotent.

    The kernel is spoken to in a thread of its own, since thousands of routes take it some tens of milliseconds.
    ``routes`` is what the kernel has acknowledged; after a failure it is read back from the kernel, never guessed.

    Args:
        table: number of the table; nobody else may use it.
        priority: of the rule that finds it.
        open_socket: where the socket comes from (tests open it in another namespace).
    """

    def __init__(
        self, *, table: int = TABLE, priority: int = PRIORITY, open_socket: OpenSocket = ns.open_netlink
    ) -> None:
        self.counters = OverrideCounters()
        self.routes: dict[Network, tuple[NextHop, ...]] = {}
        self._table = table
        self._priority = priority
        self._open_socket = open_socket
        self._socket: socket.socket | None = None
        self._sequence = 0
        self._worker: ThreadPoolExecutor | None = None

    # --- verbs -------------------------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Open the socket, erase what an earlier life left in the table, and make sure of the rules.

        Returns:
            how many routes were left over.

        Raises:
            OSError: no socket, or the kernel refuses rules (CAP_NET_ADMIN is missing).
        """
        self.open()
        try:
            await self._run(self._read_back)
            leftovers = len(self.routes)
            if leftovers:
                await self._run(self._erase, tuple(self.routes))
                self.counters.leftovers += leftovers
                _log.info("override routes of an earlier life erased", routes=leftovers, table=self._table)
            await self.ensure_rules()
        except OSError:
            self.close()
            raise
        return leftovers

    def open(self) -> None:
        """Open the socket only; for ``detach``, which wants neither rules nor routes."""
        if self._socket is None:
            self._socket = self._open_socket([], 4 << 20)
            self._socket.settimeout(_ACK_TIMEOUT)
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="override-table")

    def close(self) -> None:
        """Close the socket and leave rules and routes as they are (a new daemon reconciles them). Idempotent."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def ensure_rules(self) -> None:
        """Exactly one rule a family that leads to the table, with the wanted priority.

        Raises:
            OSError: the kernel refused.
        """
        await self._run(self._ensure_rules, _FAMILIES)

    async def ensure_no_rules(self) -> None:
        """Take away every rule of ours.

        Raises:
            OSError: the kernel refused.
        """
        await self._run(self._ensure_rules, ())

    async def apply(self, operation: WriteOverrides | EraseOverrides) -> OverrideResult:
        """Carry out one operation of the planner.

        Routes that the kernel refuses are in the result and logged (one line each, 16 at most); the others are
        written all the same.
        """
        if isinstance(operation, WriteOverrides):
            result = await self._run(self._write, dict(operation.routes))
            self.counters.written += result.changed
        else:
            result = await self._run(self._erase, operation.prefixes)
            self.counters.erased += result.changed
        self.counters.failed += len(result.failures)
        for failure in result.failures:
            _log.error(
                "override route failed", prefix=str(failure.prefix), table=self._table, why=failure.reason
            )
        return result

    async def detach(self) -> int:
        """Take away rules, then routes: every trace of this room. Returns how many routes there were."""
        self.open()
        await self.ensure_no_rules()
        await self._run(self._read_back)
        found = tuple(self.routes)
        await self._run(self._erase, found)
        return len(found)

    # --- in the worker's thread --------------------------------------------------------------------------------------

    async def _run(self, function: Callable[..., _T], *arguments: object) -> _T:
        if self._worker is None:
            raise OSError(errno.ENOTCONN, "the override table is not open")
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _write(self, routes: Mapping[Network, tuple[NextHop, ...]]) -> OverrideResult:
        order = list(routes)
        bodies = [route_body(prefix, routes[prefix], self._table) for prefix in order]
        failures = self._change(nl.RTM_NEWROUTE, nl.NLM_F_CREATE | nl.NLM_F_REPLACE, order, bodies, {})
        if failures:
            self._read_back()
        else:
            self.routes.update(routes)
        return OverrideResult(len(order) - len(failures), failures)

    def _erase(self, prefixes: Iterable[Network]) -> OverrideResult:
        order = list(dict.fromkeys(prefixes))
        bodies = [erase_body(prefix, self._table) for prefix in order]
        # The kernel takes a route away by itself when its last link goes.
        gone = {errno.ESRCH: True, errno.ENOENT: True}
        failures = self._change(nl.RTM_DELROUTE, 0, order, bodies, gone)
        if failures:
            self._read_back()
        else:
            for prefix in order:
                self.routes.pop(prefix, None)
        return OverrideResult(len(order) - len(failures), failures)

    def _change(
        self, kind: int, flags: int, order: list[Network], bodies: list[bytes], forgiven: Mapping[int, bool]
    ) -> tuple[OverrideFailure, ...]:
        failures = []
        for begin in range(0, len(bodies), _BATCH):
            for index, error, reason in self._send_batch(kind, flags, bodies[begin : begin + _BATCH]):
                if error not in forgiven:
                    prefix = order[begin + index]
                    failures.append(OverrideFailure(prefix, error, reason))
        return tuple(failures)

    def _send_batch(self, kind: int, flags: int, bodies: list[bytes]) -> Iterator[tuple[int, int, str]]:
        """Send all in one sendmsg and yield (index, errno, reason) of those that failed.

        Only the last message asks for an acknowledgement; errors come unasked, and before it.
        """
        first = self._sequence + 1
        self._sequence += len(bodies)
        messages = [
            ns.request(kind, nl.NLM_F_REQUEST | flags, first + index, body)
            for index, body in enumerate(bodies[:-1])
        ]
        messages.append(ns.request(kind, nl.NLM_F_REQUEST | nl.NLM_F_ACK | flags, self._sequence, bodies[-1]))
        opened = self._opened()
        opened.sendmsg(messages)
        for answered, _, answer_flags, body in self._answers(first, self._sequence):
            error = ns.error_of(body)
            if error:
                words = ns.explanation(answer_flags, body)
                reason = f"{os.strerror(error)} ({words})" if words else os.strerror(error)
                yield answered - first, error, reason
            if answered == self._sequence:
                return

    def _answers(self, first: int, last: int) -> Iterator[tuple[int, int, int, bytes]]:
        opened = self._opened()
        while True:
            try:
                datagram = opened.recv(ns.DATAGRAM_MAX)
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, f"the kernel did not answer in {_ACK_TIMEOUT} s") from error
            for kind, flags, sequence, body in nl.messages(datagram):
                if first <= sequence <= last:
                    yield sequence, kind, flags, body

    def _opened(self) -> socket.socket:
        if self._socket is None:
            raise OSError(errno.ENOTCONN, "the override table is not open")
        return self._socket

    def _dump(self, kind: int, body: bytes) -> list[bytes]:
        for _ in range(8):
            self._sequence += 1
            sequence = self._sequence
            self._opened().send(ns.request(kind, nl.NLM_F_REQUEST | nl.NLM_F_DUMP, sequence, body))
            bodies: list[bytes] = []
            interrupted = False
            for _, answer, flags, content in self._answers(sequence, sequence):
                interrupted |= bool(flags & nl.NLM_F_DUMP_INTR)
                if answer in (nl.NLMSG_DONE, nl.NLMSG_ERROR):
                    error = ns.error_of(content)
                    # With strict checking, a table without routes does not exist.
                    if error not in (0, errno.ENOENT):
                        raise OSError(error, os.strerror(error))
                    break
                bodies.append(content)
            if not interrupted:
                return bodies
        raise OSError(errno.EINTR, "tables changed during each of 8 dumps")

    def _read_back(self) -> None:
        """Make ``routes`` what the kernel holds: routes of our protocol in our table."""
        decoder = nl.RouteDecoder(self._table)
        found: dict[Network, tuple[NextHop, ...]] = {}
        foreign = 0
        for family in _FAMILIES:
            table = _table_attribute(self._table)
            for body in self._dump(nl.RTM_GETROUTE, nl.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + table):
                protocol, kind = nl.ROUTE.unpack_from(body)[5], nl.ROUTE.unpack_from(body)[7]
                record = decoder.decode(body)
                if record is None:
                    continue
                if protocol != PROTOCOL:
                    foreign += 1
                elif record.route is not None:
                    found[record.route.prefix] = record.route.next_hops
                elif kind == nl.RTN_THROW:
                    packed, length, _ = record.key
                    found[nl.to_network(packed, length)] = ()
        if foreign:
            _log.warning(
                "routes that are not qpd's stand in its override table; choose another override.table",
                table=self._table,
                routes=foreign,
            )
        self.routes = found

    def _ensure_rules(self, families: tuple[int, ...]) -> None:
        """Ours is what has our protocol number, whatever table or priority an earlier configuration named."""
        for family in _FAMILIES:
            wanted = _Rule(family, self._table, self._priority, PROTOCOL)
            there = [rule for rule in self._rules(family) if rule.protocol == PROTOCOL]
            # The new rule stands before the old one goes.
            if family in families and wanted not in there:
                self._rule(nl.RTM_NEWRULE, nl.NLM_F_CREATE | nl.NLM_F_EXCL, wanted, errno.EEXIST)
            kept = family not in families
            for rule in there:
                if rule == wanted and not kept:
                    kept = True
                    continue
                self._rule(nl.RTM_DELRULE, 0, rule, errno.ENOENT)

    def _rules(self, family: int) -> Iterator[_Rule]:
        for body in self._dump(nl.RTM_GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            of_family, *_, table, _, _, action, _ = _RULE.unpack_from(body)
            found = nl.attributes(body, _RULE.size)
            if of_family != family or action != _FR_ACT_TO_TBL:
                continue
            protocol = found.get(_FRA_PROTOCOL, b"\0")[0]
            table = _U32.unpack(found[_FRA_TABLE])[0] if _FRA_TABLE in found else table
            priority = _U32.unpack(found[_FRA_PRIORITY])[0] if _FRA_PRIORITY in found else 0
            yield _Rule(family, table, priority, protocol)

    def _rule(self, kind: int, flags: int, rule: _Rule, forgiven: int) -> None:
        body = _RULE.pack(rule.family, 0, 0, 0, _low_table(rule.table), 0, 0, _FR_ACT_TO_TBL, 0)
        body += ns.attribute(_FRA_PRIORITY, _U32.pack(rule.priority))
        body += ns.attribute(_FRA_TABLE, _U32.pack(rule.table))
        body += ns.attribute(_FRA_PROTOCOL, bytes([rule.protocol]))
        for _, error, reason in self._send_batch(kind, flags, [body]):
            if error != forgiven:
                verb = "add" if kind == nl.RTM_NEWRULE else "delete"
                raise OSError(error, f"ip rule {verb} priority {rule.priority} table {rule.table}: {reason}")


# --- bytes -----------------------------------------------------------------------------------------------------------


def _low_table(table: int) -> int:
    return table if table < 256 else nl.RT_TABLE_COMPAT


def _table_attribute(table: int) -> bytes:
    return ns.attribute(nl.RTA_TABLE, _U32.pack(table))


def _header(prefix: Network, table: int, kind: int, scope: int, flags: int = 0) -> bytes:
    family = socket.AF_INET if isinstance(prefix, IPv4Network) else socket.AF_INET6
    fixed = nl.ROUTE.pack(family, prefix.prefixlen, 0, 0, _low_table(table), PROTOCOL, scope, kind, flags)
    return fixed + ns.attribute(nl.RTA_DST, prefix.network_address.packed) + _table_attribute(table)


def route_body(prefix: Network, next_hops: tuple[NextHop, ...], table: int) -> bytes:
    """An rtmsg that puts ``prefix`` with these next hops into ``table``; none of them: a throw route."""
    if not next_hops:
        return _header(prefix, table, nl.RTN_THROW, _SCOPE_UNIVERSE)
    connected = all(next_hop.connected for next_hop in next_hops)
    scope = _SCOPE_LINK if connected else _SCOPE_UNIVERSE
    if len(next_hops) == 1:
        # IPv6 takes a connected route only in this form.
        gateway, flags = _gateway(prefix, next_hops[0])
        head = _header(prefix, table, nl.RTN_UNICAST, scope, flags)
        return head + ns.attribute(nl.RTA_OIF, _U32.pack(next_hops[0].ifindex)) + gateway
    legs = b"".join(_leg(prefix, next_hop) for next_hop in next_hops)
    return _header(prefix, table, nl.RTN_UNICAST, scope) + ns.attribute(nl.RTA_MULTIPATH, legs)


def _leg(prefix: Network, next_hop: NextHop) -> bytes:
    gateway, flags = _gateway(prefix, next_hop)
    weight = min(max(next_hop.weight, 1), _WEIGHT_MAX)
    length = nl.MULTIPATH_LEG.size + len(gateway)
    return nl.MULTIPATH_LEG.pack(length, flags, weight - 1, next_hop.ifindex) + gateway


def _gateway(prefix: Network, next_hop: NextHop) -> tuple[bytes, int]:
    """The attribute that names the next hop, and the RTNH_F_* flags that go with it."""
    if next_hop.connected:
        return b"", 0
    # The next hop served main's route a moment ago; whether its address is on-link need not be proved again.
    packed = next_hop.address.packed
    if next_hop.address.version == prefix.version:
        return ns.attribute(nl.RTA_GATEWAY, packed), nl.RTNH_F_ONLINK
    return ns.attribute(nl.RTA_VIA, struct.pack("=H", socket.AF_INET6) + packed), nl.RTNH_F_ONLINK


def erase_body(prefix: Network, table: int) -> bytes:
    """An rtmsg that takes our route to ``prefix`` out of ``table``, of whatever kind it is."""
    # Type 0 and scope "nowhere" match any (fib_table_delete); the protocol must be ours.
    return _header(prefix, table, 0, _SCOPE_NOWHERE)
