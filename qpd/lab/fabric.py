"""The fabric: a topology brought up in network namespaces, looked at, hurt, healed and taken down."""

from __future__ import annotations

import json
import os
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpd.lab import frr, frrconf, namespaces, programs, rtnetlink, sidecar, topology, wan, wires
from qpd.lab.errors import LabError
from qpd.lab.state import State
from qpd.lab.topology import Endpoint, Link, Role, Topology

Progress = Callable[[str], None]
"""Called with one line for each step of a long operation."""

DEFAULT_BFD = (100, 3)
"""Milliseconds and multiplier of the profile that all links have from frr.conf."""

_FIRST_INDEX = 1000
"""Interface indexes are all different: where both ends of a veth happen to have the same one, the kernel takes it for a
link without a lower device and may tell of a lost carrier up to a second late (linkwatch_urgent_event)."""

_HASH_SEED = "net.ipv4.fib_multipath_hash_seed"
_FORGET_ROUTES = "net.ipv4.route.flush"

# Interfaces get their link-local addresses without the second of duplicate address detection: a wire has two ends.
_MACHINE_SYSCTLS = {
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.all.accept_dad": "0",
}


@dataclass(frozen=True)
class Health:
    """How far a fabric is from converged: what is still missing, as lines for people; empty when converged."""

    missing: tuple[str, ...]

    @property
    def converged(self) -> bool:
        """True when nothing is missing."""
        return not self.missing


class Fabric:
    """A lab of this machine.

    Args:
        topology: what it consists of.
        name: the lab's name (several labs may run side by side); by default the topology's.
        seed: goes into every node's multipath hash seed, so that runs can be repeated and varied.
    """

    def __init__(self, topology: Topology, name: str | None = None, seed: int = 0) -> None:
        self.topology = topology
        self.name = name or topology.name
        self.state = State(
            name=self.name,
            topology=str(topology.path),
            namespaces=[self.namespace(node.name) for node in topology.machines],
            instances=[self.namespace(node.name) for node in topology.routers],
            seed=seed,
        )
        self.records = self.state.records()
        self.frr = {
            node.name: frr.Instance(
                name=self.namespace(node.name),
                node=node.name,
                files={bind.target: bind.source for bind in node.binds},
                records=self.records,
                logs=self.state.logs,
            )
            for node in topology.routers
        }
        self._confs: dict[str, frrconf.FrrConf] = {}
        self._shapes = wan.shapes(topology)
        self._hurt: set[Link] = set()
        self._timers: set[Link] = set()

    @classmethod
    def load(cls, path: Path | str, name: str | None = None, seed: int = 0) -> Fabric:
        """The fabric of a topology file, not yet up."""
        return cls(topology.load(path), name, seed)

    @classmethod
    def attach(cls, name: str) -> Fabric:
        """The fabric of a lab that is up.

        Raises:
            LabError: where there is no lab of that name.
        """
        state = State.load(name)
        return cls(topology.load(state.topology), name, state.seed)

    # -- names ------------------------------------------------------------------------------------------------------

    def namespace(self, node: str) -> str:
        """The network namespace of a node, which is also the name of its FRR instance."""
        return f"{self.name}-{node}"

    def link(self, name: str, *more: str) -> Link:
        """The link that is meant by node names, endpoints NODE:INTERFACE, or "A--B"."""
        return self.topology.link(name, *more)

    @property
    def leaves(self) -> list[str]:
        """The names of the leaves."""
        return [node.name for node in self.topology.of_role(Role.LEAF)]

    @property
    def spines(self) -> list[str]:
        """The names of the spines."""
        return [node.name for node in self.topology.of_role(Role.SPINE)]

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts."""
        return [node.name for node in self.topology.of_role(Role.HOST)]

    def conf(self, node: str) -> frrconf.FrrConf:
        """What the frr.conf of a router says."""
        if node not in self._confs:
            file = self.frr[node].files[frr.FRR_CONF]
            self._confs[node] = frrconf.parse(file.read_text(encoding="utf-8"))
        return self._confs[node]

    def vtep(self, leaf: str) -> str:
        """The VTEP address of a leaf."""
        address = self.conf(leaf).loopback
        if address is None:
            raise LabError(
                f"{self.frr[leaf].files[frr.FRR_CONF]}: interface lo has no ip address; a leaf needs one"
            )
        return address

    def address(self, host: str, family: int = 4) -> str:
        """The first global address of a host's first interface, as the kernel has it."""
        interface = self.topology.links_of(host)[0].end(host).interface
        output = self.exec(host, "ip", "-j", "address", "show", "dev", interface).stdout
        wanted = "inet" if family == 4 else "inet6"
        for entry in json.loads(output)[0]["addr_info"]:
            if entry["family"] == wanted and entry["scope"] == "global":
                return str(entry["local"])
        raise LabError(f"{host}: {interface} has no {wanted} address")

    # -- up and down ------------------------------------------------------------------------------------------------

    def up(self, *, qpd: bool = True, deadline: float = 90.0, progress: Progress | None = None) -> None:
        """Build the fabric and wait until it has converged (and every sidecar's qpd steers, with `qpd`).

        Everything is recorded before it is made; after a failure `down` removes what there is.

        Raises:
            LabError: where something is missing or does not come up within `deadline` seconds.
        """
        progress = progress or _silent
        self.check_free()
        limit = time.monotonic() + deadline
        nodes = self.topology
        self.state.save()
        progress(f"{len(nodes.machines)} network namespaces, {len(nodes.links)} links")
        self._make_namespaces()
        self._make_links()
        progress(
            f"interfaces, bridges and VXLAN devices of {len(self.leaves)} leaves and {len(self.hosts)} hosts"
        )
        self._make_wires()
        self._run_exec(progress)
        self._make_losses()
        progress(f"FRR on {len(nodes.routers)} routers")
        frr.bring_up(self.frr.values(), limit)
        sidecars = [node.shares for node in nodes.of_role(Role.QPD) if node.shares is not None] if qpd else []
        if sidecars:
            # They compile their classifiers while BGP waits for its timers.
            progress(f"qpd on {len(sidecars)} leaves")
            for node in sidecars:
                self.start_qpd(node, wait=False)
        progress("BGP, EVPN and BFD converge")
        self.wait_converged(limit - time.monotonic())
        for node in sidecars:
            self.wait_qpd(node, limit - time.monotonic())

    def check_free(self) -> None:
        """Raise LabError where this machine cannot have the lab, or something of its names is there already."""
        problem = "qplab needs root: run it with sudo" if os.geteuid() != 0 else frr.missing()
        if problem:
            raise LabError(problem)
        self.state.check_free()

    def down(self) -> None:
        """Remove everything of the lab, however far `up` has come."""
        self.state.remove()

    def __enter__(self) -> Fabric:
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def _make_namespaces(self) -> None:
        # One after the other: an interrupt would leave threads that go on making what is being removed.
        for name in self.state.namespaces:
            namespaces.add(name)
        for node in self.topology.machines:
            values = {**_MACHINE_SYSCTLS, **node.sysctls, _HASH_SEED: _hash_seed(self.state.seed, node.name)}
            absent = namespaces.set_sysctls(self.namespace(node.name), values.items())
            # The seed can be set from kernel 6.11 on; before that, all namespaces share the kernel's.
            if wrong := [key for key in absent if key != _HASH_SEED]:
                raise LabError(
                    f"{self.topology.path}: node {node.name}: sysctls: this kernel has no {wrong[0]}"
                )

    def reseed(self, seed: int) -> None:
        """Give every node another multipath hash seed, as if the fabric had come up with `seed`.

        Routes that were chosen by the old one and cached are forgotten.
        """
        for node in self.topology.machines:
            values = [(_HASH_SEED, _hash_seed(seed, node.name)), (_FORGET_ROUTES, "1")]
            namespaces.set_sysctls(self.namespace(node.name), values)

    def _make_links(self) -> None:
        machines = {node.name for node in self.topology.machines}
        lines = []
        for number, link in enumerate(self.topology.links):
            if {link.a.node, link.b.node} <= machines:
                a, b = link.ends
                lines.append(
                    f"link add {a.interface} address {a.mac_address} index {_FIRST_INDEX + 2 * number} "
                    f"mtu {link.mtu} netns {self.namespace(a.node)} type veth "
                    f"peer name {b.interface} address {b.mac_address} index {_FIRST_INDEX + 2 * number + 1} "
                    f"mtu {link.mtu} netns {self.namespace(b.node)}"
                )
        namespaces.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n")
        for node in self.topology.machines:
            ups = [
                f"link set {link.end(node.name).interface} up" for link in self.topology.links_of(node.name)
            ]
            namespaces.run(
                ["ip", "-n", self.namespace(node.name), "-batch", "-"], input="\n".join(ups) + "\n"
            )

    def _make_wires(self) -> None:
        interfaces = {
            self.namespace(node.name): [
                link.end(node.name).interface for link in self.topology.uplinks(node.name)
            ]
            for node in self.topology.routers
        }
        wires.make(interfaces, self.state.pins)

    def _run_exec(self, progress: Progress) -> None:
        def run_all(node: topology.Node) -> list[str]:
            outputs = []
            for command in node.commands():
                try:
                    done = namespaces.run(namespaces.enter(self.namespace(node.name), command))
                except LabError as error:
                    raise LabError(f"{self.topology.path}: node {node.name}: exec: {error}") from error
                outputs += done.stdout.splitlines()
            return outputs

        with ThreadPoolExecutor(4) as pool:
            said: dict[str, list[str]] = {}
            for node, outputs in zip(
                self.topology.machines, pool.map(run_all, self.topology.machines), strict=True
            ):
                for line in dict.fromkeys(outputs):
                    said.setdefault(line, []).append(node.name)
        for line, names in said.items():
            progress(f"{line} ({len(names)} nodes)" if len(names) > 1 else f"{names[0]}: {line}")

    def _make_losses(self) -> None:
        """Without netem, the loss of wide-area links is made where their packets arrive."""
        if wan.missing() is not None:
            for link, _ in wan.shaped_links(self.topology):
                self._set_loss(link.ends, 0.0)

    # -- convergence ------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """What is missing: BGP and BFD sessions, ECMP routes to every VTEP by all uplinks, EVPN's flood lists."""
        with ThreadPoolExecutor(4) as pool:
            return Health(tuple(line for lines in pool.map(self._missing, self.frr) for line in lines))

    def wait_converged(self, deadline: float = 60.0) -> None:
        """Wait until nothing is missing.

        Raises:
            LabError: what is still missing after `deadline` seconds.
        """
        limit = time.monotonic() + deadline
        open_nodes = list(self.frr)
        missing: list[str] = []
        while open_nodes:
            with ThreadPoolExecutor(4) as pool:
                results = dict(zip(open_nodes, pool.map(self._missing, open_nodes), strict=True))
            open_nodes = [node for node in open_nodes if results[node]]
            missing = [line for lines in results.values() for line in lines]
            if open_nodes and time.monotonic() > limit:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise LabError(
                    f"{self.name} has not converged in {deadline:.0f} s: {'; '.join(missing[:3])}{more}"
                )
            if open_nodes:
                time.sleep(0.2)

    def _missing(self, node: str) -> list[str]:
        try:
            return self._missing_facts(node)
        except LabError as error:
            # A daemon that is late, or has ended, is what is missing.
            return [str(error)]

    def _missing_facts(self, node: str) -> list[str]:
        instance, links = self.frr[node], self.topology.uplinks(node)
        missing = []
        summary = instance.show("show bgp summary json")
        for family in ("ipv4Unicast", "l2VpnEvpn"):
            peers = summary.get(family, {}).get("peers", {})
            established = sum(peer.get("state") == "Established" for peer in peers.values())
            if established < len(links):
                missing.append(f"{node}: BGP {family}: {established} of {len(links)} sessions")
        sessions = [peer for peer in instance.show("show bfd peers json") if peer.get("status") == "up"]
        if len(sessions) < len(links):
            missing.append(f"{node}: BFD: {len(sessions)} of {len(links)} sessions")
        if not missing and node in self.leaves:
            missing += self._missing_tunnels(node, len(links))
        return missing

    def _missing_tunnels(self, leaf: str, uplinks: int) -> list[str]:
        others = {self.vtep(other): other for other in self.leaves if other != leaf}
        routes = self.next_hops(leaf)
        missing = [
            f"{leaf}: route to {other}: {len(routes.get(address, []))} of {uplinks} next hops"
            for address, other in others.items()
            if len(routes.get(address, [])) < uplinks
        ]
        flooded = self.flood_list(leaf)
        missing += [
            f"{leaf}: no EVPN type-3 route of {o}" for address, o in others.items() if address not in flooded
        ]
        return missing

    def next_hops(self, node: str) -> dict[str, list[tuple[str, str]]]:
        """The kernel's unicast IPv4 routes of a node: destination -> (interface, gateway) of each next hop."""
        routes = {}
        for route in json.loads(self.exec(node, "ip", "-j", "route", "show").stdout or "[]"):
            hops = route.get("nexthops", [route])
            routes[route["dst"]] = [(hop["dev"], _gateway(hop)) for hop in hops if "dev" in hop]
        return routes

    def flood_list(self, leaf: str) -> set[str]:
        """The remote VTEPs that a leaf floods to, as EVPN type-3 routes have told it."""
        output = self.exec(leaf, "bridge", "-j", "fdb", "show", "dev", "vxlan100").stdout
        return {entry["dst"] for entry in json.loads(output or "[]") if entry["mac"] == "00:00:00:00:00:00"}

    # -- nodes ------------------------------------------------------------------------------------------------------

    def exec(
        self, node: str, *command: str, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node and return what it printed.

        Raises:
            LabError: where it fails and `check` is set.
        """
        full = namespaces.enter(self.namespace(self._known(node)), command)
        done = subprocess.run(full, check=False, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            words = " ".join((done.stderr or done.stdout).split())
            raise LabError(f"{node}: {' '.join(command)}: {words or f'exit status {done.returncode}'}")
        return done

    def popen(self, node: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a node; the caller ends it (`down` ends what is left)."""
        return subprocess.Popen(namespaces.enter(self.namespace(self._known(node)), command), **options)

    def enter(self, node: str, *command: str) -> list[str]:
        """The argument vector that runs a command on a node."""
        return namespaces.enter(self.namespace(self._known(node)), command)

    def vtysh(self, node: str, *commands: str) -> str:
        """What vtysh of a router prints for these commands."""
        return self.router(node).vtysh(*commands)

    def show(self, node: str, command: str) -> Any:  # noqa: ANN401 - JSON
        """The JSON of a router's `show ... json`."""
        return self.router(node).show(command)

    def counters(self, node: str) -> Mapping[str, rtnetlink.Counters]:
        """The kernel's interface counters of a node, by interface."""
        with rtnetlink.Socket(self.namespace(self._known(node))) as netlink:
            return netlink.counters()

    def _known(self, node: str) -> str:
        if self.namespace(node) not in self.state.namespaces:
            names = ", ".join(machine.name for machine in self.topology.machines)
            raise LabError(f"lab {self.name} has no node {node}; it has {names}")
        return node

    def router(self, node: str) -> frr.Instance:
        """The FRR instance of a spine or leaf; LabError for anything else."""
        if self._known(node) not in self.frr:
            raise LabError(f"{node} is a host and runs no FRR; routers are {', '.join(self.frr)}")
        return self.frr[node]

    # -- faults -----------------------------------------------------------------------------------------------------

    def cut(self, link: Link, side: str | None = None) -> None:
        """Set a link down at one node (by default the first of the file); both ends lose carrier."""
        end = link.cut_at(side)
        self._hurt.add(link)
        self.exec(end.node, "ip", "link", "set", end.interface, "down")

    def heal(self, link: Link) -> None:
        """Undo `cut` and `lose` on a link; nothing happens where neither was."""
        self._set_loss(link.ends, 0.0)
        for end in link.ends:
            self.exec(end.node, "ip", "link", "set", end.interface, "up")
        self._hurt.discard(link)

    def lose(self, link: Link, towards: str | None = None, probability: float = 1.0) -> None:
        """Lose packets on the wire with carrier up: both ways at one moment, or only those that go towards one node.

        What is lost is never seen by packet taps or tc programs of the receiving end. It comes on top of what a
        wide-area link loses by itself.
        """
        self._hurt.add(link)
        self._set_loss(link.receivers(towards), probability)

    def stop_losing(self, link: Link, towards: str | None = None) -> None:
        """Undo `lose`, and nothing else, both ways or one."""
        self._set_loss(link.receivers(towards), 0.0)

    def _set_loss(self, ends: Sequence[Endpoint], probability: float) -> None:
        """Lose what arrives at these ends, and what their links lose by themselves where no netem does that."""
        own = [self._own_loss(end) for end in ends]
        wanted = [1 - (1 - probability) * (1 - loss) for loss in own]
        with closing(programs.LossSwitch(len(ends))) as switch:
            # Attaching takes milliseconds an end: until all are there they lose what the links lose.
            switch.set(own)
            for end, program, loss in zip(ends, switch.programs, wanted, strict=True):
                with rtnetlink.Socket(self.namespace(end.node)) as netlink:
                    netlink.set_xdp(end.interface, program if loss > 0 else -1)
            switch.set(wanted)

    def _own_loss(self, end: Endpoint) -> float:
        """The part of what arrives at an end that its wide-area link loses, where no netem does that."""
        if wan.missing() is None:
            return 0.0
        link = next(one for one in self.topology.links_of(end.node) if end in one.ends)
        return self.shape(link.other(end.node)).loss_percent / 100

    # -- wide-area links --------------------------------------------------------------------------------------------

    def shape(self, end: Endpoint) -> wan.Shape:
        """What a port does to the packets that it sends: what the topology says, or `set_shape` has set since."""
        return self._shapes.get(end, wan.PLAIN)

    def set_shape(self, link: Link, shape: wan.Shape) -> None:
        """Make both directions of a link delay, lose and limit like this from now on.

        Raises:
            LabError: where the shape has a delay and this kernel has no netem; nothing is changed then.
        """
        for end in link.ends:
            self.apply_shape(end, shape)
            self._shapes[end] = shape
        if wan.missing() is not None:
            self._set_loss(link.ends, 0.0)

    def apply_shape(self, end: Endpoint, shape: wan.Shape) -> None:
        """Make a port delay, lose and limit what it sends, for a while: `shape` goes on to say what it was.

        Raises:
            LabError: as `set_shape` does.
        """
        if shape.needs_netem and (problem := wan.missing()):
            raise LabError(f"{end}: {shape}: {problem}")
        self.exec(end.node, "sh", wan.script(), end.interface, *shape.words())

    def restore(self) -> None:
        """Undo what this object did after `up`: heal links, put BFD timers back, end qpd and remove its traces."""
        for link in list(self._hurt):
            self.heal(link)
        for link in list(self._timers):
            self.set_bfd(link, *DEFAULT_BFD)
            self._timers.discard(link)
        for node in self.frr:
            if self.sidecar(node).config.exists():
                self.stop_qpd(node, detach=True)

    @contextmanager
    def fault(self, link: Link, **how: Any) -> Iterator[None]:
        """A silent loss (see `lose`) for the time of a `with` block."""
        self.lose(link, **how)
        try:
            yield
        finally:
            self.heal(link)

    # -- BFD --------------------------------------------------------------------------------------------------------

    def set_bfd(self, link: Link, interval_ms: int, multiplier: int) -> None:
        """Change the BFD timers of a link at both ends, at run time; they come into force by a poll sequence."""
        self._timers.add(link)
        profile = f"{interval_ms}x{multiplier}"
        for end in link.ends:
            neighbor = self.conf(end.node).neighbor_on(end.interface)
            if neighbor is None:
                raise LabError(
                    f"{end} has no BGP neighbour in {self.frr[end.node].files[frr.FRR_CONF]}; so no BFD"
                )
            self.vtysh(
                end.node,
                "configure terminal",
                "bfd",
                f"profile {profile}",
                f"transmit-interval {interval_ms}",
                f"receive-interval {interval_ms}",
                f"detect-multiplier {multiplier}",
                "exit",
                "exit",
                f"router bgp {self.conf(end.node).asn}",
                f"neighbor {neighbor} bfd profile {profile}",
            )

    def bfd_peer(self, node: str, link: Link) -> dict[str, Any]:
        """What bfdd says of a link's session at one of its nodes; {} where it has none."""
        interface = link.end(node).interface
        return self.bfd_sessions(node).get(interface, {})

    def bfd_sessions(self, node: str) -> dict[str, dict[str, Any]]:
        """The BFD sessions of a node, by interface."""
        return {peer.get("interface", ""): dict(peer) for peer in self.show(node, "show bfd peers json")}

    # -- qpd --------------------------------------------------------------------------------------------------------

    def start_daemon(self, node: str, daemon: str, deadline: float = 90.0) -> None:
        """Start a router's daemon again, with its configuration; nothing happens where it runs.

        Raises:
            LabError: where it does not answer within `deadline` seconds.
        """
        if self.records.find(f"{node}.{daemon}") is not None:
            return
        if daemon == "qpd":
            self.sidecar(node).restart()
            self.wait_qpd(node, deadline)
        else:
            self.router(node).restart(daemon, time.monotonic() + deadline)

    def sidecar(self, node: str) -> sidecar.Sidecar:
        """The qpd beside a router."""
        router, beside = self.router(node), self.topology.sidecar(node)
        return sidecar.Sidecar(
            node=node,
            namespace=self.namespace(node),
            frr_sockets=router.sockets,
            pins=self.state.pins / node,
            directory=self.state.directory / node,
            records=self.records,
            log=self.state.logs / f"{node}.qpd.log",
            base=beside.bound(sidecar.CONFIG) if beside else None,
        )

    def start_qpd(
        self,
        node: str,
        extra_config: Mapping[str, Any] | None = None,
        *,
        wait: bool = True,
        deadline: float = 30.0,
    ) -> None:
        """Start qpd beside a router; with `wait`, return when it steers."""
        self.sidecar(node).start(extra_config or {})
        if wait:
            self.wait_qpd(node, deadline)

    def wait_qpd(self, node: str, deadline: float = 30.0) -> None:
        """Wait until a router's qpd steers."""
        self.sidecar(node).wait_steering(deadline)

    def stop_qpd(self, node: str, *, detach: bool = False) -> None:
        """End a router's qpd with SIGTERM; its programs go on steering unless `detach` is set."""
        self.sidecar(node).stop(detach=detach)

    def kill_qpd(self, node: str, signal_number: int) -> None:
        """Send a signal to a router's qpd."""
        self.sidecar(node).kill(signal_number)


def _hash_seed(seed: int, node: str) -> str:
    return str(zlib.crc32(f"{seed}/{node}".encode()))


def _silent(_line: str) -> None:
    """No progress is wanted."""


def _gateway(hop: Mapping[str, Any]) -> str:
    via = hop.get("via")
    return str(via["host"]) if isinstance(via, Mapping) else str(hop.get("gateway", ""))
