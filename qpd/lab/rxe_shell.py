"""A remote shell of a few lines, since mpirun starts its daemons on other machines by one. Runs inside guests.

    python3 rxe_shell.py serve                  says "listening", then runs what it is sent
    python3 rxe_shell.py HOST COMMAND...        as ssh is called: prints what the command says

Only the standard library, and no other module of qpd. Whoever reaches the port may do everything: it is for guests,
whose network is the lab.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

PORT = 18500


def serve() -> None:
    """Run one shell command a connection; its output goes back, and its end closes the connection."""
    with socket.create_server(("", PORT)) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_run, args=(connection,), daemon=True).start()


def _run(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as lines:
        command = lines.readline().decode()
        subprocess.run(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=connection.fileno(),
            stderr=connection.fileno(),
            check=False,
        )


def ask(host: str, command: str) -> None:
    """Run a command on another guest and print what it says."""
    with socket.create_connection((host, PORT)) as connection:
        connection.sendall(command.encode() + b"\n")
        while said := connection.recv(65536):
            os.write(sys.stdout.fileno(), said)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        ask(sys.argv[1], " ".join(sys.argv[2:]))
