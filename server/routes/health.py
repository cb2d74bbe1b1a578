# SPDX-License-Identifier: Apache-2.0
"""/health: the process is alive. /ready: the engine can answer.

vLLM's own /health looks at a flag that is set after the engine's process has died; an engine that hangs,
sleeps or is paused passes. For /ready the engine's process itself has to answer within ``health_timeout_s``. It
answers between two steps of generation, so a busy engine is ready as long as a step takes less than that.

These routes answer while the server takes requests; ``server.gate`` answers in their place while it does not.
"""

import asyncio
import time

from fastapi import APIRouter, Request, Response

from server.dependencies import Engine, EngineDep
from server.schemas import Readiness

_POLL_S = 0.1

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
    """Return whether ``engine`` answers within ``timeout_s`` seconds and takes requests; at once if it dies
    meanwhile, which would leave the question without an answer.
    """
    asked = asyncio.ensure_future(_ask(engine))
    end = time.monotonic() + timeout_s
    try:
        while not asked.done() and not engine.errored:
            left_s = end - time.monotonic()
            if left_s <= 0:
                return Readiness(ready=False, reason=f"the engine did not answer within {timeout_s:g} s")
            await asyncio.wait({asked}, timeout=min(left_s, _POLL_S))
        return asked.result() if asked.done() else Readiness(ready=False, reason="the engine died")
    except Exception as error:  # whatever it is, an engine that cannot be asked cannot answer
        return Readiness(ready=False, reason=f"the engine failed: {type(error).__name__}")
    finally:
        asked.cancel()


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
