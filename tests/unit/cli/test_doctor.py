"""The doctor names what is missing and how to mend it, on machines that lack one thing after another."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qpd.cli.doctor import Finding, Machine, examine
from qpd.kernel import bpf, capabilities, headers
from qpd.settings import Settings
from tests.unit.api.fake_state import FakeState, serving
from tests.unit.cli.conftest import in_terminal, run

ROUTES = [
    {"dst": "default", "gateway": "192.0.2.1", "dev": "mgmt0"},
    {
        "dst": "10.255.2.1",
        "protocol": "bgp",
        "nexthops": [
            {"gateway": "10.0.0.1", "dev": "eth1", "weight": 1},
            {"via": {"family": "inet6", "host": "fe80::2"}, "dev": "eth2", "weight": 1},
            {"via": {"family": "inet6", "host": "fe80::3"}, "dev": "eth2", "weight": 1},
        ],
    },
    {"dst": "10.1.0.0/24", "dev": "br10"},
]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that lacks nothing; its FRR sockets and configuration are those of the settings."""
    root = tmp_path / "root"
    for name, text in {
        "proc/sys/net/core/bpf_jit_enable": "1\n",
        "proc/self/mountinfo": "30 1 0:27 / / rw - ext4 /dev/sda rw\n31 30 0:28 / /sys/fs/bpf rw - bpf bpf rw\n",
        "sys/kernel/btf/vmlinux": "",
        "proc/sys/net/ipv4/conf/all/rp_filter": "0\n",
        "proc/sys/net/ipv4/conf/eth1/rp_filter": "2\n",
        "proc/sys/net/ipv4/conf/eth2/rp_filter": "0\n",
        "proc/sys/net/ipv4/conf/mgmt0/rp_filter": "0\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for interface in ("eth1", "eth2", "mgmt0"):
        (root / "sys/class/net" / interface).mkdir(parents=True)
    return Machine(root=root, release="6.8.0-41-generic", command=commands())


def commands(bcc: str | None = "0.29.1", routes: object = ROUTES) -> Callable[[list[str]], str]:
    def run(arguments: list[str]) -> str:
        if "import bcc" in arguments[-1]:
            if bcc is None:
                raise subprocess.CalledProcessError(1, arguments)
            return f"{bcc}\n"
        assert arguments[:2] == ["ip", "-j"]
        return json.dumps(routes) if arguments[2] == "-4" else ""

    return run


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capabilities, headers and TCX are there, whatever this machine has."""
    monkeypatch.setattr(capabilities, "missing", list)
    monkeypatch.setattr(headers, "find", lambda cache: Path("/usr/src/linux-headers-6.8.0"))
    monkeypatch.setattr(bpf, "prog_query", lambda *_: None)


@pytest.fixture
def frr(tmp_path: Path) -> Iterator[Path]:
    """Listening vty sockets of bfdd and bgpd."""
    directory = tmp_path / "frr"
    directory.mkdir()
    listeners = []
    for name in ("bfdd", "bgpd"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / f"{name}.vty"))
        listener.listen()
        listeners.append(listener)
    yield directory
    for listener in listeners:
        listener.close()


def config(tmp_path: Path, **settings: object) -> Path:
    path = tmp_path / "qpd.yaml"
    path.write_text(json.dumps(settings))
    return path


def found(findings: list[Finding], check: str) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.message, finding.mend) for finding in findings if finding.check == check]


async def test_a_machine_that_lacks_nothing(machine: Machine, frr: Path, tmp_path: Path) -> None:
    async with serving(FakeState(), tmp_path, listen="off"):
        file = config(tmp_path, frr={"socket_dir": str(frr)}, uplinks=["eth1", "eth2"])
        findings = await asyncio.to_thread(examine, file, tmp_path / "qpd.sock", machine)
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert {finding.check for finding in findings} == {
        "configuration",
        "kernel",
        "btf",
        "bpffs",
        "capabilities",
        "attach",
        "kernel headers",
        "bcc",
        "frr bfdd",
        "frr bgpd",
        "uplinks",
        "daemon",
    }
    assert found(findings, "uplinks") == [("ok", "eth1, eth2 (3 paths)", "")]
    assert found(findings, "daemon")[0][1].startswith("dc1-leaf1: qpd 0.1.0, pid 4242, on ")


@pytest.mark.parametrize(
    ("release", "level", "said"),
    [
        ("5.10.0-8-amd64", "fail", "5.10.0-8-amd64 is too old"),
        ("5.15.0-100-generic", "warn", "5.15.0-100-generic has no TCX: clsact costs about 110 ns a packet"),
        ("6.6.1", "ok", "6.6.1, with TCX"),
        ("6.18.44-custom+", "ok", "6.18.44-custom+, with TCX"),
    ],
)
def test_kernels(machine: Machine, release: str, level: str, said: str) -> None:
    findings = examine(None, None, replace(machine, release=release))
    assert found(findings, "kernel")[0][:2] == (level, said)


def test_no_bpffs(machine: Machine) -> None:
    machine.at("/proc/self/mountinfo").write_text("30 1 0:27 / / rw - ext4 /dev/sda rw\n")
    level, said, mend = found(examine(None, None, machine), "bpffs")[0]
    assert level == "fail"
    assert "/sys/fs/bpf/qpd is not in a bpf file system" in said
    assert "mount -t bpf bpf /sys/fs/bpf" in mend


def test_an_interpreter_instead_of_the_jit(machine: Machine) -> None:
    machine.at("/proc/sys/net/core/bpf_jit_enable").write_text("0\n")
    assert found(examine(None, None, machine), "bpf jit")[0][2] == "sysctl -w net.core.bpf_jit_enable=1"


def test_missing_capabilities(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "missing", lambda: ["CAP_BPF", "CAP_NET_ADMIN"])
    findings = examine(None, None, machine)
    assert found(findings, "capabilities")[0][:2] == (
        "warn",
        "this process lacks CAP_BPF, CAP_NET_ADMIN: some checks are left out",
    )
    assert found(findings, "attach") == []


@pytest.mark.parametrize(("attach", "level"), [("auto", "ok"), ("clsact", "ok"), ("tcx", "fail")])
def test_a_kernel_without_tcx(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attach: str, level: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(bpf, "prog_query", refused)
    findings = examine(config(tmp_path, bpf={"attach": attach}), None, machine)
    assert found(findings, "attach")[0][0] == level


def test_missing_headers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: Path) -> Path:
        raise headers.HeadersMissingError(
            "no kernel headers for x86_64 in /usr/src: apt-get install linux-headers-amd64"
        )

    monkeypatch.setattr(headers, "find", nothing)
    assert found(examine(None, None, machine), "kernel headers") == [
        ("fail", "no kernel headers for x86_64 in /usr/src", "apt-get install linux-headers-amd64")
    ]


def test_missing_bcc(machine: Machine) -> None:
    level, said, mend = found(examine(None, None, replace(machine, command=commands(bcc=None))), "bcc")[0]
    assert (level, said) == ("fail", f"{machine.python} cannot import it")
    assert mend.startswith("apt-get install python3-bpfcc; in a virtual environment")


def test_no_frr(machine: Machine, tmp_path: Path) -> None:
    findings = examine(config(tmp_path, frr={"socket_dir": str(tmp_path / "none")}), None, machine)
    level, said, mend = found(findings, "frr")[0]
    assert (level, said) == ("warn", f"{tmp_path}/none is not there: no peer names, no cross-check of BFD")
    assert mend.startswith("start FRR, or set frr.socket_dir")


def test_frr_without_bfdd(machine: Machine, tmp_path: Path, frr: Path) -> None:
    (frr / "bfdd.vty").unlink()
    findings = examine(config(tmp_path, frr={"socket_dir": str(frr)}), None, machine)
    assert found(findings, "frr bfdd")[0][2] == "set bfdd=yes in /etc/frr/daemons"
    assert found(findings, "frr bgpd")[0][0] == "ok"


def test_frr_that_gives_no_permission(
    machine: Machine, tmp_path: Path, frr: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refused)
    findings = examine(config(tmp_path, frr={"socket_dir": str(frr)}), None, machine)
    assert found(findings, "frr bfdd") == [
        ("warn", f"no permission for {frr}/bfdd.vty", "run as root, or join the group frrvty")
    ]


def test_no_routes_yet(machine: Machine) -> None:
    findings = examine(None, None, replace(machine, command=commands(routes=[])))
    assert found(findings, "uplinks") == [
        ("warn", "no route has a gateway", "start BGP; qpd steers once there are routes")
    ]


def test_uplinks_that_are_not_there(machine: Machine, tmp_path: Path) -> None:
    findings = examine(config(tmp_path, uplinks=["eth1", "eth9"]), None, machine)
    assert found(findings, "uplinks") == [("warn", "no interface eth9", "mend uplinks in the configuration")]


def test_uplinks_without_a_gateway(machine: Machine, tmp_path: Path) -> None:
    machine.at("/sys/class/net/eth3").mkdir()
    findings = examine(config(tmp_path, uplinks=["eth1", "eth3"]), None, machine)
    assert found(findings, "uplinks")[0][:2] == ("warn", "no route has a gateway by eth3")


def test_strict_reverse_path_filter(machine: Machine) -> None:
    # The kernel uses the greater of `all` and the interface's own: 2 (loose) on eth1 wins over 1.
    machine.at("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("1\n")
    level, said, mend = found(examine(None, None, machine), "rp_filter")[0]
    assert level == "warn"
    assert said.startswith("strict on eth2, mgmt0: ")
    assert mend.startswith("sysctl -w net.ipv4.conf.eth2.rp_filter=2")


def test_no_iproute2(machine: Machine) -> None:
    def missing(arguments: list[str]) -> str:
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

    findings = examine(None, None, replace(machine, command=missing))
    assert found(findings, "uplinks")[0][2] == "install iproute2"


def test_a_wrong_configuration_is_told_and_the_rest_examined(machine: Machine, tmp_path: Path) -> None:
    findings = examine(config(tmp_path, holdup=3, placement="x"), None, machine)
    assert found(findings, "configuration")[0][0] == "fail"
    assert found(findings, "configuration")[0][1].endswith("(and 1 more)")
    assert found(findings, "bcc")[0][0] == "ok"


def test_no_daemon(machine: Machine, tmp_path: Path) -> None:
    level, said, mend = found(examine(None, tmp_path / "none", machine), "daemon")[0]
    assert (level, mend) == ("warn", "systemctl start qpd, or: qpd run")
    assert said.startswith(f"no answer from {tmp_path}/none: no such socket")


def _process(machine: Machine, pid: int, namespace: str, *words: str) -> None:
    directory = machine.at(f"/proc/{pid}")
    (directory / "ns").mkdir(parents=True)
    (directory / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (directory / "ns/net").symlink_to(namespace)


def test_a_second_daemon_in_this_namespace(machine: Machine, tmp_path: Path) -> None:
    (machine.at("/proc/self/ns")).mkdir()
    machine.at("/proc/self/ns/net").symlink_to("net:[1]")
    _process(machine, 100, "net:[1]", "/opt/qpd/bin/python", "/opt/qpd/bin/qpd", "run")
    _process(machine, 101, "net:[2]", "/opt/qpd/bin/python", "/opt/qpd/bin/qpd", "run")
    _process(machine, 102, "net:[1]", "/opt/qpd/bin/python", "/opt/qpd/bin/qpd", "check", "run.yaml")
    one = examine(None, tmp_path / "none", machine)
    assert found(one, "second daemon") == []
    assert found(one, "daemon")[0][0] == "fail", "it runs, but does not answer"
    _process(machine, 103, "net:[1]", "qpd", "run", "--config", "x")
    said = found(examine(None, tmp_path / "none", machine), "second daemon")[0]
    assert (said[0], said[2]) == ("fail", "stop all but one")
    assert sorted(said[1].partition("pids ")[2].rstrip(")").split(", ")) == ["100", "103"]


# --- the command


async def test_the_command_works_without_a_daemon(tmp_path: Path) -> None:
    outcome = await run("qpctl", "--socket", str(tmp_path / "none"), "doctor")
    assert outcome.lines[-1].split(" ")[1] == "examined,"
    assert outcome.status == (0 if ", 0 fail," in outcome.lines[-1] else 1)
    assert outcome.err == ""
    assert [line for line in outcome.lines if line != line.rstrip()] == []
    listed = await run("qpctl", "--socket", str(tmp_path / "none"), "-o", "json", "doctor")
    assert all(list(entry) == ["check", "level", "message", "mend"] for entry in json.loads(listed.out))


async def test_the_status_tells_whether_something_fails(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("holdup: 3")
    outcome = await run("qpctl", "doctor", "--config", str(wrong))
    assert outcome.status == 1
    assert f"{wrong}:1: holdup: no such key; did you mean hold_up?" in outcome.out


async def test_it_fits_a_terminal(tmp_path: Path) -> None:
    outcome = await in_terminal(80, "qpctl", "--socket", str(tmp_path / "none"), "doctor")
    longest = max(outcome.plain.splitlines(), key=len)
    assert len(longest) <= 80 or " " not in longest.strip()[60:], longest


def test_settings_of_a_broken_environment_fall_back(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    monkeypatch.setitem(os.environ, "QPD_PLACEMENT", "wrong")
    findings = examine(None, None, machine)
    assert found(findings, "configuration")[0][0] == "fail"
    assert isinstance(Settings.model_construct(), Settings)
