"""``qpctl doctor``: what qpd needs of this machine, what of it is missing, and how to mend that. Needs no daemon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from qpd.cli.client import Client
from qpd.cli.errors import CommandError
from qpd.cli.table import wrapped
from qpd.kernel import bpf, bpffs, capabilities, headers
from qpd.settings import DEFAULT_CONFIG, Settings, SettingsError, load_settings

Level = Literal["ok", "warn", "fail"]

_KERNEL_NEEDED = (5, 15)
_KERNEL_TCX = (6, 6)
_FRR_USE = {
    "bfdd": ("without it a silent loss is noticed by BGP's timers only", "set bfdd=yes in /etc/frr/daemons"),
    "bgpd": ("without it paths are named by their interfaces", "set bgpd=yes in /etc/frr/daemons"),
}
_RP_FILTER_STRICT = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined. ``mend``: what to do; empty where nothing is to be done."""

    check: str
    level: Level
    message: str
    mend: str = ""

    def as_json(self) -> dict[str, str]:
        """The object that ``-o json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to look; tests look elsewhere."""

    root: Path = Path("/")
    release: str = os.uname().release
    python: str = sys.executable
    command: Callable[[list[str]], str] | None = None
    """Runs a command and returns its output, or raises OSError or subprocess.SubprocessError."""

    def at(self, path: str) -> Path:
        """A path of this machine."""
        return self.root / path.lstrip("/")

    def run(self, arguments: list[str]) -> str:
        """Output of a command."""
        if self.command is not None:
            return self.command(arguments)
        done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=20)
        return done.stdout


def examine(config: Path | None, given_socket: Path | None, machine: Machine | None = None) -> list[Finding]:
    """Everything, in the order in which one would mend it."""
    machine = machine or Machine()
    settings, found = _configuration(config, machine)
    path = given_socket or settings.api.socket
    findings = [found, *_kernel(machine), *_bpf(settings, machine), *_headers(), *_bcc(machine)]
    findings += _frr(settings)
    findings += _uplinks(settings, machine)
    findings += _daemons(path, machine)
    return findings


def show(out: Console, findings: list[Finding]) -> None:
    """One line a finding, and how to mend it below."""
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        head = Text.assemble((f"{finding.level:<4}", styles[finding.level]), f"  {finding.check:<{width}}  ")
        wrapped(out, head, finding.message)
        if finding.mend:
            wrapped(out, Text.assemble(" " * (width + 8), ("mend: ", "bold")), finding.mend)
    failed = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    out.print(f"{len(findings)} examined, {failed} fail, {warned} warn", style="bold")


# --- the examinations


def _configuration(config: Path | None, machine: Machine) -> tuple[Settings, Finding]:
    usual = machine.at(str(DEFAULT_CONFIG))
    path = config or (usual if usual.exists() else None)
    try:
        settings = load_settings(path)
    except SettingsError as error:
        first, *others = error.problems
        more = f" (and {len(others)} more)" if others else ""
        finding = Finding("configuration", "fail", f"{first}{more}", f"qpd check {path}")
        with contextlib.suppress(SettingsError):
            return load_settings(None), finding
        return Settings.model_construct(), finding
    return settings, Finding("configuration", "ok", f"{path} is valid" if path else "none, defaults apply")


def _kernel(machine: Machine) -> Iterator[Finding]:
    match = re.match(r"(\d+)\.(\d+)", machine.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < _KERNEL_NEEDED:
        yield Finding("kernel", "fail", f"{machine.release} is too old", "boot a kernel 5.15 or later")
    elif version < _KERNEL_TCX:
        yield Finding(
            "kernel",
            "warn",
            f"{machine.release} has no TCX: clsact costs about 110 ns a packet",
            "6.6 has it",
        )
    else:
        yield Finding("kernel", "ok", f"{machine.release}, with TCX")
    jit = machine.at("/proc/sys/net/core/bpf_jit_enable")
    if jit.exists() and jit.read_text().strip() == "0":
        yield Finding(
            "bpf jit", "warn", "off: the classifier is interpreted", "sysctl -w net.core.bpf_jit_enable=1"
        )
    btf = machine.at("/sys/kernel/btf/vmlinux")
    yield Finding("btf", "ok", "there" if btf.exists() else "none; not needed, bcc compiles on this machine")


def _bpf(settings: Settings, machine: Machine) -> Iterator[Finding]:
    try:
        bpffs.check(settings.bpf.pin_dir, machine.at("/proc/self/mountinfo").read_text(encoding="utf-8"))
    except bpffs.BpffsMissingError as error:
        said, _, mend = str(error).partition(": ")
        yield Finding("bpffs", "fail", said, mend)
    else:
        yield Finding("bpffs", "ok", f"{settings.bpf.pin_dir} lies in one")
    missing = capabilities.missing()
    if missing:
        names = ", ".join(missing)
        mend = "run as root; the daemon's unit grants what it needs"
        yield Finding("capabilities", "warn", f"this process lacks {names}: some checks are left out", mend)
        return
    yield Finding("capabilities", "ok", "enough to load the classifier")
    yield _attach(settings)


def _attach(settings: Settings) -> Finding:
    """Ask for the programs on loopback's TCX hook: kernels without TCX refuse the question."""
    wanted = settings.bpf.attach
    try:
        bpf.prog_query(socket.if_nametoindex("lo"), bpf.AttachType.TCX_EGRESS)
    except OSError as error:
        if wanted == "tcx":
            return Finding(
                "attach", "fail", f"bpf.attach is tcx, but: {error.strerror}", "set bpf.attach to auto"
            )
        return Finding("attach", "ok", "clsact (this kernel has no TCX)")
    return Finding("attach", "ok", "clsact, as bpf.attach says" if wanted == "clsact" else "TCX")


def _headers() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory(prefix="qpctl-doctor-") as cache:
        try:
            tree = headers.find(Path(cache))
        except headers.HeadersMissingError as error:
            said, _, mend = str(error).rpartition(": ")
            yield Finding("kernel headers", "fail", said or str(error), mend)
        except OSError as error:
            yield Finding(
                "kernel headers", "warn", f"cannot be put together: {error.strerror}", "make room in /tmp"
            )
        else:
            where = "put together from several packages" if tree.is_relative_to(cache) else str(tree)
            yield Finding("kernel headers", "ok", where)


def _bcc(machine: Machine) -> Iterator[Finding]:
    try:
        # In a child: importing it costs 65 MB, and the compiler writes where it likes.
        version = machine.run([machine.python, "-c", "import bcc; print(bcc.__version__)"]).strip()
    except (OSError, subprocess.SubprocessError):
        mend = (
            "apt-get install python3-bpfcc; in a virtual environment, make that with --system-site-packages"
        )
        yield Finding("bcc", "fail", f"{machine.python} cannot import it", mend)
    else:
        yield Finding("bcc", "ok", version)


def _frr(settings: Settings) -> Iterator[Finding]:
    directory = settings.frr.socket_dir
    if not directory.is_dir():
        mend = "start FRR, or set frr.socket_dir (with FRR's -N NAME: /var/run/frr/NAME)"
        yield Finding("frr", "warn", f"{directory} is not there: no peer names, no cross-check of BFD", mend)
        return
    for daemon, (use, start) in _FRR_USE.items():
        path = directory / f"{daemon}.vty"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(2.0)
                probe.connect(str(path))
        except PermissionError:
            mend = "run as root, or join the group frrvty"
            yield Finding(f"frr {daemon}", "warn", f"no permission for {path}", mend)
        except OSError as error:
            yield Finding(f"frr {daemon}", "warn", f"{path}: {error.strerror}; {use}", start)
        else:
            yield Finding(f"frr {daemon}", "ok", f"{path} answers")


def _uplinks(settings: Settings, machine: Machine) -> Iterator[Finding]:
    try:
        gateways = _gateways(machine)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Finding(
            "uplinks", "warn", f"cannot read the routes: {type(error).__name__}", "install iproute2"
        )
        return
    names = sorted(gateways) if settings.uplinks == "auto" else list(settings.uplinks)
    lost = [name for name in names if not machine.at(f"/sys/class/net/{name}").exists()]
    if lost:
        yield Finding(
            "uplinks", "warn", f"no interface {', '.join(lost)}", "mend uplinks in the configuration"
        )
    idle = [name for name in names if name not in gateways and name not in lost]
    if idle:
        yield Finding(
            "uplinks", "warn", f"no route has a gateway by {', '.join(idle)}", "qpd steers once routes do"
        )
    if not names:
        yield Finding(
            "uplinks", "warn", "no route has a gateway", "start BGP; qpd steers once there are routes"
        )
    elif not lost and not idle:
        several = sum(len(paths) for name, paths in gateways.items() if name in names)
        yield Finding("uplinks", "ok", f"{', '.join(names)} ({several} paths)")
    strict = [name for name in names if _rp_filter(machine, name) == _RP_FILTER_STRICT]
    if strict:
        mend = f"sysctl -w net.ipv4.conf.{strict[0]}.rp_filter=2 (and conf.all.rp_filter)"
        said = f"strict on {', '.join(strict)}: what arrives by a path that this side left is dropped"
        yield Finding("rp_filter", "warn", said, mend)


def _gateways(machine: Machine) -> dict[str, set[str]]:
    """Interface to the gateways that routes of the main table have by it."""
    found: dict[str, set[str]] = {}
    for family in ("-4", "-6"):
        for route in json.loads(machine.run(["ip", "-j", family, "route", "show", "table", "main"]) or "[]"):
            for hop in route.get("nexthops", [route]):
                gateway: dict[str, Any] | str = hop.get("gateway") or hop.get("via") or ""
                address = gateway["host"] if isinstance(gateway, dict) else gateway
                if address:
                    found.setdefault(hop["dev"], set()).add(address)
    return found


def _rp_filter(machine: Machine, interface: str) -> int:
    values = [0]
    for name in ("all", interface):
        with contextlib.suppress(OSError, ValueError):
            values.append(int(machine.at(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").read_text()))
    # The kernel uses the greater of the two (ip-sysctl).
    return max(values)


def _daemons(path: Path, machine: Machine) -> Iterator[Finding]:
    running = list(_running(machine))
    if len(running) > 1:
        pids = ", ".join(map(str, running))
        yield Finding(
            "second daemon", "fail", f"qpd runs {len(running)} times here (pids {pids})", "stop all but one"
        )
    try:
        status = Client(path).get("status")
    except CommandError as error:
        level: Level = "fail" if running else "warn"
        mend = "see the daemon's log (journalctl -u qpd)" if running else "systemctl start qpd, or: qpd run"
        yield Finding("daemon", level, str(error), mend)
    else:
        said = f"{status['node']}: qpd {status['version']}, pid {status['pid']}, on {path}"
        yield Finding("daemon", "ok", said)
        for warning in status["warnings"]:
            yield Finding("daemon", "warn", warning)


def _running(machine: Machine) -> Iterator[int]:
    """Processes `qpd run` in this network namespace."""
    try:
        here = machine.at("/proc/self/ns/net").readlink()
    except OSError:
        return
    for entry in machine.at("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            names = [Path(os.fsdecode(word)).name for word in words[:3]]
            if "qpd" in names and b"run" in words and (entry / "ns/net").readlink() == here:
                yield int(entry.name)
