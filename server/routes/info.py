# SPDX-License-Identifier: Apache-2.0
"""What is served: model, quantization, versions."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path

from fastapi import APIRouter, Request

from server.dependencies import ApiKeyDep, EngineDep
from server.model import quantization_facts
from server.schemas import Info

info_router = APIRouter(prefix="/pvq", dependencies=[ApiKeyDep], tags=["pvq"])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pvq-vllm", "vllm", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@info_router.get("/info", response_model=Info)
async def info(request: Request, engine: EngineDep) -> Info:
    """Model, quantization and versions of this server."""
    state = request.app.state
    model = engine.vllm_config.model_config
    folder = Path(model.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder.is_dir() else {}
    return Info(
        model=str(model.model),
        served_names=[path.name for path in state.openai_serving_models.base_model_paths],
        architectures=list(getattr(model, "architectures", None) or config.get("architectures") or []),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len_tokens=model.max_model_len,
        quantization=model.quantization,
        quantization_config=quantization_facts(config),
        weight_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if folder.is_dir()
        else None,
        versions=_versions(),
        uptime_s=round(time.monotonic() - state.started_at, 3),
    )
