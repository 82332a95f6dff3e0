"""The tap beside a real bfdd: FRR's packets, its timers, its deaths. No daemon of qpd's takes part.

Two nodes on one wire, with an IPv4 and an IPv6 link-local session at 10 ms x 3. The classifier is on the near one. The
wire breaks without a sign: a program on the far end drops what comes and goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpd.kernel import bpf, layout
from qpd.kernel.bpf import AttachType
from qpd.kernel.ring import EventKind, Ring
from qpd.lab import frr, processes
from qpd.model import Hook
from tests.ebpf.harness import OTHER_IFINDEX, Classifier, Uplink
from tests.ebpf.netns import Node, _ip
from tests.ebpf.packets import DOWN, UP, Roce
from tests.ebpf.test_tap import Cause, State, key_address

pytestmark = [pytest.mark.root, pytest.mark.frr, pytest.mark.timeout(120)]

DEADLINE_S = 20.0
DETECTION_NS = 30_000_000
HOLD_UP_NS = 300_000_000
PEERS = {4: "198.51.100.2", 6: "fe80::2"}
DAEMONS = "zebra=yes\nbfdd=yes\nzebra_options='-A 127.0.0.1'\nbfdd_options='-A 127.0.0.1'\n"
DROP = (0x2_000000B7, 0x95)
"""r0 = TC_ACT_SHOT; exit."""


def configuration(here: int, there: int) -> str:
    lines = ["bfd"]
    for peer in (f"198.51.100.{there}", f"fe80::{there} local-address fe80::{here}"):
        lines += [f" peer {peer} interface up0", "  detect-multiplier 3", "  receive-interval 10"]
        lines += ["  transmit-interval 10", "  no shutdown", " exit", " !"]
    return "\n".join(["frr defaults datacenter", *lines, "exit", ""])


@dataclass
class Pair:
    """The near node with the classifier, its BFD sessions, and what can happen to them."""

    classifier: Classifier
    ring: Ring
    near: frr.Instance
    far: frr.Instance
    far_node: Node
    ifindex: int
    far_ifindex: int
    sender: socket.socket
    version: int = 4

    def session(self, version: int) -> Any:
        key = np.array([(self.ifindex, key_address(PEERS[version]))], layout.NEIGHBOUR_ADDRESS)
        return self.classifier.maps._tables["bfd_sessions"].get(key.tobytes())

    @property
    def dead(self) -> int:
        return int.from_bytes(self.classifier.maps._tables["living"].octets(1) or b"", "little")

    def events(self) -> list[tuple[int, bool, Cause, int]]:
        """Path, whether it serves, cause, kernel's time."""
        told = []
        for record in self.ring.read(4096):
            if record.kind is EventKind.PATH_STATE:
                up, cause = np.frombuffer(record.content, "u4", 2)
                told.append((record.path, bool(up), Cause(cause), record.kernel_ns))
        return told

    def alive(self) -> bool:
        return all(
            (session := self.session(version)) is not None
            and session["state"] == State.ALIVE
            and session["detection_ns"] == DETECTION_NS
            for version in PEERS
        )

    @contextmanager
    def cut(self) -> Iterator[None]:
        """The wire swallows everything, both ways, and keeps its carrier.

        First what comes from the far end: so its word on what follows is not heard, however slow this is.
        """
        program = bpf.prog_load(DROP, name="cut")
        with ExitStack() as stack:
            stack.callback(os.close, program)
            for where in (AttachType.TCX_EGRESS, AttachType.TCX_INGRESS):
                stack.callback(
                    os.close, self.far_node.call(bpf.link_create, program, self.far_ifindex, where)
                )
            yield

    def signal(self, number: int) -> None:
        """To both bfdd at once: neither shall miss the other."""
        found = [one.records.find(f"{one.node}.bfdd") for one in (self.near, self.far)]
        with before_all_others():
            for bfdd in found:
                if bfdd is not None:
                    bfdd.send(number)

    def bfdd_says(self) -> list[str]:
        return [peer["status"] for peer in self.near.show("show bfd peers json")]


@contextmanager
def before_all_others() -> Iterator[None]:
    """Nothing on this processor comes between what is done here: bfdd has priority 50, and counts milliseconds."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def until(true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.002)


@pytest.fixture(scope="module")
def wire(session_classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if reason := frr.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("frr")
    with ExitStack() as stack:
        nodes, instances = {}, {}
        for name in ("near", "far"):
            node = nodes[name] = Node(f"qpdt-{os.getpid()}-tap-{name}")
            _ip("netns", "add", node.name)
            stack.callback(_ip, "netns", "del", node.name)
        _ip("-n", nodes["near"].name, "link", "add", "up0", "type", "veth",
            "peer", "name", "up0", "netns", nodes["far"].name)  # fmt: skip
        for number, (name, node) in enumerate(nodes.items(), start=1):
            node.run("ip", "link", "set", "lo", "up")
            node.run("sysctl", "-qw", "net.ipv6.conf.up0.addr_gen_mode=1")
            node.run("ip", "addr", "add", f"198.51.100.{number}/24", "dev", "up0")
            node.run("ip", "link", "set", "up0", "up")
            node.run("ip", "addr", "add", f"fe80::{number}/64", "dev", "up0", "nodad")
            files = {}
            for target, text in {
                frr.FRR_CONF: configuration(number, 3 - number),
                frr.DAEMONS: DAEMONS,
                frr.VTYSH_CONF: "service integrated-vtysh-config\n",
            }.items():
                files[target] = folder / f"{name}-{Path(target).name}"
                files[target].write_text(text)
            records = processes.Records(folder / f"{name}-records")
            instance = instances[name] = frr.Instance(node.name, name, files, records, folder)
            stack.callback(shutil.rmtree, instance.sockets, ignore_errors=True)
            stack.callback(shutil.rmtree, instance.configuration, ignore_errors=True)
            stack.callback(records.end)
        ifindex = nodes["near"].ifindex("up0")
        for hook, where in ((Hook.STEER, AttachType.TCX_EGRESS), (Hook.OBSERVE, AttachType.TCX_INGRESS)):
            program = session_classifier.programs[hook]
            stack.callback(os.close, nodes["near"].call(bpf.link_create, program, ifindex, where))
        session_classifier.reset()
        frr.bring_up(instances.values(), time.monotonic() + DEADLINE_S)
        sender = stack.enter_context(nodes["near"].call(_raw))
        ring = Ring(session_classifier.pins.map("events"))
        stack.callback(ring.close)
        yield Pair(
            session_classifier,
            ring,
            instances["near"],
            instances["far"],
            nodes["far"],
            ifindex,
            nodes["far"].ifindex("up0"),
            sender,
        )


def _raw() -> socket.socket:
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.bind(("up0", 0))
    return sender


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6 link-local"])
def pair(wire: Pair, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both sessions are up, and one of them tells of path 0."""
    version = request.param
    table = wire.classifier.maps._tables["path_of_next_hop"]
    keys, _ = table.all()
    table.erase(keys)
    until(wire.alive, f"sessions do not come up: {wire.bfdd_says()}")
    wire.classifier.fabric(
        [Uplink(wire.ifindex, PEERS[version], sole=False), Uplink(OTHER_IFINDEX, "fe80::7")]
    )
    keys = np.array([(wire.ifindex, key_address(PEERS[version]))], layout.NEIGHBOUR_ADDRESS)
    table.write(keys, np.zeros(1, layout.INDEX))
    control = wire.classifier.maps._control()
    control["hold_up_ns"] = HOLD_UP_NS
    wire.classifier.maps._tables["control"].set(0, control)
    wire.version = version
    until(lambda: wire.session(version)["path"] == 0 and wire.dead == 0, "the path is not found")
    wire.events()
    yield wire
    wire.signal(signal.SIGCONT)


def test_a_session_is_read_as_bfdd_has_it(pair: Pair) -> None:
    version = pair.version
    (peer,) = [peer for peer in pair.near.show("show bfd peers json") if peer["peer"] == PEERS[version]]
    session = pair.session(version)
    assert session["local"]["discriminator"] == peer["id"]
    assert session["remote"]["discriminator"] == peer["remote-id"]
    assert session["local"]["state"] == session["remote"]["state"] == UP
    assert session["local"]["required_min_rx"] == peer["receive-interval"] * 1000
    assert session["remote"]["desired_min_tx"] == peer["remote-transmit-interval"] * 1000
    assert session["remote"]["multiplier"] == peer["remote-detect-multiplier"]


def test_a_silent_loss_is_bfdd_s_to_find_and_the_path_dies_with_its_packet(pair: Pair) -> None:
    version = pair.version
    with pair.cut():
        until(lambda: pair.dead == 1, "bfdd did not tell of the loss")
        (event,) = pair.events()
        assert event[:3] == (0, False, Cause.LOCAL_DOWN)
        assert pair.session(version)["local"]["state"] == DOWN
        assert event[3] - int(pair.session(version)["last_rx_ns"]) >= 29_000_000, (
            "not before the detection time"
        )
        assert "down" in pair.bfdd_says()
    until(lambda: pair.dead == 0, "the path did not return")
    (event,) = pair.events()
    session = pair.session(version)
    assert event[:3] == (0, True, Cause.UP)
    assert event[3] - int(session["up_since_ns"]) >= HOLD_UP_NS


def test_a_bfdd_that_hangs_leaves_the_silence_to_the_tap(pair: Pair) -> None:
    """No verdict comes from either end; the path's next RoCE packet after the deadline finds it."""
    version = pair.version
    roce = next(
        roce
        for roce in (Roce(dest_qp=qp) for qp in range(64))
        if pair.classifier.path_of(pair.classifier.steer(roce.build())) == 0
    )
    packet = roce.build()
    pair.signal(signal.SIGSTOP)
    last = int(pair.session(version)["last_rx_ns"])

    def dead() -> bool:
        pair.sender.send(packet)
        return pair.dead == 1

    until(dead, "nobody found the silence")
    events = pair.events()
    assert [event[:3] for event in events] == [(0, False, Cause.SILENT)]
    assert events[0][3] > last + DETECTION_NS
    pair.sender.send(packet)
    entry = pair.classifier.entry(roce.key)
    assert entry is not None
    assert entry["path"] == 1
    pair.signal(signal.SIGCONT)
    until(lambda: pair.dead == 0, "the path did not return")


def test_a_session_that_is_shut_down_is_no_failure(pair: Pair) -> None:
    version = pair.version
    session = f"peer {PEERS[version]}{' local-address fe80::1' if version == 6 else ''} interface up0"
    pair.near.vtysh("configure terminal", "bfd", session, "shutdown")
    until(lambda: pair.session(version)["local"]["state"] == 0, "no AdminDown was seen")
    until(lambda: "shutdown" in pair.bfdd_says(), "bfdd does not say so")
    assert (pair.session(version)["state"], pair.dead, pair.events()) == (State.IDLE, 0, [])
    pair.near.vtysh("configure terminal", "bfd", session, "no shutdown")
    until(pair.alive, "the session did not come back")
    assert (pair.dead, pair.events()) == (0, [])


def test_a_killed_bfdd_is_missed_by_the_far_end_and_its_successor_brings_the_path_back(pair: Pair) -> None:
    """The far end misses it, declares the session down and says so: with that, and not before, the path is dead."""
    version = pair.version
    old = int(pair.session(version)["local"]["discriminator"])
    bfdd = pair.near.records.find("near.bfdd")
    assert bfdd is not None
    assert bfdd.send(signal.SIGKILL)
    until(lambda: pair.dead == 1, "the far end's Down was not taken")
    assert [event[:3] for event in pair.events()] == [(0, False, Cause.REMOTE_DOWN)]
    pair.near.records.end("near.bfdd")
    pair.near.restart("bfdd", time.monotonic() + DEADLINE_S)
    until(lambda: pair.alive() and pair.dead == 0, "the path did not return")
    assert pair.session(version)["local"]["discriminator"] != old
