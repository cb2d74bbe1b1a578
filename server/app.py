# SPDX-License-Identifier: Apache-2.0
"""Adds this project's routes to an app. vLLM builds the app; it must not be mounted under another one, whose
lifespan would not run.
"""

import hashlib
import time
from collections.abc import Sequence

from fastapi import FastAPI

from server.routes.health import health_router, ready_router
from server.routes.info import info_router
from server.settings import Settings


def add_routes(app: FastAPI) -> None:
    """Add /pvq/info, /pvq/ready and a stricter /health, which replaces the one that ``app`` may have."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != "/health"]
    for router in (health_router, ready_router, info_router):
        app.include_router(router)


def add_state(app: FastAPI, settings: Settings, api_keys: Sequence[str]) -> None:
    """Give the routes what they read from ``app.state``; the engine is there already, put by vLLM's
    ``init_app_state``.

    Of the keys only the digests are kept.
    """
    app.state.settings = settings
    app.state.started_at = time.monotonic()
    app.state.api_key_digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]
