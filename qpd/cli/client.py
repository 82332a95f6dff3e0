"""HTTP to the daemon's Unix socket, with nothing loaded that a short command does not need."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from qpd.cli.errors import CommandError, ExitStatus

TIMEOUT_S = 10.0
_STATUS = {400: ExitStatus.USAGE, 404: ExitStatus.NOT_FOUND}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("qpd", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """The API of the daemon behind one socket. Every failure is a :class:`CommandError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, resource: str, **query: object) -> Any:  # noqa: ANN401 - JSON
        """The answer to GET, decoded. ``None`` values of ``query`` are left out."""
        return _decode(b"".join(self.stream(resource, **query)))

    def post(self, *resource: str) -> Any:  # noqa: ANN401 - JSON
        """The answer to POST, decoded. ``resource``: the parts of its path, which may hold any character."""
        with self._request(
            "POST", "/".join(quote(part, safe="") for part in resource), {}, TIMEOUT_S
        ) as response:
            return _decode(response.read())

    def stream(self, resource: str, **query: object) -> Iterator[bytes]:
        """The answer to GET as it comes, undecoded."""
        with self._request("GET", resource, query, TIMEOUT_S) as response:
            while block := response.read(1 << 20):
                yield block

    def lines(self, resource: str, **query: object) -> Iterator[bytes]:
        """The lines of an answer that may never end; empty ones are left out."""
        with self._request("GET", resource, query, None) as response:
            for line in response:
                if line.strip():
                    yield line

    @contextmanager
    def _request(
        self, method: str, resource: str, query: Mapping[str, object], timeout: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        given = {name: _text(value) for name, value in query.items() if value is not None}
        target = f"/v1/{resource}" + (f"?{urlencode(given)}" if given else "")
        connection = _UnixConnection(self._path, timeout)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(response)
            yield response
        except http.client.HTTPException as error:
            raise CommandError(
                f"{self._path}: the answer broke off ({type(error).__name__}); see the daemon's log"
            ) from None
        except TimeoutError:
            raise CommandError(
                f"no answer from {self._path} within {TIMEOUT_S:g} s; see the daemon's log"
            ) from None
        except OSError as error:
            raise CommandError(f"no answer from {self._path}: {_trouble(error)}") from None
        finally:
            connection.close()


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decode(body: bytes) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(body)
    except ValueError:
        raise CommandError(
            "the answer is no JSON; is this the socket of a qpd of the same version?"
        ) from None


def _refusal(response: http.client.HTTPResponse) -> CommandError:
    body = response.read()
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {response.status} {response.reason}; is this the socket of a qpd?"
    return CommandError(message, _STATUS.get(response.status, ExitStatus.FAILED))


def _trouble(error: OSError) -> str:
    match error:
        case FileNotFoundError():
            return "no such socket; is qpd running? (systemctl status qpd, or say --socket)"
        case ConnectionRefusedError():
            return "nobody listens there; qpd has ended (systemctl status qpd)"
        case PermissionError():
            return "no permission; use sudo, or join the group that owns it (api.group)"
        case ConnectionError():
            return "the daemon ended while it answered (systemctl status qpd)"
        case _:
            return error.strerror or str(error)
