"""A client of the vty sockets that FRR's daemons open for vtysh, on a kept connection.

Framing (lib/vty.c, vtysh_read): a command is a line that ends in NUL; its answer is text without NUL, then three NULs
and one status byte (lib/command.h: 0 is success). One command is under way at a time. ``terminal monitor`` answers with
a file descriptor over SCM_RIGHTS (FRR 8.0 and later), on which log messages come; see ``open_monitor``.
"""

from __future__ import annotations

import array
import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 2.0
"""Seconds that a daemon may take to answer; a stopped one is taken for lost after that."""

_SUCCESS = 0
_END = b"\0\0\0"
# lib/zlog_live.h, struct zlog_live_hdr: seconds, nanoseconds, length of the header, ..., length of the text.
_LOG_HEADER_LENGTH = struct.Struct("=12xI")
_LOG_TEXT_LENGTH = struct.Struct("=44xI")
LOG_MAX = 1 << 16
"""Bytes that one log message can have at most."""


class VtyError(Exception):
    """Something between qpd and an FRR daemon; the text is one line for people."""


class VtyUnavailableError(VtyError):
    """The daemon is not there, does not let us in, does not answer, or went away."""


class VtyRefusedError(VtyError):
    """The daemon answered that the command failed or is unknown to it."""


def why_not(path: Path, error: OSError) -> str:
    """What, where and how to mend it, for a socket that cannot be used."""
    match error.errno:
        case errno.ENOENT:
            return f"{path}: not there; {path.stem} is not running (see frr.socket_dir and FRR's /etc/frr/daemons)"
        case errno.ECONNREFUSED:
            return f"{path}: nobody listens; {path.stem} has ended"
        case errno.EACCES | errno.EPERM:
            return f"{path}: permission denied; run qpd as root or add its user to the group frrvty"
        case _:
            return f"{path}: {error.strerror or error}"


class _Conversation(asyncio.Protocol):
    """Collects one answer at a time; tells at once when the daemon is gone."""

    def __init__(self, lost: Callable[[_Conversation], None]) -> None:
        self._lost = lost
        self._answer = bytearray()
        self._searched = 0
        self.waiting: asyncio.Future[tuple[str, int]] | None = None

    def data_received(self, data: bytes) -> None:
        if self.waiting is None or self.waiting.done():
            return  # the rest of an answer that nobody waits for any more
        self._answer += data
        end = self._answer.find(_END[:1], self._searched)
        if end < 0:
            self._searched = len(self._answer)
        elif len(self._answer) >= end + len(_END) + 1:
            text = self._answer[:end].decode(errors="replace")
            status = self._answer[end + len(_END)]
            self._answer.clear()
            self._searched = 0
            self.waiting.set_result((text, status))
        else:
            self._searched = end

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's own signature
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionResetError("closed by the daemon"))
        self._lost(self)


class VtyClient:
    """A conversation with one FRR daemon.

    Args:
        path: its socket, ``<socket_dir>/<daemon>.vty``.
        timeout: seconds that connecting and each answer may take.
        on_lost: called once, on the loop, when an open connection ends without ``close`` having been called.
    """

    def __init__(
        self, path: Path, *, timeout: float = TIMEOUT, on_lost: Callable[[], None] | None = None
    ) -> None:
        self.path = path
        self._timeout = timeout
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._conversation: _Conversation | None = None
        self._inode = 0
        self._turn = asyncio.Lock()

    @property
    def connected(self) -> bool:
        """True between ``connect`` and the end of the connection."""
        return self._transport is not None

    def replaced(self) -> bool:
        """True: the path leads to another socket than the one we talk to, so the daemon has been started again."""
        try:
            return self.connected and self.path.stat().st_ino != self._inode
        except OSError:
            return False  # only the name is gone; the conversation goes on

    async def connect(self) -> None:
        """Connect and enter the view in which ``show`` works. A connection that is open is closed first.

        Raises:
            VtyUnavailableError: one line that says why not.
        """
        self.close()
        loop = asyncio.get_running_loop()
        try:
            inode = self.path.stat().st_ino
            transport, conversation = await asyncio.wait_for(
                loop.create_unix_connection(lambda: _Conversation(self._ended), str(self.path)),
                self._timeout,
            )
        except asyncio.TimeoutError as error:
            raise VtyUnavailableError(
                f"{self.path}: {self.path.stem} did not accept within {self._timeout} s"
            ) from error
        except OSError as error:
            raise VtyUnavailableError(why_not(self.path, error)) from error
        self._transport, self._conversation, self._inode = transport, conversation, inode
        await self.command("enable")

    async def command(self, line: str) -> str:
        """The daemon's answer to one command.

        Raises:
            VtyUnavailableError: no connection, no answer in time, or it went away; the connection is closed then.
            VtyRefusedError: the daemon reports failure; the connection stays.
        """
        async with self._turn:
            if self._transport is None or self._conversation is None:
                raise VtyUnavailableError(f"{self.path}: not connected")
            answer: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
            self._conversation.waiting = answer
            self._transport.write(line.encode() + b"\0")
            try:
                text, status = await asyncio.wait_for(answer, self._timeout)
            except asyncio.TimeoutError as error:
                self._drop()
                raise VtyUnavailableError(
                    f"{self.path}: {self.path.stem} did not answer {line!r} within {self._timeout} s"
                ) from error
            except ConnectionResetError as error:
                raise VtyUnavailableError(f"{self.path}: {self.path.stem} went away") from error
        if status != _SUCCESS:
            words = " ".join(text.split()) or f"status {status}"
            raise VtyRefusedError(f"{self.path}: {line!r}: {words}")
        return text

    def close(self) -> None:
        """End the conversation; ``on_lost`` is not called. Idempotent."""
        transport, self._transport = self._transport, None
        self._conversation = None
        if transport is not None:
            transport.abort()

    def _drop(self) -> None:
        """End it from our side because the daemon does not answer: it is lost all the same."""
        if self._transport is not None:
            self.close()
            if self._on_lost is not None:
                self._on_lost()

    def _ended(self, conversation: _Conversation) -> None:
        if conversation is self._conversation:
            self._drop()


async def open_monitor(path: Path, timeout: float = TIMEOUT) -> tuple[socket.socket, socket.socket]:
    """Ask a daemon for its log messages as they are written.

    Returns:
        the conversation, which must stay open as long as the log is wanted, and the non-blocking socket on which each
        datagram is one message.

    Raises:
        VtyUnavailableError: the daemon is not there or gives no log.
    """
    conversation = socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
    log: socket.socket | None = None
    try:
        # A listening Unix socket answers at once, also when it is full (EAGAIN).
        conversation.connect(str(path))
        log = await asyncio.wait_for(_ask_for_log(conversation), timeout)
    except asyncio.TimeoutError as error:
        raise VtyUnavailableError(f"{path}: {path.stem} did not answer within {timeout} s") from error
    except OSError as error:
        raise VtyUnavailableError(why_not(path, error)) from error
    finally:
        if log is None:
            conversation.close()
    if log is None:
        raise VtyUnavailableError(f"{path}: 'terminal monitor' gave no log (FRR older than 8.0)")
    return conversation, log


async def _ask_for_log(conversation: socket.socket) -> socket.socket | None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(conversation, b"enable\0")
    await loop.sock_recv(conversation, 64)
    await loop.sock_sendall(conversation, b"terminal monitor\0")
    readable = asyncio.Event()
    loop.add_reader(conversation, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(conversation)
    _, ancillary, _, _ = conversation.recvmsg(4096, socket.CMSG_SPACE(4))
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array.array("i")
            descriptors.frombytes(payload[:4])
            log = socket.socket(fileno=descriptors[0])
            log.setblocking(False)
            return log
    return None


def log_text(datagram: bytes) -> str:
    """The text of one message from ``open_monitor``'s socket; '' where it is not understood."""
    try:
        begin = _LOG_HEADER_LENGTH.unpack_from(datagram)[0]
        length = _LOG_TEXT_LENGTH.unpack_from(datagram)[0]
    except struct.error:
        return ""
    return datagram[begin : begin + length].decode(errors="replace")
