"""qpctl as people and scripts use it: in pipes, in terminals of 80 and 160 columns, with and without a daemon."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from qpd.model import Reason
from tests.unit.api.fake_state import FakeState, serving
from tests.unit.cli.conftest import ROOT, in_terminal, run, terminal

COMMANDS = ("status", "paths", "groups", "qps", "explain", "drain", "undrain", "events", "top", "doctor")
SHOWING = [
    ("status",),
    ("paths",),
    ("groups",),
    ("qps",),
    ("explain", "10.1.0.21", "17"),
    ("events", "--no-follow"),
]


# --- what is shown


async def test_paths(socket: str) -> None:
    outcome = await run("qpctl", "--socket", socket, "paths")
    assert outcome.status == 0
    header, *rows = (line.split() for line in outcome.lines)
    assert header[:2] == ["NAME", "INTERFACE"]
    assert [row[0] for row in rows] == ["dc1-spine1", "dc1-spine2", "dc1-spine3", "dc1-spine4"]
    assert "down: bfd-down" in outcome.lines[2]


async def test_qps_are_the_busiest_and_say_that_there_are_more(socket: str) -> None:
    outcome = await run("qpctl", "--socket", socket, "qps", "--limit", "3")
    assert outcome.lines[0].split()[:3] == ["VNI", "DST", "QP"]
    assert [line.split()[2] for line in outcome.lines[1:4]] == ["0x24", "0x24", "0x23"]
    assert outcome.lines[4] == "(the 3 with the most bytes; there are more: --limit, or -o json for all)"
    everything = await run("qpctl", "--socket", socket, "qps")
    assert len(everything.lines) == 41


async def test_qps_can_be_filtered(socket: str) -> None:
    outcome = await run(
        "qpctl", "--socket", socket, "-o", "json", "qps", "--host", "10.1.0.22", "--qp", "0x12"
    )
    assert [(row["dst"], row["dest_qp"]) for row in json.loads(outcome.out)] == [("10.1.0.22", 0x12)]
    away = await run("qpctl", "--socket", socket, "qps", "--path", "dc1-spine2", "-o", "json")
    assert {row["state"] for row in json.loads(away.out)} == {"away"}
    nothing = await run("qpctl", "--socket", socket, "qps", "--vni", "7")
    assert nothing.out == "no queue pairs\n"


async def test_explain_tells_path_and_reasons(socket: str) -> None:
    outcome = await run("qpctl", "--socket", socket, "explain", "10.1.0.22", "0x11")
    assert outcome.lines[0] == "QP 0x11 of 10.1.0.22 in VNI 10010 uses dc1-spine4"
    assert "dc1-spine2 is down (bfd-down), so its packets take dc1-spine4" in outcome.out
    assert [line.split()[-1] for line in outcome.lines if "<-" in line] == ["path", "home"]
    options = await run("qpctl", "--socket", socket, "explain", "--dst", "10.1.0.22", "--qp", "17")
    assert options == outcome


async def test_explain_answers_for_a_qp_that_was_never_seen(socket: str) -> None:
    asked = ("explain", "10.1.0.21", "0x9999", "--vni", "10010", "--via", "10.255.2.1")
    outcome = await run("qpctl", "--socket", socket, *asked)
    assert outcome.lines[0].startswith("QP 0x9999 of 10.1.0.21 in VNI 10010 would use dc1-spine")


async def test_drain_and_undrain_say_what_is_then(socket: str) -> None:
    drained = await run("qpctl", "--socket", socket, "drain", "dc1-spine3")
    assert drained.out == "dc1-spine3 is drained; it carries 0 QPs\n"
    undrained = await run("qpctl", "--socket", socket, "undrain", "dc1-spine3", "-o", "json")
    assert (json.loads(undrained.out)["state"], undrained.status) == ("up", 0)


async def test_status_shows_what_to_mend(
    socket: str, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = state.status()
    info["warnings"] = ["bfdd and the tap disagree about dc1-spine1"]
    monkeypatch.setattr(state, "status", lambda: info)
    outcome = await run("qpctl", "--socket", socket, "status")
    assert outcome.lines[0] == "node:         dc1-leaf1, qpd 0.1.0, pid 4242, up 62m"
    assert "paths:        3 of 4 up" in outcome.lines
    assert outcome.lines[-1] == "warning:      bfdd and the tap disagree about dc1-spine1"


async def test_a_node_without_anything_says_so(tmp_path: Path) -> None:
    state = FakeState(count=0, spines=0)
    state.groups = list  # type: ignore[method-assign]
    async with serving(state, tmp_path, listen="off"):
        socket = str(tmp_path / "qpd.sock")
        assert (await run("qpctl", "--socket", socket, "paths")).out.startswith("no paths: ")
        assert (await run("qpctl", "--socket", socket, "groups")).out.startswith("no groups: ")
        assert (await run("qpctl", "--socket", socket, "qps")).out == "no queue pairs\n"
        assert json.loads((await run("qpctl", "--socket", socket, "qps", "-o", "json")).out) == []


# --- options


async def test_options_stand_before_or_behind_the_command_and_these_win(socket: str) -> None:
    before = await run("qpctl", "--socket", socket, "-o", "json", "paths")
    behind = await run("qpctl", "paths", "--socket", socket, "-o", "json")
    assert before == behind
    assert len(json.loads(before.out)) == 4
    both = await run(
        "qpctl", "--socket", "/nowhere", "-o", "json", "paths", "--socket", socket, "-o", "table"
    )
    assert (both.status, both.lines[0].split()[0]) == (0, "NAME")


async def test_the_socket_can_come_from_the_environment(socket: str) -> None:
    assert (await run("qpctl", "paths", QPCTL_SOCKET=socket)).status == 0


async def test_wide_shows_all_columns_and_table_some(socket: str) -> None:
    table = await run("qpctl", "--socket", socket, "qps")
    wide = await run("qpctl", "--socket", socket, "-o", "wide", "qps")
    assert set(table.lines[0].split()) < set(wide.lines[0].split())
    assert "NAKS" in wide.lines[0]


@pytest.mark.parametrize("command", [*SHOWING, ("drain", "dc1-spine1"), ("undrain", "dc1-spine1")])
async def test_json_is_what_the_daemon_said(socket: str, command: tuple[str, ...]) -> None:
    outcome = await run("qpctl", "--socket", socket, "-o", "json", *command)
    assert outcome.status == 0
    for line in outcome.lines:
        json.loads(line)


# --- pipes and terminals


@pytest.mark.parametrize("command", SHOWING)
@pytest.mark.parametrize("output", ["table", "wide"])
async def test_pipes_get_no_colours_and_no_blanks_at_the_end(
    socket: str, command: tuple[str, ...], output: str
) -> None:
    outcome = await run("qpctl", "--socket", socket, "-o", output, *command)
    assert (outcome.status, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert "no room for" not in outcome.out, "a pipe has room for every column"
    assert [line for line in outcome.lines if line != line.rstrip()] == []


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("command", SHOWING)
async def test_terminals_show_whole_lines(socket: str, command: tuple[str, ...], columns: int) -> None:
    outcome = await in_terminal(columns, "qpctl", "--socket", socket, *command)
    assert outcome.status == 0
    lines = outcome.plain.splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert "…" not in outcome.plain, "nothing is cut"


async def test_a_narrow_terminal_leaves_columns_out_and_names_them(socket: str) -> None:
    outcome = await in_terminal(80, "qpctl", "--socket", socket, "paths")
    assert "NEXT HOP" not in outcome.plain.splitlines()[0]
    assert "(no room for NEXT HOP, PLANE" in outcome.plain
    assert "down: bfd-down" in outcome.plain, "what matters stays"
    roomy = await in_terminal(160, "qpctl", "--socket", socket, "paths")
    assert "NEXT HOP" in roomy.plain.splitlines()[0]


async def test_json_is_indented_in_a_terminal_only(socket: str) -> None:
    outcome = await in_terminal(80, "qpctl", "--socket", socket, "-o", "json", "groups")
    assert outcome.plain.startswith("[\n  {\n")
    assert json.loads(outcome.plain)[0]["id"] == 0
    assert len((await run("qpctl", "--socket", socket, "-o", "json", "groups")).lines) == 1


async def test_a_reader_that_stops_is_no_error(socket: str) -> None:
    command = f"{sys.executable} -m qpd.cli.qpctl --socket {socket} -o json qps | head -c 10"
    shell = await asyncio.create_subprocess_exec(
        "bash", "-c", command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(shell.communicate(), 60)
    assert (len(out), err) == (10, b"")


# --- events and top


async def test_events_follow_until_interrupted(socket: str, state: FakeState) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qpd.cli.qpctl", "--socket", socket, "events", stdout=-1, stderr=-1
    )
    assert process.stdout is not None
    first = await asyncio.wait_for(process.stdout.readline(), 60)
    assert b"path-down" in first
    assert b"path=dc1-spine2 reason=bfd-down qps=10" in first
    state.heal("dc1-spine2")
    assert b"path-up" in await asyncio.wait_for(process.stdout.readline(), 60), "at once, though it is a pipe"
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err) == (130, b"")


async def test_events_as_json_lines(socket: str) -> None:
    outcome = await run("qpctl", "--socket", socket, "-o", "json", "events", "--no-follow")
    assert [json.loads(line)["kind"] for line in outcome.lines] == ["path-down"]


async def test_events_end_when_the_daemon_ends(state: FakeState, tmp_path: Path) -> None:
    async with serving(state, tmp_path, listen="off"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qpd.cli.qpctl", "--socket", str(tmp_path / "qpd.sock"), "events", stdout=-1
        )
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 60)
    assert await asyncio.wait_for(process.wait(), 60) in (0, 1)


@pytest.mark.parametrize("columns", [80, 160])
async def test_top_shows_rates_and_ends_with_q(socket: str, state: FakeState, columns: int) -> None:
    async with terminal(columns, "qpctl", "--socket", socket, "top", "--interval", "0.2") as screen:
        await screen.until("3 of 4 paths up")
        state.traffic(100_000)
        # 100 000 packets of each of 40 QPs, over at least the interval.
        await screen.until(r"dc1-spine1 +up +1\d +\d+(\.\d+)?[kM]")
        state.fail("dc1-spine3", Reason.LINK_DOWN)
        await screen.until("link-down")
        screen.press("q")
        outcome = await screen.end()
    assert outcome.status == 0
    assert outcome.out.endswith("\x1b[?25h\x1b[?1049l"), "cursor and screen are back"


async def test_top_outlives_a_restart_of_the_daemon(state: FakeState, tmp_path: Path) -> None:
    socket = tmp_path / "qpd.sock"
    async with serving(state, tmp_path, listen="off"):
        screen_of = terminal(100, "qpctl", "--socket", str(socket), "top", "--interval", "0.2")
        screen = await screen_of.__aenter__()
        await screen.until("paths up")
    try:
        await screen.until(r"no such\s+socket")
        mark = len(screen.plain)
        async with serving(FakeState(count=4), tmp_path, listen="off"):
            await screen.until(" 4 active QPs", mark)
            screen.interrupt()
            assert (await screen.end()).status == 0
    finally:
        await screen_of.__aexit__(None, None, None)


async def test_top_needs_a_terminal(socket: str) -> None:
    outcome = await run("qpctl", "--socket", socket, "top")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "qpctl: top needs a terminal; use `qpctl paths -o json` in scripts\n"


# --- errors


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("drain", "spineX"), 3, "no path is named spineX; paths are dc1-spine1, "),
        (("drain", "a/b?c"), 3, "no path is named a/b?c; paths are "),
        (("qps", "--path", "spineX"), 3, "no path is named spineX; paths are dc1-spine1, "),
        (
            ("qps", "--host", "leaf1"),
            2,
            "parameter host: 'leaf1' is no IP address; give one such as 10.1.0.21",
        ),
        (
            ("qps", "--qp", "many"),
            2,
            "Invalid value for '--qp': 'many' is no number; give one such as 17 or 0x11",
        ),
        (("qps", "--qp", "0x1000000"), 2, "parameter qp: '16777216' must be less than or equal to 16777215"),
        (("qps", "--limit", "0"), 2, "Invalid value for '--limit'"),
        (("explain",), 2, "Invalid value: say which queue pair: qpctl explain HOST QP, or --dst HOST --qp N"),
        (("explain", "10.1.0.21", "999"), 2, "QP 999 of 10.1.0.21 has not been seen; say its VNI"),
        (("drain",), 2, "Missing argument 'PATH'."),
        (("paths", "-o", "xml"), 2, "Invalid value for '-o' / '--output'"),
        (("path",), 2, "No such command 'path'."),
        (("--colour",), 2, "No such option: --colour"),
    ],
)
async def test_an_error_is_one_line_and_a_status(
    socket: str, arguments: tuple[str, ...], status: int, said: str
) -> None:
    outcome = await run("qpctl", "--socket", socket, *arguments)
    assert (outcome.status, outcome.out) == (status, "")
    assert outcome.err.startswith(f"qpctl: {said}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", [*SHOWING, ("drain", "x"), ("undrain", "x")])
async def test_without_a_daemon_every_command_says_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    for output in ("table", "json"):
        outcome = await run("qpctl", "--socket", str(tmp_path / "none"), "-o", output, *command)
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.err == (
            f"qpctl: no answer from {tmp_path}/none: no such socket; is qpd running? "
            "(systemctl status qpd, or say --socket)\n"
        )


async def test_a_dead_daemons_socket(tmp_path: Path) -> None:
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    outcome = await run("qpctl", "--socket", str(tmp_path / "dead"), "paths")
    assert (outcome.status, outcome.err.partition(": ")[2]) == (
        1,
        f"no answer from {tmp_path}/dead: nobody listens there; qpd has ended (systemctl status qpd)\n",
    )


async def test_a_daemon_that_breaks_off_is_an_error(
    socket: str, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> object:
        yield [{"vni": 1}]
        raise RuntimeError("the map went away")

    monkeypatch.setattr(state, "qps", broken)
    outcome = await run("qpctl", "--socket", socket, "-o", "json", "qps")
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1


async def test_another_programs_socket_is_no_qpd(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"ready.\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "other.sock")
    async with server:
        outcome = await run("qpctl", "--socket", str(tmp_path / "other.sock"), "paths")
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1


async def test_help_names_every_command_and_fits_the_terminal() -> None:
    outcome = await in_terminal(80, "qpctl", "--help")
    assert outcome.status == 0
    assert [command for command in COMMANDS if command not in outcome.plain] == []
    assert max(map(len, outcome.plain.splitlines())) <= 80
    for command in COMMANDS:
        assert (await run("qpctl", command, "-h")).status == 0


async def test_version() -> None:
    assert (await run("qpctl", "--version")).out == "qpctl 0.1.0\n"
    assert (await run("qpd", "--version")).out == "qpd 0.1.0\n"


async def test_scripts_do_not_wait_for_libraries_that_only_tables_need(socket: str) -> None:
    code = (
        "import sys; sys.argv = ['qpctl', '--socket', sys.argv[1], '-o', 'json', 'paths']\n"
        "from qpd.cli.qpctl import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'aiohttp', 'rich.console'} & set(sys.modules)), file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, socket, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert err == b"[]\n"
