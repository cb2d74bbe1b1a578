# SPDX-License-Identifier: Apache-2.0
"""The flags of ``pvq serve``, made from the settings, so that each is described once."""

import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from server.settings import CONFIG_FILE, ENV_PREFIX, Settings

_METAVARS = {int: "N", float: "SECONDS"}


def _parameter(name: str, kind: type, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _option(name: str) -> inspect.Parameter:
    """Return the flag of the setting ``name``; values stay strings, the settings check them."""
    field = Settings.model_fields[name]
    origin = f"{ENV_PREFIX}{name.upper()}"
    if field.default not in (None, ()):
        origin += f", default {field.default}"
    text = f"{field.description}.  [{origin}]"
    if field.annotation is bool:
        return _parameter(name, bool | None, typer.Option(help=text))
    kinds = set(typing.get_args(field.annotation) or (field.annotation,))
    metavar = next((mark for kind, mark in _METAVARS.items() if kind in kinds), "TEXT")
    return _parameter(name, str | None, typer.Option(metavar=metavar, help=text))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` a flag for each setting but ``model``, and ``--config-file``; it receives them as keywords.

    The keywords that ``command`` names itself stay as they are; its ``**`` parameter takes the others.
    """
    signature = inspect.signature(command)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    file = typer.Option(metavar="FILE", help=f"TOML file of settings.  [{ENV_PREFIX}{CONFIG_FILE.upper()}]")
    options = [_parameter(CONFIG_FILE, str | None, file)]
    options += [_option(name) for name in Settings.model_fields if name != "model"]
    parameters = [*own, *options]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
