"""The images by themselves: what is in them, and what power they need."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qpd.kernel.capabilities import Capability
from qpd.lab.sidecar import Sidecar
from tests.fabric.judge import until

from .engine import Engine
from .images import LEAF, QPD

# The first of them waits for the images.
pytestmark = pytest.mark.timeout(840)

PINS = Path(f"/sys/fs/bpf/qpdt-{os.getpid()}-image")
ENOUGH = (Capability.CAP_BPF, Capability.CAP_NET_ADMIN, Capability.CAP_PERFMON)


def shell(engine: Engine, image: str, script: str) -> str:
    return engine.docker("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", script).stdout


def test_no_compiler_is_left_over(engine: Engine) -> None:
    tools = "gcc cc g++ cpp clang ld as make pip pip3 git"
    found = shell(
        engine, QPD, f"for tool in {tools}; do command -v $tool; done; ls /opt/qpd/bin; true"
    ).split()
    assert {"qpd", "qpctl"} <= set(found)
    assert not [path for path in found if Path(path).name in {*tools.split(), "pip"}]


def test_the_leaf_has_frr_and_tools(engine: Engine) -> None:
    asked = "zebra bgpd bfdd watchfrr"
    assert shell(engine, LEAF, f"cd /usr/lib/frr && ls {asked}").split() == sorted(asked.split())
    tools = "vtysh ip bridge tc ping tcpdump ethtool"
    found = shell(engine, LEAF, f"for tool in {tools}; do command -v $tool; done; true").split()
    assert [Path(path).name for path in found] == tools.split()


def test_no_secret_of_the_build_stays(engine: Engine) -> None:
    assert shell(engine, QPD, "ls /run/secrets /etc/pip.conf 2>/dev/null; true") == ""


@pytest.fixture
def bare(engine: Engine) -> Iterator[int]:
    """The first process of a container of the image, with one uplink and a route, in which nothing runs."""
    name = f"qpdt-{os.getpid()}-bare"
    engine.docker(
        "run", "--detach", f"--name={name}", "--network=none", "--volume=/sys/fs/bpf:/sys/fs/bpf",
        "--entrypoint=sleep", QPD, "infinity",
    )  # fmt: skip
    try:
        pid = engine.process(name)
        for command in (
            "link add eth1 type veth peer name far1",
            "link set eth1 up",
            "link set far1 up",
            "address add 10.1.0.1/31 dev eth1",
            "route add 10.9.0.0/24 via 10.1.0.0 dev eth1",
        ):
            subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", *command.split()], check=True)
        yield pid
    finally:
        engine.docker("rm", "--force", name)


def test_three_capabilities_are_enough(engine: Engine, bare: int) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: load, attach, steer, and take everything away again.

    Given by setpriv, since older engines do not know all of them by name.
    """
    only = "-all," + ",".join(f"+{one.name.removeprefix('CAP_').lower()}" for one in ENOUGH)
    inside = [
        "nsenter", f"--target={bare}", "--mount", "--net", "--pid",
        "setpriv", f"--bounding-set={only}", "--inh-caps=-all", "--no-new-privs",
    ]  # fmt: skip
    environment = {
        "PATH": "/opt/qpd/bin:/usr/bin:/usr/sbin:/bin",
        "QPD_BPF__PIN_DIR": str(PINS),
        "QPD_METRICS__LISTEN": "off",
        **{name: os.environ[name] for name in ("QPDT_SESSION",)},
    }
    log = engine.directory / "bare.log"
    with ExitStack() as clean, log.open("wb") as words:
        clean.callback(subprocess.run, ["rm", "-rf", str(PINS)], check=True)
        daemon = clean.enter_context(
            subprocess.Popen([*inside, "qpd", "run"], env=environment, stdout=words, stderr=words)
        )
        clean.callback(daemon.kill)
        api = _api(bare)

        def answer() -> str | None:
            assert daemon.poll() is None, log.read_text(errors="replace")
            status = api.status()
            return None if status and status["state"] == "steering" else f"{status}: {log.read_text()}"

        until(answer, 90)
        # nsenter has to fork, to be inside the container's process ids.
        pid = int(Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text())
        capabilities = {
            line.split(":")[0]: int(line.split(":")[1], 16)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("Cap")
        }
        assert capabilities["CapEff"] == capabilities["CapBnd"] == sum(1 << one for one in ENOUGH)
        assert list(PINS.rglob("*")), "programs and maps are pinned"
        os.kill(pid, signal.SIGTERM)
        assert daemon.wait(timeout=30) == 0
        detached = subprocess.run(
            [*inside, "qpd", "detach"], env=environment, check=False, capture_output=True
        )
        assert detached.returncode == 0, detached.stderr
        assert not PINS.exists()


def _api(pid: int) -> Sidecar:
    """The API in a container's file system."""
    from qpd.lab.processes import Records

    run = Path(f"/proc/{pid}/root/run/qpd")
    return Sidecar("bare", "", Path(), PINS, run, Records(run), run, None)
