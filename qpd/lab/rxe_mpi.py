"""An MPI program on Soft-RoCE guests: Open MPI over UCX, whose RC queue pairs are rxe0's.

Checked with Open MPI 4.1.4, UCX 1.13.1 and the 6.1 kernel's rxe (Debian 12).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from qpd.lab.errors import LabError
from qpd.lab.rxe import DEVICE, GID_INDEX, Command, Guest, Sink

ALLREDUCE = ("/usr/bin/python3", "-I", str(Path(__file__).with_name("rxe_mpi_allreduce.py")))
"""The program that sums vectors and checks the sums."""

_MPIRUN = "mpirun.openmpi"
# By its path: it runs with nothing of qpd.
_SHELL = ("/usr/bin/python3", "-I", str(Path(__file__).with_name("rxe_shell.py")))

_UCX = {
    # RC carries the data. UCX connects it by UD: TCP cannot do that for it.
    "UCX_TLS": "rc_verbs,ud_verbs,self",
    "UCX_NET_DEVICES": f"{DEVICE}:1",
    "UCX_IB_GID_INDEX": str(GID_INDEX),
    # UCX compares the destination in a UD packet's header with its own; of rxe's headers it takes none for its own, and
    # drops all: "UD endpoint ... unhandled timeout error".
    "UCX_UD_VERBS_ETH_DGID_CHECK": "n",
    # Without hardware virtualization a guest may be kept waiting for seconds.
    "UCX_UD_VERBS_TIMEOUT": "300s",
}

_PARAMETERS = {
    "plm_rsh_agent": " ".join(_SHELL),
    # No other way than UCX, and UCX also on adapters that Open MPI does not know.
    "pml": "ucx",
    "opal_common_ucx_tls": "any",
    "opal_common_ucx_devices": "any",
    "btl": "^openib",
    "osc": "^ucx",
}


def missing(program: Sequence[str]) -> str | None:
    """What an MPI program lacks here, in one line; None where all is there."""
    if shutil.which(_MPIRUN, path="/usr/bin") is None:
        return "MPI needs Open MPI: apt-get install openmpi-bin"
    if tuple(program) == ALLREDUCE:
        probe = [ALLREDUCE[0], "-I", "-c", "import importlib.util as u; u.find_spec('mpi4py').name"]
        if subprocess.run(probe, check=False, capture_output=True).returncode != 0:
            return "the AllReduce by MPI needs mpi4py: apt-get install python3-mpi4py"
    return None


def arguments(addresses: Sequence[str], network: str, program: Sequence[str]) -> list[str]:
    """The command line of mpirun: one rank on each of these addresses, its own messages within `network`."""
    words = [_MPIRUN, "--allow-run-as-root", "-np", str(len(addresses)), "--host", ",".join(addresses)]
    for name, value in {**_PARAMETERS, "oob_tcp_if_include": network}.items():
        words += ["--mca", name, value]
    for name, value in _UCX.items():
        words += ["-x", f"{name}={value}"]
    return [*words, *program]


class Mpi:
    """An MPI program that runs, one rank a guest.

    Args:
        guests: all up; mpirun is started in the first.
        program: the command of each rank.
        sink: hears what the ranks say.
    """

    def __init__(self, guests: Sequence[Guest], program: Sequence[str], sink: Sink | None = None) -> None:
        self._shells = [guest.popen(*_SHELL, "serve") for guest in guests[1:]]
        try:
            for shell in self._shells:
                _listens(shell)
            network = str(guests[0].place.address.network)
            self._command = guests[0].popen(
                *arguments([guest.address for guest in guests], network, program), sink=sink
            )
        except BaseException:
            _end(self._shells)
            raise

    @property
    def stdout(self) -> str:
        """What the ranks have said so far."""
        return self._command.stdout

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the program's end; returns mpirun's exit status.

        Raises:
            LabError: where it takes longer than `timeout` seconds.
        """
        try:
            return self._command.wait(timeout)
        finally:
            self.end()

    def end(self) -> None:
        """End what still runs of it."""
        _end([self._command, *self._shells])


def _listens(shell: Command, deadline: float = 60.0) -> None:
    limit = time.monotonic() + deadline
    while "listening" not in shell.stdout:
        if shell.status is not None:
            shell.check()
        if time.monotonic() > limit:
            raise LabError(f"a guest's shell for mpirun does not listen after {deadline:.0f} s")
        time.sleep(0.1)


def _end(commands: Sequence[Command]) -> None:
    for command in commands:
        if command.status is None:
            command.send_signal(signal.SIGTERM)
