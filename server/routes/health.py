# SPDX-License-Identifier: Apache-2.0
"""/health: the process is alive. /ready: the engine can answer.

vLLM's own /health looks at a flag that is set after the engine's process has died; an engine that hangs,
sleeps or is paused passes. For /ready the engine's process itself has to answer within ``health_timeout_s``. It
answers between two steps of generation, so a busy engine is ready as long as a step takes less than that.

These routes answer while the server takes requests; ``server.gate`` answers in their place while it does not.
"""

import asyncio

from fastapi import APIRouter, Request, Response

from server.dependencies import Engine, EngineDep
from server.schemas import Readiness

probe_router = APIRouter(tags=["probes"])
ready_router = APIRouter(prefix="/pvq", tags=["pvq"])


async def _ask(engine: Engine) -> Readiness:
    await engine.check_health()
    if await engine.is_sleeping():
        return Readiness(ready=False, reason="the engine sleeps")
    if await engine.is_paused():
        return Readiness(ready=False, reason="the engine is paused")
    return Readiness(ready=True)


async def readiness(engine: Engine, timeout_s: float) -> Readiness:
    """Return whether ``engine`` answers within ``timeout_s`` seconds and takes requests."""
    try:
        return await asyncio.wait_for(_ask(engine), timeout_s)
    except TimeoutError:
        return Readiness(ready=False, reason=f"the engine did not answer within {timeout_s:g} s")
    except Exception as error:  # whatever it is, an engine that cannot be asked cannot answer
        return Readiness(ready=False, reason=f"the engine failed: {type(error).__name__}")


@probe_router.get("/health", response_class=Response)
async def health() -> Response:
    """200 while the process is alive; says nothing about the engine."""
    return Response(status_code=200)


@probe_router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
@ready_router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(request: Request, response: Response, engine: EngineDep) -> Readiness:
    """200 if the engine answers and takes requests, else 503 with the reason."""
    state = await readiness(engine, request.app.state.settings.health_timeout_s)
    response.status_code = 200 if state.ready else 503
    return state
