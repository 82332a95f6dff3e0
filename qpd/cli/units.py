"""Figures for people: at most four digits and a prefix. JSON has them exactly."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float | None, unit: str = "") -> str:
    """``12345`` as ``12.3k``; ``-`` where there is no value. Rounded figures have three digits."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1000:
        return f"{int(value)}{unit}"
    number = float(value)
    prefixes = iter(_PREFIXES)
    prefix = next(prefixes)
    while abs(number) >= 999.5 and prefix != _PREFIXES[-1]:
        number /= 1000
        prefix = next(prefixes)
    return f"{_three(number)}{prefix}{unit}"


def _three(number: float) -> str:
    """Three digits: ``9.90``, ``47.0``, ``330``."""
    magnitude = abs(number)
    return f"{number:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


def duration(seconds: float | None) -> str:
    """``0.2s``, ``45s``, ``12m``, ``3h05m``, ``2d03h``; ``-`` where there is none."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole}s"
    if whole < 7200:
        return f"{whole // 60}m"
    if whole < 172800:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def microseconds(value: float | None) -> str:
    """An RTT: ``85us``, ``22.3ms``; ``-`` where it was not measured."""
    if value is None:
        return "-"
    if value < 999.5:
        return f"{_three(value)}us"
    return f"{_three(value / 1000)}ms" if value < 999_500 else f"{_three(value / 1e6)}s"


def plural(count: int, name: str, ending: str = "s") -> str:
    """``1 path``, ``4 paths``."""
    return f"{count} {name}{'' if count == 1 else ending}"
