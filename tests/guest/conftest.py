"""A virtual machine with the distribution's own kernel, for what the host's kernel may not have."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
IN_GUEST = REPOSITORY / "scripts" / "in-guest"
# in-guest's own statuses, see its help.
NO_GUEST = 125

RunInGuest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """The guest's kernel image, fetched where it is not there yet."""
    answer = subprocess.run(
        [str(REPOSITORY / "scripts" / "guest-kernel")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if answer.returncode != 0:
        pytest.skip(f"no guest kernel: {answer.stderr.strip().splitlines()[-1]}")
    return Path(answer.stdout.strip())


@pytest.fixture(scope="session")
def in_guest(guest_kernel: Path) -> RunInGuest:
    """Runs a command in the guest: `in_guest("uname", "-r", deadline=60)`; `virtual_time`: see scripts/in-guest."""

    def run(
        *command: str, deadline: float = 120.0, virtual_time: bool = False
    ) -> subprocess.CompletedProcess[str]:
        options = ["--virtual-time"] if virtual_time else []
        answer = subprocess.run(
            [str(IN_GUEST), f"--deadline={deadline:g}", *options, "--", *command],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=deadline + 60,
        )
        if answer.returncode == NO_GUEST:
            pytest.skip(answer.stderr.strip().splitlines()[-1])
        return answer

    return run
