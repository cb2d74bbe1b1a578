# SPDX-License-Identifier: Apache-2.0
import asyncio

import pytest

from server.routes.health import readiness
from server.state import Phase

KEY = "correct horse"


@pytest.mark.parametrize("path", ["/pvq/info", "/pvq/ready", "/v1/models"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        ("Bearer second", 200),
    ],
)
def test_routes_ask_for_one_of_the_keys(app_client, path, header, status):
    headers = {"Authorization": header} if header else {}
    assert app_client([KEY, "second"]).get(path, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/tokenize", "/docs", "/openapi.json", "/nosuch", "/v1/../tokenize"])
def test_every_other_route_asks_for_a_key_too(app_client, path):
    answer = app_client([KEY]).post(path, json={})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_probes_and_the_page_are_open(app_client, path):
    assert app_client([KEY]).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/ping", "/"])
def test_open_routes_are_open_for_reading_only(app_client, path):
    """Without a key nobody can make the server take a body in."""
    assert app_client([KEY]).post(path, content=b"x").status_code == 401


def test_without_a_key_all_routes_are_open(app_client):
    assert app_client([]).get("/pvq/info").status_code == 200


def test_health_replaces_the_old_one_and_says_alive(app_client, fake_engine):
    fake_engine.paused = True
    response = app_client([KEY]).get("/health")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("path", ["/ready", "/pvq/ready"])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sleeping", True, "sleeps"),
        ("paused", True, "paused"),
        ("errored", True, "died"),
        ("delay_s", 5.0, "did not answer within 0.2 s"),
    ],
)
def test_ready_is_false_when_the_engine_cannot_answer(app_client, fake_engine, path, name, value, reason):
    client = app_client([])
    assert client.get(path).json() == {"ready": True, "reason": ""}
    setattr(fake_engine, name, value)
    response = client.get(path)
    assert response.status_code == 503
    assert response.json()["ready"] is False and reason in response.json()["reason"]


def test_a_question_to_an_engine_that_dies_meanwhile_is_answered(fake_engine):
    async def scenario():
        fake_engine.delay_s = 60.0
        asked = asyncio.create_task(readiness(fake_engine, 60.0))
        await asyncio.sleep(0.01)
        fake_engine.errored = True
        return await asyncio.wait_for(asked, 5)

    state = asyncio.run(scenario())
    assert not state.ready and state.reason == "the engine died"


@pytest.mark.parametrize(
    ("phase", "health", "code"),
    [
        (Phase.LOADING, 200, "model_loading"),
        (Phase.DRAINING, 200, "server_draining"),
        (Phase.FAILED, 503, "engine_failed"),
    ],
)
def test_outside_ready_only_probes_are_answered(app_client, server_state, phase, health, code):
    client = app_client([])
    server_state.enter(phase)
    assert client.get("/health").status_code == health
    ready = client.get("/ready")
    assert ready.status_code == 503 and ready.json() == {"ready": False, "reason": phase.value}
    assert "pvq_server_ready 0.0" in client.get("/metrics").text
    refused = client.post("/tokenize", json={})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == code
    assert int(refused.headers["retry-after"]) >= 1 and refused.headers["connection"] == "close"


def test_a_failed_server_stays_failed(server_state):
    server_state.enter(Phase.FAILED)
    server_state.enter(Phase.DRAINING)
    assert server_state.phase is Phase.FAILED


def test_models_have_the_facts_beside_what_openai_has(app_client, model_folder):
    (card,) = app_client([]).get("/v1/models").json()["data"]
    facts = card.pop("pvq")
    assert card == {"id": "demo", "object": "model", "owned_by": "vllm", "max_model_len": 512}
    assert (facts["quantization"], facts["weight_bytes"], facts["dtype"]) == ("pvq", 1000, "bfloat16")


def test_one_model_by_its_name(app_client):
    client = app_client([])
    assert client.get("/v1/models/demo").json() == client.get("/v1/models").json()["data"][0]
    missing = client.get("/v1/models/no/such")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert app_client(["a key"]).get("/v1/models/demo").status_code == 401


def test_info_tells_model_and_quantization_without_long_tables(app_client, model_folder):
    info = app_client([]).get("/pvq/info").json()
    assert info["model"] == str(model_folder) and info["served_names"] == ["demo"]
    assert info["quantization"] == "pvq" and info["dtype"] == "bfloat16"
    assert info["quantization_config"] == {"quant_method": "pvq", "codebook": {"name": "pvq4"}, "modules": 40}
    assert info["weight_bytes"] == 1000 and info["max_model_len_tokens"] == 512
    assert "torch" in info["versions"]


def test_origins_are_allowed_only_where_they_are_named(app_client):
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in app_client([]).get("/v1/models", headers=origin).headers
    client = app_client([KEY], cors_origins="https://a.example")
    refused = client.get("/v1/models", headers=origin)
    assert refused.status_code == 401  # but the browser may read why
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    preflight = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert client.options("/v1/models", headers=preflight).status_code == 200
    assert (
        client.options("/v1/models", headers={**preflight, "Origin": "https://b.example"}).status_code == 400
    )
