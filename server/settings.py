# SPDX-License-Identifier: Apache-2.0
"""What can be set for the server: environment variables PVQ_*, each overridden by the flag of the same
name.
"""

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import ServerError

ENV_PREFIX = "PVQ_"


class Settings(BaseSettings):
    """Settings of ``pvq serve``. Everything about the model and the engine is a flag of vLLM and not repeated
    here.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")
    api_key: SecretStr | None = Field(
        None, min_length=1, description="key that /v1 and /pvq ask for; none: open to all who can connect"
    )
    health_timeout_s: float = Field(
        10.0, gt=0, le=300, description="seconds within which the engine must answer to count as healthy"
    )
    drain_timeout_s: int = Field(
        10, ge=0, le=3600, description="seconds that running requests get after SIGTERM or Ctrl-C"
    )
    cpu_kv_cache_gib: int | None = Field(
        None, ge=1, description="CPU only: GiB of key-value cache (VLLM_CPU_KVCACHE_SPACE)"
    )
    cpu_threads_bind: str | None = Field(
        None, min_length=1, description="CPU only: cores to use (VLLM_CPU_OMP_THREADS_BIND)"
    )


def load_settings(**flags: object) -> Settings:
    """Return the settings from ``flags`` (None: not given) over the environment over the defaults.

    Raises:
        ServerError: a value is out of its range; the sentence names the flag and the variable.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        flag = "--" + name.replace("_", "-")
        raise ServerError(f"{flag} (or {ENV_PREFIX}{name.upper()}) cannot be used: {first['msg']}") from None
