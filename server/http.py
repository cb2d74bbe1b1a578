# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: uvicorn with this project's middleware, connections and life cycle."""

import asyncio
import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from server.access import RequestLog
from server.admission import Admission, Limits
from server.asgi import App
from server.auth import Authentication
from server.connection import Connection, ConnectionLimits
from server.gate import Gate
from server.keys import KeyStore
from server.settings import Settings
from server.state import Phase, ServerState

logger = logging.getLogger("pvq.server")

_CUT_TIMEOUT_S = 3
"""Seconds for requests to end after they have been cut off."""


class HTTPServer(uvicorn.Server):
    """Uvicorn that leaves signals to its owner: its own handlers would kill the process before the engine has
    stopped.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def guard(app: App, state: ServerState, settings: Settings, keys: KeyStore, limits: Limits) -> App:
    """Return ``app`` behind all middleware; outermost last."""
    app = Admission(app, limits)
    app = Authentication(app, keys)
    return _entrance(app, state, settings)


def _entrance(app: App | None, state: ServerState, settings: Settings) -> App:
    """Return what every request meets first."""
    entered: App = Gate(app, state)
    if settings.cors_origins:
        entered = CORSMiddleware(
            entered,  # type: ignore[arg-type]
            allow_origins=settings.cors_origins,
            allow_methods=("*",),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    return RequestLog(entered, settings.access_log)


def make_server(app: App, settings: Settings, lifespan: str = "auto") -> HTTPServer:
    """Return a server for ``app``, not yet running."""
    limits = ConnectionLimits(
        settings.max_connections,
        settings.header_timeout_s,
        settings.body_timeout_s,
        settings.write_timeout_s,
    )
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        http=functools.partial(Connection, limits=limits, log_refusals=settings.access_log),  # type: ignore[arg-type]
        lifespan=lifespan,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        timeout_graceful_shutdown=_CUT_TIMEOUT_S,
        **settings.tls,
    )
    return HTTPServer(config)


class LoadingServer:
    """Answers /health, /ready and /metrics, and 503 to everything else, in a thread of its own while the main thread
    loads the model. It has a duplicate of the listening socket, so whoever connects between the two servers waits a
    moment and is answered by the next one.
    """

    def __init__(self, settings: Settings, state: ServerState, listener: socket.socket) -> None:
        self._server = make_server(_entrance(None, state, settings), settings, lifespan="off")
        self._listener = listener.dup()
        self._thread = threading.Thread(target=self._run, name="loading server", daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; the socket itself stays open for the server that follows."""
        self._server.should_exit = True
        self._thread.join()


class Drain:
    """Ends a server in order: new requests get 503 while the running ones end, then it stops."""

    def __init__(self, server: HTTPServer, state: ServerState, timeout_s: float) -> None:
        self._server, self._state, self._timeout_s = server, state, timeout_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; a second call stops at once, without waiting for anything that still runs."""
        if self._task is not None:
            self._server.force_exit = self._server.should_exit = True
            return
        self._begin(Phase.DRAINING, self._timeout_s)

    def fail(self, timeout_s: float) -> None:
        """The engine has died: give the clients ``timeout_s`` to take their errors, also if it drains already."""
        if self._task is not None:
            self._task.cancel()
        self._begin(Phase.FAILED, timeout_s)

    def _begin(self, phase: Phase, timeout_s: float) -> None:
        self._state.enter(phase)
        logger.info("%s: %d requests run and have %g s", phase.value, self._state.running, timeout_s)
        self._task = asyncio.get_running_loop().create_task(self._stop_when_empty(timeout_s))

    async def _stop_when_empty(self, wait_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while self._state.running and loop.time() < end:
            await asyncio.sleep(0.05)
        if self._state.running:
            logger.warning("%d requests are cut off after %g s", self._state.running, wait_s)
        self._server.should_exit = True
