"""Runs inside a guest: starts commands that the machine asks for over a virtio-serial port, and tells what they say.

Only the standard library, and no other module of qpd: a guest starts this before anything else, on a slow processor.
One JSON object a line. From the machine: {"id", "argv", "env"} starts a command, {"id", "signal"} sends it a signal.
To the machine: {"ready": true} once, {"id", "stream": "stdout"|"stderr", "text"}, {"id", "status"}.
Where the machine's end of the port closes, everything ends, and with it the guest.
"""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PORT_NAME = "qplab.agent"
_PORTS = Path("/sys/class/virtio-ports")


def port(name: str) -> Path:
    """The device of a virtio-serial port: udev's links are not there in every guest, the kernel's names are."""
    for entry in _PORTS.iterdir():
        if (entry / "name").read_text(encoding="ascii").strip() == name:
            return Path("/dev") / entry.name
    raise FileNotFoundError(f"{_PORTS}: no port {name}")


class Agent:
    """Serves one port until its other end closes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._commands: dict[int, subprocess.Popen[bytes]] = {}

    def serve(self) -> None:
        """Start what is asked for; returns when the machine has gone."""
        self.tell(ready=True)
        for request in self._requests():
            number = request["id"]
            if "signal" in request:
                command = self._commands.get(number)
                if command is not None and command.poll() is None:
                    command.send_signal(request["signal"])
            else:
                threading.Thread(target=self._run, args=(number, request), daemon=True).start()

    def tell(self, **message: Any) -> None:
        """Write one message to the machine."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def _requests(self) -> Iterator[dict[str, Any]]:
        held = b""
        while chunk := os.read(self._descriptor, 65536):
            held += chunk
            *lines, held = held.split(b"\n")
            yield from (json.loads(line) for line in lines)

    def _run(self, number: int, request: dict[str, Any]) -> None:
        try:
            command = subprocess.Popen(
                request["argv"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **request.get("env", {})},
            )
        except OSError as error:
            self.tell(id=number, stream="stderr", text=f"{request['argv'][0]}: {error.strerror}\n")
            self.tell(id=number, status=127)
            return
        self._commands[number] = command
        assert command.stdout is not None
        assert command.stderr is not None
        relays = [
            threading.Thread(target=self._relay, args=(number, name, stream), daemon=True)
            for name, stream in (("stdout", command.stdout), ("stderr", command.stderr))
        ]
        for relay in relays:
            relay.start()
        for relay in relays:
            relay.join()
        self.tell(id=number, status=command.wait())

    def _relay(self, number: int, name: str, stream: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(stream.fileno(), 65536):
            self.tell(id=number, stream=name, text=decoder.decode(chunk))


def main() -> None:
    """Serve the port that is named on the command line."""
    Agent(os.open(port(sys.argv[1]), os.O_RDWR)).serve()
    # Children of a shell outlive their parent's end: the guest itself ends with this process.
    os._exit(0)


if __name__ == "__main__":
    main()
