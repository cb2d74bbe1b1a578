# SPDX-License-Identifier: Apache-2.0
"""/v1/models: as OpenAI has it, and what the weights are."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.asgi import error_body
from server.dependencies import EngineDep
from server.routes.info import facts

models_router = APIRouter(tags=["OpenAI"])


@models_router.get("/v1/models")
async def models(request: Request, engine: EngineDep) -> dict[str, Any]:
    """The models that requests may name; each has the object ``pvq`` with quantization, size and type."""
    listed = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
    served = facts(engine.vllm_config.model_config)
    for card in listed["data"]:
        card["pvq"] = served
    return listed


@models_router.get("/v1/models/{name:path}", response_model=dict[str, Any])
async def model(name: str, request: Request, engine: EngineDep) -> dict[str, Any] | Response:
    """One of them; vLLM itself has no such route."""
    for card in (await models(request, engine))["data"]:
        if card["id"] == name:
            return card
    body = error_body(
        404, f"the model {name!r} does not exist: GET /v1/models lists all", "model_not_found", "model"
    )
    return Response(body, 404, media_type="application/json")
