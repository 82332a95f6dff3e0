"""Is there a bpf file system where the pins shall be?"""

from __future__ import annotations

from pathlib import Path


class BpffsMissingError(Exception):
    """``pin_dir`` is not in a bpf file system: one line that says how to mount one."""


def check(pin_dir: Path, mountinfo: str | None = None) -> None:
    """Raises BpffsMissingError unless ``pin_dir`` lies in a bpffs. ``mountinfo``: as in proc(5), for tests."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    where, kind = Path("/"), ""
    for line in text.splitlines():
        mounted, _, described = line.partition(" - ")
        point = Path(mounted.split()[4].replace("\\040", " "))
        # Of several mounts at one place the last one counts.
        if pin_dir.is_relative_to(point) and len(point.parts) >= len(where.parts):
            where, kind = point, described.split()[0]
    if kind != "bpf":
        raise BpffsMissingError(
            f"bpf.pin_dir {pin_dir} is not in a bpf file system (it is on {where}, {kind or 'unknown'}): "
            "mount one with `mount -t bpf bpf /sys/fs/bpf`; inside `ip netns exec` use `nsenter --net` instead, "
            "which keeps /sys"
        )
    if any("." in part for part in pin_dir.relative_to(where).parts):
        raise BpffsMissingError(
            f"bpf.pin_dir {pin_dir}: the kernel allows no dots in names on a bpf file system"
        )
