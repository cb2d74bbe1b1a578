# SPDX-License-Identifier: Apache-2.0
"""What can be set for the server: by flag, by environment (PVQ_*), by a TOML file, in this order of precedence."""

import json
import os
import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from server.errors import ServerError

ENV_PREFIX = "PVQ_"
CONFIG_FILE = "config_file"
"""Name of the flag (``--config-file``) and variable (``PVQ_CONFIG_FILE``) of the TOML file."""

VLLM_TABLE = "vllm"
"""Table of the TOML file with flags of vLLM, such as ``max-model-len = 2048``."""

_SECRET_FLAGS = frozenset({"--hf-token", "--hf_token"})

_Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(BaseSettings):
    """Settings of ``pvq serve``. Everything about the model and the engine is a flag of vLLM and not repeated
    here.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str | None = Field(None, min_length=1, description="folder of the model, as the argument MODEL")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")

    api_key: SecretStr | None = Field(
        None, min_length=1, description="a key; prefer the variable or a file, other users can read flags"
    )
    api_key_file: Path | None = Field(
        None,
        description="file of keys, one a line, each with an optional name before it; read again on change",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="web origins that may call the API from a browser, separated by commas; * for all"
    )
    ssl_certfile: Path | None = Field(None, description="certificate (PEM): serve HTTPS")
    ssl_keyfile: Path | None = Field(None, description="its private key (PEM)")
    ssl_ca_certs: Path | None = Field(
        None, description="ask clients for a certificate signed by one of these"
    )

    max_waiting: int = Field(
        0, ge=0, description="sequences that may wait for the engine, beside those that run"
    )
    max_inflight_per_key: int | None = Field(None, ge=1, description="sequences of one key at a time")
    max_requests_per_minute_per_key: int | None = Field(
        None, ge=1, description="requests of one key a minute"
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="tokens of a prompt; default: what the model takes, which vLLM checks"
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="tokens of an answer; default: what the model takes, which vLLM checks"
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="bytes of a request body")
    max_connections: int = Field(2048, ge=1, description="open connections")
    header_timeout_s: _Seconds = Field(10.0, description="seconds until a request's head must have arrived")
    body_timeout_s: _Seconds = Field(60.0, description="seconds until a request's body must have arrived")
    write_timeout_s: _Seconds = Field(30.0, description="seconds a client may read nothing of its answer")
    keep_alive_timeout_s: int = Field(65, ge=1, le=3600, description="seconds an idle connection stays open")

    health_timeout_s: float = Field(
        10.0, gt=0, le=300, description="seconds within which the engine must answer to count as ready"
    )
    drain_timeout_s: int = Field(
        30, ge=0, le=3600, description="seconds that running requests get after SIGTERM or Ctrl-C"
    )
    on_engine_death: Literal["exit", "restart"] = Field(
        "exit", description="what to do when the engine dies: exit (status 1) or restart"
    )
    max_restarts: int = Field(3, ge=1, description="restarts within ten minutes before it gives up")
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines: text or json")
    access_log: bool = Field(True, description="write one line for each request")

    cpu_kv_cache_gib: int | None = Field(
        None, ge=1, description="CPU only: GiB of key-value cache; default: a quarter of free memory, 1 to 8"
    )
    cpu_threads_bind: str | None = Field(
        None, min_length=1, description="CPU only: cores to use, such as 0-3 or auto"
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    @classmethod
    def _is_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"{value} is no file that can be read")
        return value

    @model_validator(mode="after")
    def _tls_can_be_used(self) -> "Settings":
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ValueError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        if self.ssl_certfile is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=lambda: "")
                if self.ssl_ca_certs:
                    context.load_verify_locations(self.ssl_ca_certs)
            except OSError as error:  # ssl.SSLError is one
                files = "--ssl-certfile, --ssl-keyfile and --ssl-ca-certs"
                raise ValueError(
                    f"{files} cannot be used ({error}): give PEM files that fit, the key without password"
                ) from None
        return self

    @property
    def tls(self) -> dict[str, Any]:
        """Return uvicorn's arguments for TLS."""
        return {
            "ssl_certfile": self.ssl_certfile,
            "ssl_keyfile": self.ssl_keyfile,
            "ssl_ca_certs": str(self.ssl_ca_certs) if self.ssl_ca_certs else None,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.ssl_ca_certs else ssl.CERT_NONE,
        }


class Loaded:
    """Settings, where each comes from, and the flags of vLLM that the file holds.

    Attributes:
        settings: what counts.
        origins: name of a setting -> ``flag``, the variable, the file, or ``default``.
        vllm_flags: flags of vLLM from the table ``[vllm]`` of the file, to be put before those of the command.
    """

    def __init__(self, settings: Settings, origins: dict[str, str], vllm_flags: list[str]) -> None:
        self.settings, self.origins, self.vllm_flags = settings, origins, vllm_flags

    def show(self, vllm_flags: list[str]) -> str:
        """Return all settings as TOML, one a line with its origin, secrets masked."""
        values = self.settings.model_dump(mode="json")
        rows = []
        for name, origin in self.origins.items():
            value = "********" if getattr(self.settings, name) and name == "api_key" else values[name]
            # JSON's strings, numbers, booleans and lists are TOML's; null has no form there.
            text = f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}"
            rows.append((text, origin))
        width = max(len(text) for text, _ in rows)
        lines = [f"{text:<{width}}  # {origin}" for text, origin in rows]
        return "\n".join([*lines, f"# flags of vLLM: {json.dumps(_masked(vllm_flags))}"])


def _masked(flags: list[str]) -> list[str]:
    """Return ``flags`` of vLLM without the values of secret ones."""
    shown: list[str] = []
    secret = False
    for flag in flags:
        name, equals, _ = flag.partition("=")
        shown.append(
            "********" if secret else f"{name}=********" if equals and name in _SECRET_FLAGS else flag
        )
        secret = flag in _SECRET_FLAGS
    return shown


def _vllm_flags(table: Any, file: Path) -> list[str]:
    """Return the flags that the table ``[vllm]`` stands for."""
    if not isinstance(table, dict):
        raise ServerError(f"{file}: {VLLM_TABLE} must be a table of vLLM's flags, [{VLLM_TABLE}]")
    flags = []
    for name, value in table.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [flag, *(str(item) for item in value)]
        else:
            flags.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServerError(
            f"--config-file {path} cannot be read ({error.strerror}): give a TOML file"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ServerError(f"--config-file {path} is not TOML ({error}): correct it") from None


def load(config_file: str | None = None, **flags: object) -> Loaded:
    """Return the settings from ``flags`` (None: not given) over the environment over the file over the defaults.

    Args:
        config_file: TOML file; None: the one that PVQ_CONFIG_FILE names, if any.
    Raises:
        ServerError: a value is out of its range, or the file has an unknown setting; the sentence names it.
    """
    file = config_file or os.environ.get(ENV_PREFIX + CONFIG_FILE.upper())
    in_file = _read_file(Path(file)) if file else {}
    vllm_flags = _vllm_flags(in_file.pop(VLLM_TABLE, {}), Path(file or ""))
    for name in in_file:
        if name not in Settings.model_fields:
            raise ServerError(f"{file}: there is no setting {name!r}: pvq serve --show-config lists all")
    given = {name: value for name, value in flags.items() if value is not None}
    variables = EnvSettingsSource(Settings)()
    origins = {name: "default" for name in Settings.model_fields}
    origins |= {name: str(file) for name in in_file}
    origins |= {name: ENV_PREFIX + name.upper() for name in variables}
    origins |= {name: "flag" for name in given}
    try:
        settings = Settings(**{**in_file, **variables, **given})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ServerError(f"{reason}: change the settings") from None
        name = str(first["loc"][0])
        flag = "--" + name.replace("_", "-")
        place = f" in {origins[name]}" if origins.get(name) == str(file) and file else ""
        raise ServerError(f"{flag} (or {ENV_PREFIX}{name.upper()}){place} cannot be used: {reason}") from None
    return Loaded(settings, origins, vllm_flags)


def load_settings(**flags: object) -> Settings:
    """Return ``load(**flags).settings``."""
    return load(**flags).settings  # type: ignore[arg-type]
