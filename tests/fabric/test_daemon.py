"""What goes wrong around the daemon, and what it does then: one clear line, nothing broken, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qpd.kernel.sources import layout_version
from qpd.lab import namespaces

from .daemon_node import BGP, DaemonNode
from .judge import until, until_equal
from .kernel_router import KernelRouter, nexthops4, nexthops6

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and BPF; run as root"),
]

DESTINATION = "10.255.0.7/32"


@pytest.fixture
def router() -> Iterator[KernelRouter]:
    """Four uplinks, and one destination that all of them lead to."""
    made = KernelRouter("daemon")
    try:
        made.open()
        made.ip("route", "add", DESTINATION, "proto", BGP, *nexthops4(0, 1, 2, 3))
        yield made
    finally:
        made.close()


@pytest.fixture
def node(router: KernelRouter, tmp_path: Path) -> Iterator[DaemonNode]:
    """The daemon's surroundings; not started."""
    made = DaemonNode(router.name, tmp_path)
    try:
        yield made
    finally:
        made.close()


def members(node: DaemonNode, destination: str = DESTINATION) -> set[str]:
    """The paths of a destination's group."""
    groups = [group for group in node.get("/v1/groups") if destination in group["destinations"]]
    return {member["path"] for group in groups for member in group["members"]}


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one line on standard error, with what it must say."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in done.stderr
    return lines[0]


# --- nothing configured, no FRR


def test_steers_without_frr_and_without_configuration_of_paths(
    node: DaemonNode, router: KernelRouter
) -> None:
    """Uplinks, paths and groups are found in the kernel; names are those of interfaces."""
    node.start()
    assert set(node.paths()) == members(node) == {"u0", "u1", "u2", "u3"}
    assert {path["state"] for path in node.paths().values()} == {"up"}
    status = node.get("/v1/status")
    assert status["frr"] == {"bfdd": False, "bgpd": False, "zebra": False}
    assert any("bgpd" in warning for warning in status["warnings"])

    # An IPv6 destination by the same uplinks, a single next hop, and a route that is not the fabric's.
    router.ip("-6", "route", "add", "2001:db8:ffff::7/128", "proto", BGP, *nexthops6(0, 1))
    router.ip("route", "add", "10.255.0.8/32", "proto", BGP, "via", "10.1.2.1")
    router.ip("route", "add", "10.255.0.9/32", "proto", "static", "via", "10.1.3.1")
    until_equal(lambda: len(members(node, "2001:db8:ffff::7/128")), 2)
    until_equal(lambda: members(node, "10.255.0.8/32"), {"u2"} if "u2" in node.paths() else {"u2:u2"})
    assert members(node, "10.255.0.9/32") == set()


def test_one_uplink_and_sixteen(node: DaemonNode, router: KernelRouter) -> None:
    router.ip("route", "replace", DESTINATION, "proto", BGP, "via", "10.1.0.1")
    node.start()
    assert members(node) == {"u0"}
    hops: list[str] = []
    for n in range(16):
        router.ip("link", "add", f"w{n}", "type", "veth", "peer", "name", f"w{n}", "netns", router.far)
        router.ip("address", "add", f"10.2.{n}.0/31", "dev", f"w{n}")
        router.ip("link", "set", f"w{n}", "up")
        router.ip_far("link", "set", f"w{n}", "up")
        hops += ["nexthop", "via", f"10.2.{n}.1", "dev", f"w{n}"]
    router.ip("route", "replace", DESTINATION, "proto", BGP, *hops)
    until_equal(lambda: members(node), {f"w{n}" for n in range(16)})
    until_equal(
        lambda: {
            uplink["attach"] for uplink in node.get("/v1/status")["uplinks"] if uplink["name"].startswith("w")
        },
        {"tcx"} if _has_tcx(node) else {"clsact"},
    )


def _has_tcx(node: DaemonNode) -> bool:
    return "tcx" in {uplink["attach"] for uplink in node.get("/v1/status")["uplinks"]}


# --- interfaces and neighbours


def test_an_interface_that_vanishes_and_comes_back(node: DaemonNode, router: KernelRouter) -> None:
    node.start()
    ids = {name: path["id"] for name, path in node.paths().items()}
    router.ip("link", "delete", "u1")
    # The kernel deletes a multipath route whole when one of its interfaces is unregistered; zebra writes it anew.
    router.ip("route", "replace", DESTINATION, "proto", BGP, *nexthops4(0, 2, 3))
    until_equal(lambda: node.paths()["u1"]["reason"], "link-gone")
    until_equal(lambda: {u["name"] for u in node.get("/v1/status")["uplinks"]}, {"u0", "u2", "u3"})
    until_equal(lambda: {node.paths()[name]["state"] for name in ("u0", "u2", "u3")}, {"up"})

    router.ip("link", "add", "u1", "type", "veth", "peer", "name", "u1", "netns", router.far)
    router.ip("address", "add", "10.1.1.0/31", "dev", "u1")
    router.ip("link", "set", "u1", "up")
    router.ip_far("address", "add", "10.1.1.1/31", "dev", "u1")
    router.ip_far("link", "set", "u1", "up")
    router.ip("route", "replace", DESTINATION, "proto", BGP, *nexthops4(0, 1, 2, 3))
    until_equal(lambda: node.paths()["u1"]["state"], "up")
    assert {name: path["id"] for name, path in node.paths().items()} == ids
    until_equal(
        lambda: {u["name"]: u["attach"] is not None for u in node.get("/v1/status")["uplinks"]},
        dict.fromkeys(("u0", "u1", "u2", "u3"), True),
    )


def test_a_neighbour_that_does_not_answer(node: DaemonNode, router: KernelRouter) -> None:
    """A failed neighbour takes its path out of service, and back when it answers."""
    node.start()
    router.ip_far("address", "del", "10.1.2.1/31", "dev", "u2")
    router.ip("neigh", "flush", "dev", "u2")
    ping = ["ping", "-c", "1", "-W", "1", "-I", "u2", "10.1.2.1"]
    subprocess.run(namespaces.enter(router.name, ping), check=False, capture_output=True)
    until_equal(lambda: node.paths()["u2"]["reason"], "neighbour-failed")
    assert {node.paths()[name]["state"] for name in ("u0", "u1", "u3")} == {"up"}
    router.ip_far("address", "add", "10.1.2.1/31", "dev", "u2")
    router.ip("neigh", "flush", "dev", "u2", "nud", "all")
    until_equal(lambda: node.paths()["u2"]["state"], "up")


# --- one line for each trouble


def test_a_second_daemon_is_refused_and_the_first_goes_on(node: DaemonNode) -> None:
    node.start()
    assert node.process is not None
    first = node.get("/v1/status")["pid"]
    done = node.run("run", "--config", str(node.config))
    assert done.returncode == 1
    one_line(done, str(first), "stop it")
    assert node.get("/v1/status")["pid"] == first
    done = node.run("detach", "--config", str(node.config))
    assert done.returncode == 1
    one_line(done, str(first))
    assert set(node.paths()) == {"u0", "u1", "u2", "u3"}


def test_a_wrong_configuration(node: DaemonNode) -> None:
    """Every error in a line of its own, with file, line and key; nothing is made."""
    node.config.write_text("placement: random\nhold_up: soon\nbpf: {pin_dir: relative}\nplanets: {}\n")
    for command in (("run", "--config", str(node.config)), ("check", str(node.config))):
        done = node.run(*command)
        assert done.returncode == 2
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 4, done.stderr
        for line, key in zip(sorted(lines), ("placement", "hold_up", "bpf.pin_dir", "planets"), strict=True):
            assert str(node.config) in line, line
            assert key in line, line
    assert not node.pins.exists()
    assert not node.socket.exists()


@pytest.mark.parametrize(("capability", "says"), [("net_admin", "CAP_NET_ADMIN"), ("bpf", "CAP_BPF")])
def test_a_missing_capability(node: DaemonNode, capability: str, says: str) -> None:
    node.write_config()
    gone = f"-{capability},-sys_admin" if capability == "bpf" else f"-{capability}"
    wrapper = ["setpriv", f"--bounding-set={gone}", f"--inh-caps={gone}"]
    done = node.run("run", "--config", str(node.config), wrapper=wrapper)
    assert done.returncode == 1
    one_line(done, says)


def test_missing_headers(node: DaemonNode) -> None:
    """Hidden in a mount namespace of its own: the line names the package to install."""
    node.write_config()
    hide = (
        "mount -t tmpfs none /usr/src && mount -t tmpfs none /lib/modules; "
        '[ ! -e /sys/kernel/kheaders.tar.xz ] || exit 77; exec "$@"'
    )
    done = node.run(
        "run", "--config", str(node.config), wrapper=["unshare", "--mount", "sh", "-c", hide, "sh"]
    )
    if done.returncode == 77:
        pytest.skip("this kernel carries its own headers in /sys/kernel/kheaders.tar.xz")
    assert done.returncode == 1
    one_line(done, "linux-headers")


def test_pins_outside_bpffs(node: DaemonNode) -> None:
    node.config.write_text(yaml.safe_dump(node.settings({"bpf": {"pin_dir": str(node.directory / "pins")}})))
    done = node.run("run", "--config", str(node.config))
    assert done.returncode == 1
    one_line(done, "bpf", "mount")


def test_a_metrics_port_that_is_taken(node: DaemonNode) -> None:
    node.start({"metrics": {"listen": "127.0.0.1:9791"}})
    other = DaemonNode(node.namespace, node.directory / "other")
    other.directory.mkdir()
    other.pins = Path(f"{node.pins}-other")
    try:
        other.write_config({"metrics": {"listen": "127.0.0.1:9791"}})
        done = other.run("run", "--config", str(other.config))
        assert done.returncode == 1
        one_line(done, "metrics.listen", "9791")
    finally:
        shutil.rmtree(other.pins, ignore_errors=True)
    assert set(node.paths()) == {"u0", "u1", "u2", "u3"}


# --- start, restart, end


def test_killed_and_detached_leaves_nothing(node: DaemonNode, router: KernelRouter) -> None:
    node.start()
    assert node.process is not None
    os.kill(node.get("/v1/status")["pid"], signal.SIGKILL)
    node.process.wait(20)
    node.process = None
    assert any(node.pins.rglob("*"))
    assert "4791" in router.ip("rule", "show")
    done = node.run("detach", "--config", str(node.config))
    assert done.returncode == 0, done.stderr
    assert not node.pins.exists()
    assert "4791" not in router.ip("rule", "show") + router.ip("-6", "rule", "show")
    attached = namespaces.run(namespaces.enter(router.name, ["bpftool", "-j", "net"])).stdout
    assert "steer" not in attached
    assert "observe" not in attached
    assert "clsact" not in namespaces.run(["tc", "-n", router.name, "qdisc", "show"]).stdout


def test_a_stopped_daemon_ends_with_status_0_and_leaves_steering(node: DaemonNode) -> None:
    node.start()
    assert node.stop() == 0
    assert (node.pins / f"v{layout_version()}" / "steer").exists()
    assert not node.socket.exists()
    node.start()
    assert set(node.paths()) == {"u0", "u1", "u2", "u3"}


# --- Prometheus


def test_promtool_and_a_real_prometheus(node: DaemonNode, tmp_path: Path) -> None:
    """Prometheus' own check accepts /metrics, and a Prometheus server scrapes it and answers queries."""
    missing = next((tool for tool in ("promtool", "prometheus") if shutil.which(tool) is None), None)
    if missing:
        pytest.skip(f"{missing} is not installed (package prometheus)")
    node.start({"metrics": {"listen": "127.0.0.1:9791"}})
    text = node.get("/metrics", "127.0.0.1:9791")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], check=False, input=text, capture_output=True, text=True, timeout=30
    )
    assert (checked.returncode, checked.stderr) == (0, "")

    config = tmp_path / "prometheus.yml"
    scrape = {"job_name": "qpd", "scrape_interval": "1s", "static_configs": [{"targets": ["127.0.0.1:9791"]}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    command += ["--web.listen-address=127.0.0.1:9090", "--log.level=error"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(namespaces.enter(node.namespace, command), stdout=log, stderr=log)

    def query(words: str) -> list[dict[str, Any]]:
        return list(node.get(f"/api/v1/query?query={words}", "127.0.0.1:9090")["data"]["result"])

    def scraped() -> str | None:
        try:
            found = {one["metric"]["path"]: one["value"][1] for one in query("qpd_path_up")}
        except (OSError, TypeError, KeyError) as error:
            return str(error)
        return None if found == dict.fromkeys(("u0", "u1", "u2", "u3"), "1") else f"found {found}"

    try:
        until(scraped, 60)
        assert (
            query("up{job='qpd'}".replace("'", "%22").replace("{", "%7B").replace("}", "%7D"))[0]["value"][1]
            == "1"
        )
    finally:
        server.terminate()
        server.wait(20)
