# SPDX-License-Identifier: Apache-2.0
"""What vLLM would answer 5xx to although the request is at fault. The app here breaks as vLLM does."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.unusable import add_handlers

RENDERER = "/site-packages/vllm/renderers/chat_utils.py"
ENGINE = "/site-packages/vllm/v1/engine/async_llm.py"


def raising(error: str, file: str):
    """Return a function that raises ``error`` as if it were code of ``file``."""
    names: dict = {}
    exec(compile(f"async def fail():\n    raise {error}", file, "exec"), names)
    return names["fail"]


@pytest.fixture
def get():
    """Return a function: error and file -> the answer of a route that raises it there."""

    def make(error: str, file: str):
        app = FastAPI()
        app.get("/")(raising(error, file))
        app.middleware_stack = app.build_middleware_stack()  # as vLLM leaves it
        add_handlers(app)
        return TestClient(app).get("/")

    return make


@pytest.mark.parametrize(
    "error", ["AssertionError()", "KeyError('type')", "IndexError('no content')", "AttributeError('x')"]
)
def test_a_request_of_which_no_prompt_can_be_made_gets_400_and_is_logged(get, caplog, error):
    answer = get(error, RENDERER)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unusable_content"
    assert error.partition("(")[0] in answer.json()["error"]["message"] and RENDERER in caplog.text


def test_the_same_error_elsewhere_stays_the_servers(get):
    with pytest.raises(AssertionError):
        get("AssertionError()", ENGINE)


def test_what_the_model_cannot_do_gets_400(get):
    answer = get("NotImplementedError('The model does not support this')", ENGINE)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_supported"
    assert answer.json()["error"]["message"] == "The model does not support this"
