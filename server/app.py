# SPDX-License-Identifier: Apache-2.0
"""Adds this project's routes to an app. vLLM builds the app; it must not be mounted under another one, whose
lifespan would not run.
"""

from fastapi import FastAPI

from server.routes.health import probe_router, ready_router
from server.routes.info import info_router
from server.routes.models import models_router
from server.routes.page import page_router
from server.settings import Settings
from server.state import ServerState
from server.unusable import add_handlers

_REPLACED = frozenset({"/health", "/v1/models"})


def add_routes(app: FastAPI) -> None:
    """Add /ready, /pvq/info, /pvq/ready and the page, and replace /health and /v1/models if ``app`` has them; and the
    handlers of server/unusable.py.
    """
    routes = [route for route in app.router.routes if getattr(route, "path", None) not in _REPLACED]
    app.router.routes[:] = []
    for router in (probe_router, ready_router, info_router, models_router, page_router):
        app.include_router(router)
    app.router.routes.extend(routes)  # behind ours: the first that matches counts
    add_handlers(app)


def add_state(app: FastAPI, settings: Settings, server_state: ServerState) -> None:
    """Give the routes what they read from ``app.state``; the engine is there already, put by vLLM's
    ``init_app_state``.
    """
    app.state.settings = settings
    app.state.server_state = server_state
