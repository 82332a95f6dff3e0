"""A real Prometheus server scrapes /metrics, with the rules that are shipped."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.unit.api.fake_state import FakeState, free_port, serving
from tests.unit.metrics.test_metrics import ROOT

DEADLINE_S = 60.0

Query = Callable[[str], Any]


@asynccontextmanager
async def prometheus(directory: Path, target: str) -> AsyncIterator[str]:
    """A server that scrapes ``target``; yields its URL."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs Prometheus: run 'scripts/setup test' (Debian package prometheus)")
    config = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(ROOT / "configs/rules.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port()}"
    with (directory / "prometheus.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address={listen}",
            "--log.level=warn",
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://{listen}"
    finally:
        server.terminate()
        await asyncio.wait_for(server.wait(), 30)


async def ask(session: aiohttp.ClientSession, expression: str) -> list[Any]:
    """The result of an instant query, once it is not empty."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        try:
            async with session.get("/api/v1/query", params={"query": expression}) as response:
                result: list[Any] = (await response.json())["data"]["result"]
                if result:
                    return result
        except (aiohttp.ClientConnectionError, KeyError, aiohttp.ContentTypeError):
            pass  # it is starting
        await asyncio.sleep(0.1)
    pytest.fail(f"no answer to {expression} within {DEADLINE_S:g} s")


async def test_a_prometheus_server_scrapes_qpd(tmp_path: Path) -> None:
    state = FakeState(count=500, down="dc1-spine3")
    async with (
        serving(state, tmp_path) as server,
        prometheus(tmp_path, f"127.0.0.1:{server.metrics_port}") as url,
        aiohttp.ClientSession(url) as session,
    ):
        assert [result["value"][1] for result in await ask(session, 'up{job="qpd"} == 1')] == ["1"]
        paths = await ask(session, "qpd_path_up")
        assert {result["metric"]["path"]: result["value"][1] for result in paths} == {
            "dc1-spine1": "1",
            "dc1-spine2": "1",
            "dc1-spine3": "0",
            "dc1-spine4": "1",
        }
        assert len(await ask(session, "qpd_qp_bytes_total")) == 200
        pending = await ask(session, 'ALERTS{alertname="QpdPathDown"}')
        assert pending[0]["metric"]["path"] == "dc1-spine3"
        # Prometheus' own word that nothing of the exposition was refused.
        async with session.get("/api/v1/targets") as response:
            targets = (await response.json())["data"]["activeTargets"]
        assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]
