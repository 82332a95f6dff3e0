"""A TCP transfer between two hosts of a fabric, every byte of which is checked."""

from __future__ import annotations

import hashlib
import random
import sys

from qpd.lab.fabric import Fabric

SERVE = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 5001)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    digest = hashlib.sha256()
    while data := connection.recv(1 << 16):
        digest.update(data)
    connection.close()
print(digest.hexdigest())
"""
SEND = """
import random, socket, sys
with socket.create_connection((sys.argv[1], 5001), timeout=20) as connection:
    connection.sendall(random.Random(7).randbytes(20_000_000))
"""


def transfer(fabric: Fabric, source: str, destination: str) -> None:
    """Send 20 MB from one host to another; fails where they do not arrive, or not as they were sent."""
    address = fabric.address(destination)
    server = fabric.popen(destination, sys.executable, "-c", SERVE, address, stdout=-1, text=True)
    with server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            fabric.exec(source, sys.executable, "-c", SEND, address)
            digest, _ = server.communicate(timeout=20)
        finally:
            server.kill()
    assert digest.strip() == hashlib.sha256(random.Random(7).randbytes(20_000_000)).hexdigest()
