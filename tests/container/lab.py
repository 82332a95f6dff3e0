"""A lab that containerlab has deployed, as the fabric that the other tiers know.

Its nodes are containers: their network namespaces have names, which containerlab gives them, and FRR and qpd answer
inside.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from qpd.lab import frr, topology
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.processes import Records
from qpd.lab.sidecar import Sidecar
from qpd.lab.topology import Topology

from .engine import Engine

_CPU_GROUP = Path("/sys/fs/cgroup/cpu/cgroup.procs")


class ContainerFrr(frr.Instance):
    """FRR in a container."""

    def __init__(self, engine: Engine, node: str, files: dict[str, Path], records: Records) -> None:
        super().__init__(name=node, node=node, files=files, records=records, logs=engine.directory)
        self.engine = engine

    def vtysh(self, *commands: str, timeout: float = 20.0) -> str:
        """What vtysh prints in the container."""
        arguments = [word for command in commands for word in ("-c", command)]
        # As `docker exec`, at a fraction of its cost.
        inside = ["nsenter", f"--target={self.process}", "--mount", "--net", "--uts"]
        done = subprocess.run(
            [*inside, "vtysh", *arguments], check=False, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != 0:
            raise LabError(f"{self.node}: vtysh {'; '.join(commands)}: {done.stderr.strip()}")
        return done.stdout

    @cached_property
    def process(self) -> int:
        """The container's first process; routers are not restarted."""
        return self.engine.process(self.node)

    def hurry_bfdd(self) -> None:
        """Give bfdd precedence over all else, as qplab does: on a busy machine it would declare its peers down."""
        for line in self.engine.docker("top", self.node, "-eo", "pid,comm").stdout.splitlines():
            pid, _, name = line.strip().partition(" ")
            if name.strip() == "bfdd":
                if _CPU_GROUP.exists():
                    # cgroup v1: a container's group has no real-time share.
                    _CPU_GROUP.write_text(pid)
                subprocess.run(["chrt", "--fifo", "--pid", "50", pid], check=True)


class ContainerLab(Fabric):
    """A lab of containers.

    Args:
        engine: where it runs.
        containerlab: the binary.
        file: the topology file, as it lies in deploy/containerlab.
        images: variables of the topology file.
        without: nodes that are left out, with their links and their sidecars.
    """

    def __init__(
        self, engine: Engine, containerlab: Path, file: Path, images: dict[str, str], without: Iterable[str]
    ) -> None:
        super().__init__(_cut(topology.load(file), set(without)))
        self.engine = engine
        self.containerlab = containerlab
        self.environment = {
            **engine.environment,
            **images,
            "PATH": f"{containerlab.parent}:/usr/bin:/usr/sbin:/bin:/sbin",
            "CLAB_VERSION_CHECK": "disable",
            "CLAB_LABDIR_BASE": str(engine.directory),
        }
        self.routers = [
            ContainerFrr(engine, name, instance.files, self.records) for name, instance in self.frr.items()
        ]
        self.frr = {router.node: router for router in self.routers}

    def namespace(self, node: str) -> str:
        """Containers' names: containerlab names a node's network namespace so, too."""
        return node

    def deploy(self) -> str:
        """`containerlab deploy`; returns what it said."""
        said = self._run(
            "containerlab",
            "deploy",
            f"--topo={self.topology.path}",
            f"--node-filter={','.join(self.topology.nodes)}",
        )
        for router in self.routers:
            router.hurry_bfdd()
        return said

    def destroy(self) -> str:
        """The lab's own destroy.sh, which calls `containerlab destroy`."""
        script = self.topology.path.parents[1] / "common/destroy.sh"
        return self._run("sh", str(script), str(self.topology.path))

    def sidecar(self, node: str) -> Sidecar:
        """The qpd beside a leaf; its socket is reached by way of its process."""
        beside = self.topology.sidecar(node)
        assert beside is not None
        return Sidecar(
            node=node,
            namespace=node,
            frr_sockets=Path("/var/run/frr"),
            pins=self.pins(node),
            directory=Path(f"/proc/{self.engine.process(beside.name)}/root/run/qpd"),
            records=self.records,
            log=self.engine.log,
            base=None,
        )

    def pins(self, leaf: str) -> Path:
        """Where start-qpd.sh lets a leaf's qpd pin, but for the last part."""
        beside = self.topology.sidecar(leaf)
        assert beside is not None
        return Path(f"/sys/fs/bpf/qplab/clab-{self.topology.name}/{beside.name}")

    def last_words(self, leaf: str) -> str:
        """The last line that the qpd beside a leaf has said."""
        beside = self.topology.sidecar(leaf)
        assert beside is not None
        said = self.engine.docker("logs", "--tail=1", beside.name, check=False)
        return (said.stdout + said.stderr).strip()

    def inspect(self, container: str, what: str) -> str:
        """A field of `docker inspect`, as a Go template names it."""
        return self.engine.docker("inspect", "--format", f"{{{{{what}}}}}", container).stdout.strip()

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            env=self.environment,
        )
        if done.returncode != 0:
            words = " | ".join((done.stdout + done.stderr).strip().splitlines()[-6:])
            raise LabError(f"{' '.join(command[:3])}: {words}")
        return done.stdout + done.stderr


def _cut(whole: Topology, without: set[str]) -> Topology:
    """The topology without some nodes, as `--node-filter` leaves them out."""
    nodes = {
        name: node for name, node in whole.nodes.items() if name not in without and node.shares not in without
    }
    links = [link for link in whole.links if {link.a.node, link.b.node} <= set(nodes)]
    return replace(whole, nodes=nodes, links=tuple(links))
