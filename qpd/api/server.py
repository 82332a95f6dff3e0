"""The API on its Unix socket and /metrics on TCP (aiohttp)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import grp
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import orjson
import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from qpd.api.queries import EventsQuery, ExplainQuery, QpFilter
from qpd.api.schemas import QpRow
from qpd.api.state import QueryError, State, UnknownPath
from qpd.metrics import exposition
from qpd.settings import Settings

_JSON = "application/json"
_NDJSON = "application/x-ndjson"
_HEARTBEAT_S = 15.0

_Query = TypeVar("_Query", bound=BaseModel)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = structlog.get_logger("qpd.api")


class ListenError(Exception):
    """The API or /metrics cannot listen; the message is one line: what, where and how to mend it."""


class ApiServer:
    """Serves ``state`` until :meth:`stop`; reads ``api.*`` and ``metrics.listen`` of the settings."""

    def __init__(self, state: State, settings: Settings) -> None:
        self._state = state
        self._settings = settings
        self._claim: _Claim | None = None
        self._runners: list[web.AppRunner] = []
        self.metrics_port: int | None = None
        """The TCP port of /metrics while it is served; differs from the setting where that is 0."""

    async def start(self) -> None:
        """Listen.

        Raises:
            ListenError: another qpd is listening, or socket, group or port cannot be had. Nothing listens then.
        """
        try:
            self._claim = _Claim(self._settings.api.socket, self._settings.api.group)
            await self._serve(self._api(), lambda runner: web.SockSite(runner, self._listener()))
            address = self._settings.metrics.address
            if address is not None:
                await self._serve_metrics(*address)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Answer what was asked, end followers, remove the socket."""
        self._state.events.close()
        for runner in reversed(self._runners):
            await runner.cleanup()
        self._runners.clear()
        self.metrics_port = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _listener(self) -> socket.socket:
        assert self._claim is not None
        return self._claim.listener

    async def _serve(
        self, app: web.Application, site: Callable[[web.AppRunner], web.BaseSite]
    ) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        self._runners.append(runner)
        await runner.setup()
        await site(runner).start()
        return runner

    async def _serve_metrics(self, host: str, port: int) -> None:
        try:
            runner = await self._serve(
                self._exporter(), lambda runner: web.TCPSite(runner, host, port, reuse_address=True)
            )
        except (OSError, OverflowError) as error:
            raise ListenError(_tcp_trouble(self._settings.metrics.listen, error)) from None
        self.metrics_port = runner.addresses[0][1]

    # --- /metrics

    def _exporter(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/", self._index)
        return app

    async def _index(self, _: web.Request) -> web.Response:
        return web.Response(text="qpd: metrics are at /metrics\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        snapshot = await self._state.metrics()
        accept = request.headers.get("Accept", "")
        body, content_type = await asyncio.to_thread(exposition, snapshot, accept)
        return web.Response(body=body, headers={"Content-Type": content_type})

    # --- the API

    def _api(self) -> web.Application:
        app = web.Application(middlewares=[_errors])
        app.router.add_get("/v1/status", self._status)
        app.router.add_get("/v1/paths", self._paths)
        app.router.add_get("/v1/groups", self._groups)
        app.router.add_get("/v1/qps", self._qps)
        app.router.add_get("/v1/explain", self._explain)
        app.router.add_get("/v1/events", self._events)
        app.router.add_post("/v1/paths/{name}/drain", self._drain)
        app.router.add_post("/v1/paths/{name}/undrain", self._undrain)
        return app

    async def _status(self, _: web.Request) -> web.Response:
        return _json(self._state.status())

    async def _paths(self, _: web.Request) -> web.Response:
        return _json(self._state.paths())

    async def _groups(self, _: web.Request) -> web.Response:
        return _json(self._state.groups())

    async def _explain(self, request: web.Request) -> web.Response:
        return _json(await self._state.explain(_query(ExplainQuery, request)))

    async def _drain(self, request: web.Request) -> web.Response:
        return _json(await self._state.drain(request.match_info["name"], drain=True))

    async def _undrain(self, request: web.Request) -> web.Response:
        return _json(await self._state.drain(request.match_info["name"], drain=False))

    async def _qps(self, request: web.Request) -> web.StreamResponse:
        chunks = self._state.qps(_query(QpFilter, request))
        # The first chunk decides between an answer and an error, so it is asked for before the status line is sent.
        first: list[QpRow] = await anext(aiter(chunks), [])
        response = web.StreamResponse(headers={"Content-Type": _JSON})
        await response.prepare(request)
        try:
            await response.write(b"[" + orjson.dumps(first)[1:-1])
            async for chunk in chunks:
                if chunk:
                    await response.write(b"," + orjson.dumps(chunk)[1:-1])
            await response.write(b"]\n")
            await response.write_eof()
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - whatever it was, the answer must not look complete
            _log.exception("answer broken off", path=request.path)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _events(self, request: web.Request) -> web.StreamResponse:
        query = _query(EventsQuery, request)
        ring = self._state.events
        if not query.follow:
            return web.Response(body=_lines(ring.records(query.since)), content_type=_NDJSON)
        response = web.StreamResponse(headers={"Content-Type": _NDJSON})
        await response.prepare(request)
        async for batch in _with_heartbeat(ring.follow(query.since)):
            # An empty line keeps nothing alive but finds out whether the follower is still there.
            await response.write(_lines(batch) if batch else b"\n")
        await response.write_eof()
        return response


async def _with_heartbeat(batches: AsyncIterator[list[Any]]) -> AsyncIterator[list[Any]]:
    """The batches, with an empty one after each while of silence."""
    task: asyncio.Future[list[Any]] | None = None
    try:
        while True:
            task = task or asyncio.ensure_future(anext(batches))
            done, _ = await asyncio.wait({task}, timeout=_HEARTBEAT_S)
            if not done:
                yield []
                continue
            try:
                batch = task.result()
            except StopAsyncIteration:
                return
            task = None
            yield batch
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await task


def _lines(records: list[Any]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def _json(answer: object, status: int = 200) -> web.Response:
    body = orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)
    return web.Response(body=body, status=status, content_type=_JSON)


def _query(model: type[_Query], request: web.Request) -> _Query:
    """The query parameters as ``model``, or a QueryError that names the first wrong one."""
    try:
        return model.model_validate(dict(request.query))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name = str(wrong["loc"][0])
        known = ", ".join(model.model_fields)
        if wrong["type"] == "extra_forbidden":
            raise QueryError(f"no such parameter: {name}; there are {known}") from None
        if wrong["type"] == "missing":
            raise QueryError(f"parameter {name} is missing") from None
        said = wrong["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise QueryError(f"parameter {name}: {request.query.get(name, '')!r} {said}") from None


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Every error is one JSON object with one line."""
    try:
        return await handler(request)
    except UnknownPath as error:
        return _json({"error": str(error)}, 404)
    except QueryError as error:
        return _json({"error": str(error)}, 400)
    except web.HTTPException as error:
        return _json({"error": f"{request.method} {request.path}: {error.reason}"}, error.status)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:  # noqa: BLE001 - the last resort of every request
        _log.exception("request failed", method=request.method, path=request.path)
        return _json({"error": "the daemon failed to answer; its log says why"}, 500)


class _Claim:
    """The Unix socket, held by a lock beside it, so that two daemons that start at once cannot both take it."""

    def __init__(self, path: Path, group: str | None) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock = -1
        self._owner = _group_id(group)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take()
        except OSError as error:
            self._close()
            said = error.strerror or str(error)
            raise ListenError(f"api.socket: {path}: {said}; check owner and mode of its directory") from None
        except ListenError:
            self._close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ListenError(_second(self._path)) from None
        if self._path.exists():
            if not self._path.is_socket():
                raise ListenError(
                    f"api.socket: {self._path} is there and no socket; remove it or choose another path"
                )
            if _answers(self._path):
                raise ListenError(_second(self._path))
            self._path.unlink()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Mode 0600 until owner and mode are what they shall be.
        umask = os.umask(0o177)
        try:
            self.listener.bind(str(self._path))
        except OSError:
            self.listener.close()
            raise
        finally:
            os.umask(umask)
        self._inode = self._path.stat().st_ino
        if self._owner is not None:
            os.chown(self._path, -1, self._owner)
        self._path.chmod(0o660)

    def release(self) -> None:
        """Remove the socket, if it still is this daemon's own, and let the lock go."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
                self._lock_path.unlink()
        self.listener.close()
        self._close()

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _group_id(group: str | None) -> int | None:
    try:
        return None if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(
            f"api.group: no group is named {group}; make it with groupadd or mend the name"
        ) from None


def _answers(path: Path) -> bool:
    """Whether somebody listens on this socket; the socket of a dead process refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True


def _second(path: Path) -> str:
    return f"api.socket: another qpd listens on {path}; stop it, or give this one its own api.socket and bpf.pin_dir"


def _tcp_trouble(listen: str, error: OSError | OverflowError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"metrics.listen: {listen} is taken by another program; choose another port, or off"
    if number == errno.EADDRNOTAVAIL:
        return f"metrics.listen: {listen} is no address of this machine; choose one of `ip address`, or off"
    if number in (errno.EACCES, errno.EPERM):
        return f"metrics.listen: no permission to listen on {listen}; choose a port above 1023"
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"metrics.listen: cannot listen on {listen}: {said}; mend the address, or say off"
