"""A Docker engine of the tests' own: its data, its socket, no bridge, no firewall rules; ended by its process id."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

READY = 60.0
"""Seconds for dockerd and its containerd to answer."""


class EngineError(Exception):
    """What the engine or its client said, in one line."""


class Engine:
    """dockerd, from `start` to `stop`.

    Args:
        data: images and the cache of builds; kept between sessions, but nothing breaks where it is new. One session
            at a time uses it.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.directory = Path(tempfile.mkdtemp(prefix="qpdt-docker-", dir="/run"))
        self.socket = self.directory / "docker.sock"
        self.log = self.directory / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1

    @property
    def environment(self) -> dict[str, str]:
        """For clients of this engine: docker and containerlab."""
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        self.data.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.data.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        command = [
            # It shall not outlive a session that is killed.
            "setpriv",
            "--pdeathsig=TERM",
            "dockerd",
            f"--data-root={self.data}",
            f"--exec-root={self.directory / 'exec'}",
            f"--pidfile={self.directory / 'docker.pid'}",
            f"--host=unix://{self.socket}",
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        limit = time.monotonic() + READY
        while self.docker("version", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > limit:
                words = self.log.read_text(errors="replace").splitlines()[-3:]
                raise EngineError(f"dockerd does not answer: {' | '.join(words)}")
            time.sleep(0.2)
        # What a killed session has left.
        if left := self.docker("ps", "--all", "--quiet").stdout.split():
            self.docker("rm", "--force", "--volumes", *left)

    def stop(self) -> None:
        """End the engine and everything in it; images stay."""
        if self._process is not None:
            if self._process.poll() is None and (left := self._all_containers()):
                self.docker("rm", "--force", "--volumes", *left, check=False)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.poll() is None:
                    self._process.send_signal(number)
                    try:
                        self._process.wait(timeout=60)
                    except subprocess.TimeoutExpired:
                        continue
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (place := line.split()[1]).startswith((f"{self.directory}/", f"{self.data}/")):
                subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)

    def docker(
        self, *arguments: str, check: bool = True, timeout: float = 120.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the client; raises EngineError with its last words where it fails and `check` is set."""
        # The distribution's own client first: others may come without BuildKit.
        client = shutil.which("docker", path=f"/usr/bin:{os.environ['PATH']}")
        if client is None:
            raise EngineError("no docker client: run 'scripts/setup container'")
        done = subprocess.run(
            [client, *arguments],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=self.environment,
            **options,
        )
        if check and done.returncode != 0:
            words = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise EngineError(f"docker {' '.join(arguments[:3])}: {words}")
        return done

    def process(self, container: str) -> int:
        """The process id of a container's first process, on this machine."""
        return int(self.docker("inspect", "--format", "{{.State.Pid}}", container).stdout)

    def knows_capability(self, name: str, image: str) -> bool:
        """Whether the engine takes a capability of this name: Debian 12's does not know CAP_BPF."""
        made = self.docker("create", "--network=none", f"--cap-add={name}", image, check=False)
        if made.returncode == 0:
            self.docker("rm", made.stdout.strip())
        return made.returncode == 0

    def _all_containers(self) -> list[str]:
        return self.docker("ps", "--all", "--quiet", check=False).stdout.split()
