"""The pure parts of Soft-RoCE endpoints: addresses, perftest's output, the ring of the AllReduce."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpd.lab import rxe_agent
from qpd.lab.errors import LabError
from qpd.lab.rxe import Place, guest_address
from qpd.lab.rxe_perftest import pairs, report

HOST = ipaddress.IPv4Interface("172.16.100.11/24")

# As ib_write_bw 4.5 prints it, with two QPs.
OUTPUT = """\
---------------------------------------------------------------------------------------
 Number of qps   : 2		Transport type : IB
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0011 PSN 0x4e534e RKey 0x0002f9 VAddr 0x007fb9911c7000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:172:16:100:101
 local address: LID 0000 QPN 0x0012 PSN 0xe0f620 RKey 0x0002f9 VAddr 0x007fb9911d7000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:172:16:100:101
 remote address: LID 0000 QPN 0x0021 PSN 0x6997c6 RKey 0x000201 VAddr 0x007f5dad4a0000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:172:16:100:103
 remote address: LID 0000 QPN 0x0022 PSN 0xa0ed38 RKey 0x000201 VAddr 0x007f5dad4b0000
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:172:16:100:103
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      397              0.00               7.18   		   0.000115
---------------------------------------------------------------------------------------
"""


def test_a_report_pairs_the_qps_in_their_order() -> None:
    told = report(OUTPUT)
    assert told.pairs == ((0x11, 0x21), (0x12, 0x22))
    assert (told.messages, told.megabytes_per_second) == (397, 7.18)


def test_output_without_an_end_is_no_report() -> None:
    with pytest.raises(ValueError, match="no result"):
        report(OUTPUT.replace(" 65536", ""))
    with pytest.raises(ValueError, match="1 QPs of its own and 2"):
        pairs(OUTPUT.replace(" local address: LID 0000 QPN 0x0012", ""))


def test_a_guest_has_its_hosts_address_plus_100_or_the_given_one() -> None:
    assert str(guest_address(HOST, None)) == "172.16.100.111/24"
    assert str(guest_address(HOST, "172.16.100.7")) == "172.16.100.7/24"
    assert str(guest_address(HOST, "172.16.100.7/25")) == "172.16.100.7/25"


@pytest.mark.parametrize(
    ("host", "wanted", "message"),
    [
        ("172.16.100.11/24", "10.0.0.1", "is not in 172.16.100.0/24"),
        ("172.16.100.200/24", None, "172.16.101.44 is not in"),
        ("172.16.100.11/24", "guest", "write ADDRESS/LENGTH"),
    ],
)
def test_an_address_that_cannot_work_is_refused(host: str, wanted: str | None, message: str) -> None:
    with pytest.raises(LabError, match=message):
        guest_address(ipaddress.IPv4Interface(host), wanted)


def test_guests_have_macs_and_taps_of_their_own() -> None:
    places = [
        Place("h", "leaf", port, "br100", 4200, ipaddress.IPv4Interface(f"172.16.{n}.101/16"))
        for port, n in (("eth5", 100), ("a-very-long-na", 101))
    ]
    assert [place.mac for place in places] == ["02:00:ac:10:64:65", "02:00:ac:10:65:65"]
    assert [place.tap for place in places] == ["rxe-eth5", "rxe-a-very-long"]
    assert all(len(place.tap) <= 15 for place in places)


def test_the_agent_relays_output_status_signals_and_ends_with_its_port() -> None:
    """The agent's loop over a socket instead of a virtio port."""
    import json
    import socket

    ours, theirs = socket.socketpair()
    code = "import sys; from qpd.lab import rxe_agent; rxe_agent.Agent(int(sys.argv[1])).serve()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "LANG": "C.UTF-8"},
    ) as agent:
        theirs.close()
        ours.settimeout(60)
        lines = ours.makefile("r", encoding="utf-8")
        assert json.loads(lines.readline()) == {"ready": True}

        def ask(**message: object) -> None:
            ours.sendall(json.dumps(message).encode() + b"\n")

        ask(id=0, argv=["sh", "-c", "printf '%s' $WORD; echo wrong >&2; exit 3"], env={"WORD": "grüß"})
        said: dict[str, str] = {"stdout": "", "stderr": ""}
        while "status" not in (message := json.loads(lines.readline())):
            said[message["stream"]] += message["text"]
        assert (message, said) == ({"id": 0, "status": 3}, {"stdout": "grüß", "stderr": "wrong\n"})

        ask(id=1, argv=["/nonexistent"])
        assert "No such file" in json.loads(lines.readline())["text"]
        assert json.loads(lines.readline()) == {"id": 1, "status": 127}

        ask(id=2, argv=["sh", "-c", "echo up; exec sleep 1000"])
        assert json.loads(lines.readline())["text"] == "up\n"
        ask(id=2, signal=15)
        assert json.loads(lines.readline()) == {"id": 2, "status": -15}

        lines.close()
        ours.close()
        assert agent.wait(60) == 0


def test_the_agent_names_the_port_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vport1p1").mkdir()
    (tmp_path / "vport1p1/name").write_text("another\n")
    monkeypatch.setattr(rxe_agent, "_PORTS", tmp_path)
    assert rxe_agent.port("another") == Path("/dev/vport1p1")
    with pytest.raises(FileNotFoundError, match="no port qplab"):
        rxe_agent.port("qplab.agent")


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_ring_sums_every_chunk_everywhere(ranks: int) -> None:
    """The schedule on plain numbers: in step s a rank receives what its predecessor sends in step s."""
    reason = "needs Python's verbs (python3-pyverbs): run 'scripts/setup guest'"
    ring_chunk = pytest.importorskip("qpd.lab.rxe_allreduce", reason=reason, exc_type=ImportError).ring_chunk
    data = [[float(rank + 1) * 10**chunk for chunk in range(ranks)] for rank in range(ranks)]
    for step in range(2 * (ranks - 1)):
        sent = [data[rank][ring_chunk(rank, step, ranks)] for rank in range(ranks)]
        for rank in range(ranks):
            chunk = ring_chunk(rank - 1, step, ranks)
            if step < ranks - 1:
                data[rank][chunk] += sent[rank - 1]
            else:
                data[rank][chunk] = sent[rank - 1]
    total = ranks * (ranks + 1) / 2
    assert data == [[total * 10**chunk for chunk in range(ranks)]] * ranks


def test_the_endpoint_commands_refuse_what_cannot_be_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qpd.lab import cli, cli_endpoint
    from qpd.lab.fabric import Fabric

    lab = Path(__file__).parents[3] / "deploy/containerlab/four-spine"
    monkeypatch.setattr(cli_endpoint, "one_lab", lambda _name: Fabric.load(lab, "unit"))
    for words, said in (
        (["rxe", "host9", "--", "true"], "has no host host9; it has host1, host2, host3"),
        (["perftest", "host1", "host1", "--", "ib_write_bw"], "host1 host1: one guest beside a host"),
        (["allreduce", "host1"], "an AllReduce needs two hosts or more"),
    ):
        monkeypatch.setattr(sys, "argv", ["qplab", "endpoint", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
