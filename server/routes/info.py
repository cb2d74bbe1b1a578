# SPDX-License-Identifier: Apache-2.0
"""What is served: model, quantization, versions."""

import functools
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from server.dependencies import EngineDep
from server.model import quantization_facts
from server.schemas import Info

info_router = APIRouter(prefix="/pvq", tags=["pvq"])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pvq-vllm", "vllm", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _on_disk(model: str) -> tuple[dict[str, Any], int | None]:
    """Return config.json and the size of the weights; nothing and None if ``model`` is no local folder. Read once: the disk
    may be slow, and the model that is served does not change.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {}, None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def facts(model: Any) -> dict[str, Any]:
    """Return what is served, from vLLM's model configuration and the folder: fields of ``Info``."""
    config, weight_bytes = _on_disk(str(model.model))
    return {
        "quantization": model.quantization,
        "quantization_config": quantization_facts(config),
        "weight_bytes": weight_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "architectures": list(getattr(model, "architectures", None) or config.get("architectures") or []),
    }


@info_router.get("/info", response_model=Info)
def info(request: Request, engine: EngineDep) -> Info:
    """Model, quantization and versions of this server."""
    state = request.app.state
    model = engine.vllm_config.model_config
    return Info(
        model=str(model.model),
        served_names=[path.name for path in state.openai_serving_models.base_model_paths],
        max_model_len_tokens=model.max_model_len,
        versions=_versions(),
        uptime_s=round(time.monotonic() - state.server_state.started_at, 3),
        **facts(model),
    )
