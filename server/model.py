# SPDX-License-Identifier: Apache-2.0
"""Checks of the model argument that need neither torch nor vLLM, so that a mistake is answered at once."""

import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

from server.errors import ServerError

CHECK_GROUP = "pvq.checkpoint_checks"
"""Group of entry points, functions of one folder, that run before the engine starts and raise for a folder
that cannot be served. The name of an entry is the quant_method it is for, so this package knows none of them.
"""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_config(model: str) -> dict[str, Any] | None:
    """Return config.json of the folder ``model``; None if ``model`` may be a name on the model hub, which
    vLLM then fetches.

    Raises:
        ServerError: ``model`` is neither, or its config.json is missing, is not JSON, or names no model type.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists():
            raise ServerError(f"MODEL {model} is a file: give the folder that holds config.json")
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        if _HUB_NAME.fullmatch(model) and not offline and not folder.parent.is_dir():
            return None
        raise ServerError(
            f"MODEL {model} does not exist: give the folder of a model, with config.json, weights "
            "and tokenizer"
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ServerError(f"{path} is missing: MODEL must be a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ServerError(
            f"{path} cannot be read as JSON ({error}): fetch or write the model again"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ServerError(f"{path} names no model_type: MODEL must be a Hugging Face model folder")
    return config


def check_folder(model: str, config: dict[str, Any]) -> None:
    """Run the installed check for the quantization method in ``config``; its exception passes through."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    for entry in importlib.metadata.entry_points(group=CHECK_GROUP, name=str(method)):
        entry.load()(Path(model))


def quantization_facts(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``quantization_config`` of ``config`` in short: long tables are replaced by their number of
    entries; None if absent.
    """
    facts = config.get("quantization_config")
    if not isinstance(facts, dict):
        return None
    return {
        name: len(value) if isinstance(value, (dict, list)) and len(str(value)) > 200 else value
        for name, value in facts.items()
    }
