"""The API over its real sockets: answers, errors, followers, and two daemons that want one socket."""

from __future__ import annotations

import asyncio
import errno
import grp
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import TypeAdapter

from qpd.api.events import EventRing
from qpd.api.schemas import EventRecord, Explanation, GroupRow, PathRow, QpRow, StatusInfo
from qpd.api.server import ApiServer, ListenError
from qpd.settings import Settings
from tests.unit.api.fake_state import FakeState, free_port, serving

# DESIGN, section 5: the keys that others rely on.
QP_KEYS = """vni dst dest_qp src slot home path state packets bytes lost retransmitted out_of_order naks cnps
 ecn_marked rtt_us peer_qp age_s idle_s"""
PATH_KEYS = "id name interface next_hop plane weight state reason qps packets bytes lost rtt_us bfd"


@pytest.fixture
def state() -> FakeState:
    return FakeState(count=40)


@pytest.fixture
async def server(state: FakeState, tmp_path: Path) -> AsyncIterator[ApiServer]:
    async with serving(state, tmp_path) as server:
        yield server


@pytest.fixture
async def session(server: ApiServer, tmp_path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(str(tmp_path / "qpd.sock"))
    async with aiohttp.ClientSession("http://qpd", connector=connector) as session:
        yield session


async def get(session: aiohttp.ClientSession, target: str, status: int = 200) -> Any:
    async with session.get(target) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        return json.loads(await response.read())


# --- answers


@pytest.mark.parametrize(
    ("target", "schema"),
    [
        ("/v1/status", StatusInfo),
        ("/v1/paths", list[PathRow]),
        ("/v1/groups", list[GroupRow]),
        ("/v1/qps", list[QpRow]),
        ("/v1/qps?limit=3", list[QpRow]),
        ("/v1/explain?dst=10.1.0.21&qp=17", Explanation),
        ("/v1/explain?dst=10.1.0.21&qp=999&vni=10010&via=10.255.2.1", Explanation),
        ("/v1/explain?dst=10.9.9.9&qp=999&vni=0&via=10.9.9.9", Explanation),
    ],
)
async def test_answers_are_as_the_schemas_say(
    session: aiohttp.ClientSession, target: str, schema: Any
) -> None:
    TypeAdapter(schema).validate_python(await get(session, target), strict=True)


async def test_rows_have_the_keys_of_the_contract(session: aiohttp.ClientSession) -> None:
    qps = await get(session, "/v1/qps")
    paths = await get(session, "/v1/paths")
    assert all(list(row)[:20] == QP_KEYS.split() for row in qps)
    assert all(list(row)[:14] == PATH_KEYS.split() for row in paths)


async def test_what_is_not_measured_is_null(session: aiohttp.ClientSession) -> None:
    """The fake's busiest QP sends datagrams, of which nothing is known but that they passed; the others do not."""
    rows = await get(session, "/v1/qps?limit=2")
    unmeasured = ("lost", "lost_at_host", "retransmitted", "out_of_order", "naks", "rtt_us", "peer_qp")
    assert rows[0]["transport"] == "ud"
    assert {key: rows[0][key] for key in unmeasured} == dict.fromkeys(unmeasured)
    assert None not in {rows[1][key] for key in unmeasured}


async def test_qps_come_in_chunks_and_arrive_whole(tmp_path: Path) -> None:
    state = FakeState(count=5000)
    async with serving(state, tmp_path):
        connector = aiohttp.UnixConnector(str(tmp_path / "qpd.sock"))
        async with aiohttp.ClientSession("http://qpd", connector=connector) as session:
            rows = await get(session, "/v1/qps")
    assert len(rows) == 5000
    assert [row["packets"] for row in rows] == [1000 + number * 7 for number in range(5000)]


async def test_no_qps_are_an_empty_array(tmp_path: Path) -> None:
    async with serving(FakeState(count=0), tmp_path):
        connector = aiohttp.UnixConnector(str(tmp_path / "qpd.sock"))
        async with aiohttp.ClientSession("http://qpd", connector=connector) as session:
            assert await get(session, "/v1/qps") == []


async def test_filters(session: aiohttp.ClientSession, state: FakeState) -> None:
    everything = await get(session, "/v1/qps")

    async def wanted(query: str) -> list[Any]:
        rows = await get(session, f"/v1/qps?{query}")
        assert rows, query
        return [(row["dst"], row["dest_qp"]) for row in rows]

    def those(condition: Any) -> list[Any]:
        return [(row["dst"], row["dest_qp"]) for row in everything if condition(row)]

    assert await wanted("host=10.1.0.22") == those(lambda row: row["dst"] == "10.1.0.22")
    assert await wanted("host=::ffff:10.1.0.22") == those(lambda row: row["dst"] == "10.1.0.22")
    assert await wanted("host=10.1.0.11") == those(lambda row: True), "source or destination"
    assert await wanted("qp=20") == those(lambda row: row["dest_qp"] == 20)
    assert await wanted("path=dc1-spine3") == those(lambda row: row["home"] == "dc1-spine3")
    assert await wanted("host=10.1.0.21&qp=20") == [("10.1.0.21", 20)]
    state.fail("dc1-spine3", reason=next(iter(state.paths_by_id.values())).reason)
    moved = await get(session, "/v1/qps?path=dc1-spine3")
    assert {(row["home"], row["state"]) for row in moved} == {("dc1-spine3", "away")}
    assert "dc1-spine3" not in {row["path"] for row in moved}


async def test_a_limit_gives_the_busiest_first(session: aiohttp.ClientSession) -> None:
    rows = await get(session, "/v1/qps?limit=3")
    everything = await get(session, "/v1/qps")
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in everything), reverse=True)[:3]
    assert len(await get(session, "/v1/qps?limit=4000")) == 40


async def test_drain_and_undrain(session: aiohttp.ClientSession) -> None:
    async with session.post("/v1/paths/dc1-spine2/drain") as response:
        row = await response.json()
        assert (response.status, row["name"], row["state"], row["qps"]) == (200, "dc1-spine2", "drained", 0)
    async with session.post("/v1/paths/dc1-spine2/undrain") as response:
        row = await response.json()
        assert (response.status, row["state"], row["qps"]) == (200, "up", 10)


# --- errors


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        (
            "/v1/qps?path=spineX",
            404,
            "no path is named spineX; paths are dc1-spine1, dc1-spine2, dc1-",
        ),
        ("/v1/qps?host=leaf1", 400, "parameter host: 'leaf1' is no IP address; give one such as 10.1.0.21"),
        ("/v1/qps?qp=16777216", 400, "parameter qp: '16777216' must be less than or equal to 16777215"),
        (
            "/v1/qps?qp=many",
            400,
            "parameter qp: 'many' must be a valid integer, unable to parse string as an integer",
        ),
        ("/v1/qps?limit=0", 400, "parameter limit: '0' must be greater than or equal to 1"),
        (
            "/v1/qps?colour=red",
            400,
            "no such parameter: colour; there are path, host, dst, qp, vni, direction, limit",
        ),
        ("/v1/explain?qp=3", 400, "parameter dst is missing"),
        (
            "/v1/explain?dst=10.1.0.21&qp=999",
            400,
            "QP 999 of 10.1.0.21 has not been seen; say its VNI and outer",
        ),
        ("/v1/nothing", 404, "GET /v1/nothing: Not Found"),
        ("/v1/paths/dc1-spine1/drain", 405, "GET /v1/paths/dc1-spine1/drain: Method Not Allowed"),
    ],
)
async def test_an_error_is_one_line(
    session: aiohttp.ClientSession, target: str, status: int, said: str
) -> None:
    answer = await get(session, target, status)
    assert list(answer) == ["error"]
    assert answer["error"].startswith(said)
    assert "\n" not in answer["error"]


async def test_draining_an_unknown_path_changes_nothing(session: aiohttp.ClientSession) -> None:
    before = await get(session, "/v1/paths")
    async with session.post("/v1/paths/spineX/drain") as response:
        assert response.status == 404
    assert await get(session, "/v1/paths") == before


async def test_a_fault_of_the_daemon_is_told_without_its_traceback(
    session: aiohttp.ClientSession, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> StatusInfo:
        raise RuntimeError("secret")

    monkeypatch.setattr(state, "status", broken)
    answer = await get(session, "/v1/status", 500)
    assert answer == {"error": "the daemon failed to answer; its log says why"}


async def test_an_answer_that_breaks_off_does_not_look_complete(
    session: aiohttp.ClientSession, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> AsyncIterator[list[dict[str, int]]]:
        yield [{"vni": 1}]
        raise RuntimeError("the map went away")

    monkeypatch.setattr(state, "qps", broken)
    with pytest.raises(aiohttp.ClientPayloadError):
        async with session.get("/v1/qps") as response:
            await response.read()


# --- events


async def lines(response: aiohttp.ClientResponse, count: int) -> list[EventRecord]:
    found: list[EventRecord] = []
    while len(found) < count:
        line = await asyncio.wait_for(response.content.readline(), 10)
        if line.strip():
            found.append(json.loads(line))
    return found


async def test_a_follower_gets_what_was_and_what_comes(
    session: aiohttp.ClientSession, state: FakeState
) -> None:
    state.events.add("path-down", {"path": "dc1-spine1"})
    async with session.get("/v1/events?follow=true") as response:
        assert response.content_type == "application/x-ndjson"
        assert [record["seq"] for record in await lines(response, 1)] == [1]
        for number in range(5):
            state.events.add("path-up", {"number": number})
        records = await lines(response, 5)
    assert [(record["seq"], record["detail"]["number"]) for record in records] == [
        (n + 2, n) for n in range(5)
    ]
    TypeAdapter(list[EventRecord]).validate_python(records, strict=True)


async def test_without_follow_the_answer_ends(session: aiohttp.ClientSession, state: FakeState) -> None:
    for number in range(3):
        state.events.add("path-up", {"number": number})
    async with session.get("/v1/events?since=1") as response:
        body = await response.read()
    assert [json.loads(line)["seq"] for line in body.splitlines()] == [2, 3]


async def test_followers_end_with_the_daemon(state: FakeState, tmp_path: Path) -> None:
    async with serving(state, tmp_path) as server:
        connector = aiohttp.UnixConnector(str(tmp_path / "qpd.sock"))
        async with (
            aiohttp.ClientSession("http://qpd", connector=connector) as session,
            session.get("/v1/events?follow=true") as response,
        ):
            state.events.add("path-down", {})
            await server.stop()
            body = await asyncio.wait_for(response.read(), 10)
    assert [json.loads(line)["kind"] for line in body.splitlines() if line.strip()] == ["path-down"]


async def test_a_slow_follower_misses_records_and_can_tell() -> None:
    ring = EventRing(size=10)
    follower = ring.follow()
    ring.add("first", {})
    assert [record["seq"] for record in await anext(follower)] == [1]
    for _ in range(25):
        ring.add("later", {})
    assert [record["seq"] for record in await anext(follower)] == list(range(17, 27))
    ring.close()
    with pytest.raises(StopAsyncIteration):
        await anext(follower)


# --- metrics


async def test_metrics_are_served_on_tcp(server: ApiServer) -> None:
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.metrics_port}") as session,
        session.get("/metrics") as response,
    ):
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert 'qpd_path_up{path="dc1-spine1"} 1.0' in await response.text()


async def test_metrics_on_ipv6(state: FakeState, tmp_path: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6 on loopback")
    port = free_port(socket.AF_INET6)
    async with (
        serving(state, tmp_path, listen=f"[::1]:{port}") as server,
        aiohttp.ClientSession(f"http://[::1]:{port}") as session,
        session.get("/metrics") as response,
    ):
        assert server.metrics_port == port
        assert response.status == 200


async def test_metrics_can_be_off(state: FakeState, tmp_path: Path) -> None:
    async with serving(state, tmp_path, listen="off") as server:
        assert server.metrics_port is None


async def test_a_port_that_is_taken_is_told_in_one_line(state: FakeState, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError) as caught:
            async with serving(state, tmp_path, listen=listen):
                pass
    assert str(caught.value) == (
        f"metrics.listen: {listen} is taken by another program; choose another port, or off"
    )
    assert not any(Path.iterdir(tmp_path)), "nothing listens then, and nothing is left"


async def test_an_address_of_another_machine_is_told(state: FakeState, tmp_path: Path) -> None:
    with pytest.raises(
        ListenError, match=r"metrics\.listen: 192\.0\.2\.1:9791 is no address of this machine"
    ):
        async with serving(state, tmp_path, listen="192.0.2.1:9791"):
            pass


# --- the socket


async def test_the_socket_is_for_owner_and_group_only(server: ApiServer, tmp_path: Path) -> None:
    status = (tmp_path / "qpd.sock").stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == os.getegid()


async def test_the_socket_is_gone_after_the_daemon(state: FakeState, tmp_path: Path) -> None:
    async with serving(state, tmp_path):
        assert (tmp_path / "qpd.sock").is_socket()
    assert not any(Path.iterdir(tmp_path))


async def test_the_socket_of_a_dead_daemon_is_replaced(state: FakeState, tmp_path: Path) -> None:
    path = tmp_path / "qpd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (tmp_path / "qpd.sock.lock").touch()
    async with serving(state, tmp_path):
        connector = aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession("http://qpd", connector=connector) as session:
            assert (await get(session, "/v1/status"))["node"] == "dc1-leaf1"


async def test_a_second_daemon_is_refused_and_the_first_goes_on(
    session: aiohttp.ClientSession, server: ApiServer, tmp_path: Path
) -> None:
    with pytest.raises(ListenError, match=r"api\.socket: another qpd listens on .*qpd\.sock; stop it"):
        async with serving(FakeState(), tmp_path):
            pass
    assert (await get(session, "/v1/status"))["node"] == "dc1-leaf1"


async def test_the_socket_of_another_program_is_left_alone(state: FakeState, tmp_path: Path) -> None:
    path = tmp_path / "qpd.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ListenError, match="another qpd listens"):
            async with serving(state, tmp_path):
                pass
        assert path.is_socket()


async def test_a_file_in_the_sockets_place_is_left_alone(state: FakeState, tmp_path: Path) -> None:
    (tmp_path / "qpd.sock").write_text("precious")
    with pytest.raises(ListenError, match="is there and no socket; remove it or choose another path"):
        async with serving(state, tmp_path):
            pass
    assert (tmp_path / "qpd.sock").read_text() == "precious"


async def test_a_missing_directory_is_made(state: FakeState, tmp_path: Path) -> None:
    async with serving(state, tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "qpd.sock").is_socket()


async def test_a_directory_that_cannot_be_used_is_told_in_one_line(
    state: FakeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(
        ListenError, match=r"qpd\.sock: Permission denied; check owner and mode of its directory"
    ):
        async with serving(state, tmp_path):
            pass


async def test_an_unknown_group_is_told(state: FakeState, tmp_path: Path) -> None:
    settings = Settings(
        api={"socket": str(tmp_path / "qpd.sock"), "group": "qpdt-nobody"}, metrics={"listen": "off"}
    )
    with pytest.raises(ListenError, match=r"api\.group: no group is named qpdt-nobody"):
        await ApiServer(state, settings).start()


@pytest.mark.root
async def test_the_socket_belongs_to_the_group_of_the_configuration(state: FakeState, tmp_path: Path) -> None:
    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, os.getegid()))
    settings = Settings(
        api={"socket": str(tmp_path / "qpd.sock"), "group": group.gr_name}, metrics={"listen": "off"}
    )
    server = ApiServer(state, settings)
    await server.start()
    try:
        assert (tmp_path / "qpd.sock").stat().st_gid == group.gr_gid
    finally:
        await server.stop()
