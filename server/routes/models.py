# SPDX-License-Identifier: Apache-2.0
"""/v1/models: as OpenAI and vLLM have it, and what the weights are."""

from typing import Any

from fastapi import APIRouter, Request

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
