# SPDX-License-Identifier: Apache-2.0
"""Connections that cannot be held by a slow or vanished client: uvicorn's HTTP protocol with limits on time and size.

Uvicorn itself waits without end for the rest of a head or body and for a client that does not read.
"""

import dataclasses
import socket
import uuid
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server import metrics
from server.access import REFUSED, logger
from server.asgi import error_body, header

_HEAD_BYTES = 64 * 1024
_MIN_BYTES_PER_S = 1024
"""A client that reads more slowly than this while answers wait for it counts as not reading."""


@dataclasses.dataclass(frozen=True)
class ConnectionLimits:
    """Open connections, and seconds for a head, for a body, and for a client that does not read."""

    connections: int
    header_timeout_s: float
    body_timeout_s: float
    write_timeout_s: float


class Connection(HttpToolsProtocol):
    """One connection. Use ``functools.partial(Connection, limits=...)`` as uvicorn's ``http``; ``log_refusals``
    is whether a line is logged for each answer from here.
    """

    def __init__(
        self, *args: Any, limits: ConnectionLimits, log_refusals: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits, self._log_refusals = limits, log_refusals
        self._arriving, self._in_head, self._head_bytes = False, True, 0
        self._deadline: TimerHandle | None = None  # for the request that is arriving
        self._stall: TimerHandle | None = None  # for the answer that waits to be read
        self._unread_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Refuse one connection too many; else start the clock for the first head."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._close("too_many", 503, "the server has too many open connections: try again later")
            return
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            # The kernel ends connections whose client has vanished or lets nothing more in.
            for name, value in (
                ("TCP_USER_TIMEOUT", int(self._limits.write_timeout_s * 1000)),
                ("TCP_KEEPIDLE", 30),
                ("TCP_KEEPINTVL", 10),
                ("TCP_KEEPCNT", 3),
            ):
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._arm(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._disarm()
        self._reading_again()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; a head may not grow without end."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > _HEAD_BYTES and not self.transport.is_closing():
            self._close("head_too_large", 431, f"the headers are larger than {_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Start the clock for a later head on the same connection."""
        super().on_message_begin()
        self._arriving = self._in_head = True
        if self._deadline is None:
            self._arm(self._limits.header_timeout_s)

    def on_headers_complete(self) -> None:
        """Start the clock for the body."""
        self._in_head, self._head_bytes = False, 0
        self._arm(self._limits.body_timeout_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock."""
        self._arriving = False
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Start the clock for a client that does not read."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        self._reading_again()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, with what waits in it if nobody reads that."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._expired)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expired(self) -> None:
        self._deadline = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (self._in_head and answering):
            # The next request has to wait for the answer to this one, which is not the client's fault.
            self._arm(self._limits.body_timeout_s)
            return
        what = "head" if self._in_head else "body"
        self._close(f"slow_{what}", 408, f"the {what} of the request did not arrive in time")

    def _close(self, reason: str, status: int, message: str) -> None:
        """Close; with an answer, unless one has begun or nothing was asked."""
        metrics.CONNECTIONS_CLOSED.labels(reason).inc()
        begun = not self._in_head and self.cycle is not None and self.cycle.response_started
        if (self._arriving or status == 503) and not begun:
            self._refuse(reason, status, message)
        self.transport.close()
        self.loop.call_later(self._limits.write_timeout_s, self.transport.abort)

    def _refuse(self, reason: str, status: int, message: str) -> None:
        # A request whose body is late has its id from access.py, which is told how it ended.
        cycle, known = None if self._in_head else self.cycle, ""
        if cycle is not None:
            known = header(cycle.scope, b"x-request-id")
            cycle.scope[REFUSED] = status
        request_id = known or uuid.uuid4().hex
        if self._log_refusals:
            client = self.client or ("", 0)
            facts = {"request_id": request_id, "client": client[0], "status": status, "reason": reason}
            text = "%(client)s %(status)s %(reason)s id=%(request_id)s"
            logger.info(text, facts, extra={"facts": facts})
        body = error_body(status, message, reason)
        fields = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
            "x-request-id": request_id,
        }
        if status == 503:
            fields["retry-after"] = 1
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(STATUS_LINE[status] + f"{head}\r\n".encode("latin-1") + body)

    def _watch_reading(self) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self._limits.write_timeout_s, self._check_reading)

    def _reading_again(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _check_reading(self) -> None:
        read_bytes = self._unread_bytes - self.transport.get_write_buffer_size()
        if read_bytes >= _MIN_BYTES_PER_S * self._limits.write_timeout_s:
            self._watch_reading()
            return
        self._stall = None
        metrics.CONNECTIONS_CLOSED.labels("slow_reader").inc()
        self.transport.abort()
