"""The daemon's log: structlog on standard error, for people or for machines."""

from __future__ import annotations

import logging
import sys

import structlog

from qpd.settings import LogSettings


def configure(settings: LogSettings) -> None:
    """Write events of ``settings.level`` and above; coloured text on a terminal, else one JSON object a line."""
    people = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if people
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
