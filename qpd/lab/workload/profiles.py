"""Ready workloads for the two-dc fabric: the published volumes, and small ones of the same shape. Pure."""

from __future__ import annotations

from dataclasses import replace

from qpd.lab.endpoint.config import Transport
from qpd.lab.workload.model import ALLREDUCE, PARAMETER_SERVER, Workload

_FOUR = ("dc1-host1", "dc2-host1", "dc1-host2", "dc2-host2")
"""Ranks take turns between the sites: each hop of a ring crosses."""

_EMULATED = Transport(timeout=17)
"""An eighth of NCCL's ACK timeout: 0.54 s, more like the outages that are emulated."""

_ALLREDUCE = Workload(
    ALLREDUCE, _FOUR, 312_000_000, iterations=5, compute=0.1, message=1 << 20, transport=_EMULATED
)
_PARAMETER_SERVER = Workload(
    PARAMETER_SERVER,
    ("dc1-host1", "dc1-host2", "dc2-host1", "dc2-host2"),
    459_000_000,
    servers=("dc1-host3",),
    iterations=3,
    compute=0.1,
    message=1 << 20,
    transport=_EMULATED,
)
_SMALL = 1 << 22

PROFILES = {
    "allreduce": _ALLREDUCE,
    "allreduce-small": replace(_ALLREDUCE, bytes=_SMALL, message=1 << 16, compute=0.01),
    "parameter-server": _PARAMETER_SERVER,
    "parameter-server-small": replace(_PARAMETER_SERVER, bytes=_SMALL, message=1 << 16, compute=0.01),
}
"""By name: what ScaleAcross (arXiv:2606.12963) ran, 312 MB AllReduce and 459 MB Parameter Server, and small forms."""
