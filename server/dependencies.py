# SPDX-License-Identifier: Apache-2.0
"""What the routes need, each named once: the engine and the API key."""

import hashlib
import secrets
from typing import Annotated, Any, Protocol

from fastapi import Depends, HTTPException, Request


class Engine(Protocol):
    """The part of vLLM's engine client that the routes use; tests put a fake in its place."""

    vllm_config: Any
    errored: bool

    async def check_health(self) -> None:
        """Raise if the engine has died."""

    async def is_sleeping(self) -> bool:
        """Ask the engine's process whether its weights are put away."""

    async def is_paused(self) -> bool:
        """Ask the engine's process whether it takes no requests for now."""


def engine(request: Request) -> Engine:
    """Return the engine that vLLM's ``init_app_state`` left in the state of the app."""
    return request.app.state.engine_client


def require_api_key(request: Request) -> None:
    """Refuse with 401 a request without one of the server's keys as bearer token; let all pass if the server
    has no key.
    """
    digests: list[bytes] = request.app.state.api_key_digests
    if not digests:
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    digest = hashlib.sha256(token.encode()).digest()
    matches = [secrets.compare_digest(digest, known) for known in digests]
    if scheme.lower() != "bearer" or not any(matches):
        raise HTTPException(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})


EngineDep = Annotated[Engine, Depends(engine)]
ApiKeyDep = Depends(require_api_key)
