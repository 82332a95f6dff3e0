"""How mpirun is called for guests, and the shell that it starts its daemons by."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qpd.lab import rxe_mpi, rxe_shell
from qpd.lab.cli import app


def test_a_rank_on_each_guest_over_rc_queue_pairs_alone() -> None:
    words = rxe_mpi.arguments(["172.16.100.101", "172.16.100.103"], "172.16.100.0/24", ["./a.out", "--mca"])
    assert words[-2:] == ["./a.out", "--mca"], "the program's own words come last, as they are"
    options = dict(itertools.pairwise(words))
    assert (options["-np"], options["--host"]) == ("2", "172.16.100.101,172.16.100.103")
    assert options["oob_tcp_if_include"] == "172.16.100.0/24"
    transports = {word.partition("=")[2] for word in words if word.startswith("UCX_TLS=")}
    assert transports == {"rc_verbs,ud_verbs,self"}, "no TCP: data would pass beside the RoCE device"


def test_the_shell_runs_what_it_is_sent_and_says_what_comes_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = Path(rxe_shell.__file__).read_text()
    file = tmp_path / "shell.py"
    # Another test session may have one.
    file.write_text(
        program.replace(f"PORT = {rxe_shell.PORT}", "PORT = int(__import__('os').environ['PORT'])")
    )
    monkeypatch.setenv("PORT", str(_free_port()))
    with subprocess.Popen([sys.executable, file, "serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            for _ in range(2):
                said = subprocess.run(
                    [sys.executable, file, "127.0.0.1", "echo", "one;", "echo", "two", ">&2"],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert said.stdout == "one\ntwo\n"
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "words",
    [
        ["mpi", "host1", "host2", "--name", "x"],
        ["rxe", "host1", "--memory", "1G", "--", "sh"],
        ["perftest", "host1", "host2", "-q", "8"],
    ],
)
def test_an_option_in_the_wrong_place_is_refused_before_anything_starts(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["endpoint", *words])
    assert done.exit_code != 0
    assert "options of qplab stand before the hosts" in (done.output + str(done.exception))
