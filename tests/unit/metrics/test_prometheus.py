"""A real Prometheus server scrapes qpd, runs its rules and answers every question of the dashboard."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from qpd.model import Reason
from tests.unit.api.fake_state import FakeState, free_port, serving
from tests.unit.metrics.test_configs import RULES, dashboard
from tests.unit.metrics.test_metrics import ROOT

DEADLINE_S = 90.0


def questions() -> dict[str, str]:
    """Title and number of each panel's query to the query, as Grafana would send it."""
    found = {}
    for panel in dashboard()["panels"]:
        for number, target in enumerate(panel.get("targets", [])):
            text = target["expr"].replace("$node", ".*").replace("$__rate_interval", "10s")
            assert "$" not in text, f"{panel['title']}: a variable that the dashboard does not declare"
            found[f"{panel['title']} {number}"] = text
    return found


async def eventually(question: Callable[[], Awaitable[str | None]]) -> None:
    """Ask until nothing is wrong any more."""
    limit = asyncio.get_running_loop().time() + DEADLINE_S
    while (answer := await question()) is not None:
        assert asyncio.get_running_loop().time() < limit, answer
        await asyncio.sleep(0.2)


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A server with qpd's own files, but quicker, and that target."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: run 'scripts/setup test' (Debian package prometheus)")
    configuration = yaml.safe_load((ROOT / "configs/prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(RULES)]
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (folder / "log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

            async def ready() -> str | None:
                assert server.returncode is None, (folder / "log").read_text()
                try:
                    async with session.get("/-/ready") as answer:
                        return None if answer.status == 200 else f"not ready: {answer.status}"
                except aiohttp.ClientError as error:
                    return str(error)

            await eventually(ready)
            yield session
    finally:
        server.terminate()
        await server.wait()


async def ask(session: aiohttp.ClientSession, query: str) -> list[Any]:
    """The samples that answer a PromQL query."""
    async with session.post("/api/v1/query", data={"query": query}) as answer:
        body = await answer.json()
        assert body["status"] == "success", f"{query}: {body.get('error')}"
        result: list[Any] = body["data"]["result"]
        return result


@pytest.mark.timeout(240)
async def test_a_prometheus_server_scrapes_qpd(tmp_path: Path) -> None:
    state = FakeState(count=500, down="dc1-spine3")
    async with (
        serving(state, tmp_path) as server,
        prometheus(tmp_path, f"127.0.0.1:{server.metrics_port}") as session,
    ):

        async def pending() -> str | None:
            alerts = await ask(session, 'ALERTS{alertname="QpdPathDown"}')
            return None if [alert["metric"]["path"] for alert in alerts] == ["dc1-spine3"] else f"{alerts}"

        await eventually(pending)
        paths = await ask(session, "qpd_path_up")
        assert {result["metric"]["path"]: result["value"][1] for result in paths} == {
            "dc1-spine1": "1",
            "dc1-spine2": "1",
            "dc1-spine3": "0",
            "dc1-spine4": "1",
        }
        assert len(await ask(session, "qpd_qp_bytes_total")) == 200
        # Prometheus' own word that nothing of the exposition was refused.
        async with session.get("/api/v1/targets") as response:
            targets = (await response.json())["data"]["activeTargets"]
        assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]


@pytest.mark.timeout(240)
async def test_every_panel_of_the_dashboard_shows_something(tmp_path: Path) -> None:
    state = FakeState(count=40)
    async with (
        serving(state, tmp_path) as server,
        prometheus(tmp_path, f"127.0.0.1:{server.metrics_port}") as session,
    ):

        async def scraped() -> str | None:
            return None if await ask(session, "qpd_path_up") else "nothing has been scraped"

        await eventually(scraped)
        state.fail("dc1-spine2", Reason.BFD_DOWN)
        empty = dict(questions())

        async def unanswered() -> str | None:
            # Rates are those of what goes on.
            state.traffic(1000)
            state.values["lost_behind"] += 3
            for title, query in list(empty.items()):
                if await ask(session, query):
                    del empty[title]
            return f"no answer to {empty}" if empty else None

        await eventually(unanswered)
        lost = await ask(session, 'path:qpd_path_lost_packets:ratio{direction="out"}')
        assert {sample["metric"]["path"] for sample in lost} <= {f"dc1-spine{n}" for n in range(1, 5)}
        assert max(float(sample["value"][1]) for sample in lost) > 0


@pytest.mark.timeout(240)
async def test_a_series_ends_with_its_qp(tmp_path: Path) -> None:
    """The kernel forgets a QP: its series are stale with the next scrape, not minutes later."""
    state = FakeState(count=4)
    async with (
        serving(state, tmp_path) as server,
        prometheus(tmp_path, f"127.0.0.1:{server.metrics_port}") as session,
    ):

        def series(number: int) -> Callable[[], Awaitable[str | None]]:
            async def question() -> str | None:
                found = len(await ask(session, "qpd_qp_bytes_total"))
                return None if found == number else f"{found} series"

            return question

        await eventually(series(4))
        state.keys, state.values = state.keys[:3], state.values[:3]
        await eventually(series(3))
