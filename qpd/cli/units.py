"""Figures for people: at most four digits and a prefix. JSON has them exactly."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def si(value: float | None, unit: str = "") -> str:
    """``12345`` as ``12.3k``; ``-`` where there is no value."""
    if value is None:
        return "-"
    number = float(value)
    for prefix in _PREFIXES:
        if abs(number) < 999.5 or prefix == _PREFIXES[-1]:
            whole = abs(number) >= 99.95 or (number == int(number) and not prefix)
            return f"{number:.0f}{prefix}{unit}" if whole else f"{number:.3g}{prefix}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


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
        return f"{value:.3g}us"
    return f"{value / 1000:.3g}ms" if value < 999_500 else f"{value / 1e6:.3g}s"


def plural(count: int, name: str, ending: str = "s") -> str:
    """``1 path``, ``4 paths``."""
    return f"{count} {name}{'' if count == 1 else ending}"
