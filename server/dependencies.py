# SPDX-License-Identifier: Apache-2.0
"""What the routes need, named once: the engine."""

from typing import Annotated, Any, Protocol

from fastapi import Depends, Request


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


EngineDep = Annotated[Engine, Depends(engine)]
