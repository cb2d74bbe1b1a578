# SPDX-License-Identifier: Apache-2.0
"""Requests that vLLM takes for good and then breaks on, with an answer of 5xx for what the client did wrong. Here they
get 400 and a reason.

``check`` knows them by their JSON, before vLLM sees it; ``add_handlers`` by what vLLM raises. Found by
schemathesis and benchmarks/soak with vLLM 0.32.
"""

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from server.asgi import Refused, error_body
from server.prompts import whole_number

logger = logging.getLogger("pvq.server")

_INT64_MAX = 2**63 - 1
_PROMPT_MAKERS = (
    "/vllm/renderers/",
    "/vllm/entrypoints/chat_utils.py",
    "/vllm/entrypoints/openai/responses/utils.py",
)
"""Where vLLM makes a prompt of a request, before its engine has a part in it."""


def check(request: Any) -> None:
    """Raise Refused if vLLM would break on the JSON value ``request``."""
    if not isinstance(request, dict):
        return
    constraint = request.get("structured_outputs")
    if constraint is not None and not isinstance(constraint, dict):
        raise Refused(400, "invalid_type", "structured_outputs must be an object", "structured_outputs")
    # A number as text is a number to vLLM; that one only is passed on however large, and then breaks its messages.
    if abs(whole_number(request.get("top_k"), 0)) > _INT64_MAX:
        raise Refused(400, "invalid_value", "top_k does not fit in 64 bits", "top_k")


async def _not_offered(request: Request, error: Exception) -> Response:
    return _answer("not_supported", str(error) or f"{request.url.path} is not offered for this request")


async def _no_prompt(request: Request, error: Exception) -> Response:
    """Answer 400 if vLLM failed while it made the prompt; else leave the error to vLLM's own handler."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not any(place in file for file in files for place in _PROMPT_MAKERS):
        raise error
    logger.warning("no prompt can be made of a request to %s", request.url.path, exc_info=error)
    detail = f": {error}" if str(error) else ""
    return _answer(
        "unusable_content", f"no prompt can be made of this request ({type(error).__name__}{detail})"
    )


def _answer(code: str, message: str) -> Response:
    return Response(error_body(400, message, code), 400, media_type="application/json")


def add_handlers(app: FastAPI) -> None:
    """Let vLLM's ``app`` answer 400 where a request asks for what the served model cannot do, and where its content
    cannot be made into a prompt.
    """
    app.add_exception_handler(NotImplementedError, _not_offered)
    for kind in (AssertionError, AttributeError, LookupError):
        app.add_exception_handler(kind, _no_prompt)
    app.middleware_stack = None  # vLLM has built it already, without these; Starlette builds it again
