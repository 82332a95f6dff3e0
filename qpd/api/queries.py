"""What may be asked: the query parameters of the API, validated."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from qpd.api.schemas import Direction
from qpd.model import Address

VNI_MAX = 2**24 - 1
QP_MAX = 2**24 - 1


def _host(given: object) -> Address:
    try:
        address = ip_address(str(given))
    except ValueError:
        raise ValueError("is no IP address; give one such as 10.1.0.21") from None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


Host = Annotated[Address, BeforeValidator(_host)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QpFilter(_Query):
    """Which QPs; all conditions must hold, ``None`` is no condition."""

    path: str | None = None
    """Name of the path that its next packet takes, or of its home."""
    host: Host | None = None
    """Inner source or destination."""
    dst: Host | None = None
    """Inner destination."""
    qp: Annotated[int, Field(ge=0, le=QP_MAX)] | None = None
    """Destination QP."""
    vni: Annotated[int, Field(ge=0, le=VNI_MAX)] | None = None
    direction: Direction = "out"
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only so many: those with the most bytes, these first."""


class ExplainQuery(_Query):
    """One QP. ``vni`` and ``via`` (outer destination) may be left out for a QP that was seen or is not encapsulated."""

    dst: Host
    qp: Annotated[int, Field(ge=0, le=QP_MAX)]
    vni: Annotated[int, Field(ge=0, le=VNI_MAX)] | None = None
    via: Host | None = None


class EventsQuery(_Query):
    """``follow``: go on with events as they come, after those already recorded."""

    follow: bool = False
    since: Annotated[int, Field(ge=0)] = 0
    """Only events with a greater ``seq``."""
