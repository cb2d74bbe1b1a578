# SPDX-License-Identifier: Apache-2.0
"""Bodies of this project's routes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Readiness(BaseModel):
    """Whether the engine can answer, and why not."""

    ready: bool
    reason: str = Field("", description="empty when ready")


class Info(BaseModel):
    """What is served."""

    model_config = ConfigDict(protected_namespaces=())

    model: str = Field(description="folder or name that the server was started with")
    served_names: list[str] = Field(description="names that requests may use")
    architectures: list[str]
    dtype: str = Field(description="type of the activations")
    max_model_len_tokens: int
    quantization: str | None = Field(
        description="vLLM's name of the quantization method; null for an unquantized model"
    )
    quantization_config: dict[str, Any] | None = Field(
        description="from config.json; of long tables only the number of entries"
    )
    weight_bytes: int | None = Field(
        description="size of the safetensors files; null if the model is no local folder"
    )
    versions: dict[str, str]
    uptime_s: float
