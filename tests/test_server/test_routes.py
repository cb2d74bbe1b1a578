# SPDX-License-Identifier: Apache-2.0
import pytest

KEY = "correct horse"


@pytest.mark.parametrize("path", ["/pvq/info", "/pvq/ready"])
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
def test_own_routes_ask_for_one_of_the_keys(app_client, path, header, status):
    headers = {"Authorization": header} if header else {}
    assert app_client([KEY, "second"]).get(path, headers=headers).status_code == status


def test_without_a_key_own_routes_are_open(app_client):
    assert app_client([]).get("/pvq/info").status_code == 200


def test_health_is_open_and_replaces_the_old_one(app_client):
    response = app_client([KEY]).get("/health")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sleeping", True, "sleeps"),
        ("paused", True, "paused"),
        ("errored", True, "RuntimeError"),
        ("delay_s", 5.0, "did not answer within 0.2 s"),
    ],
)
def test_health_is_false_when_the_engine_cannot_answer(app_client, fake_engine, name, value, reason):
    client = app_client([])
    assert client.get("/health").status_code == 200
    setattr(fake_engine, name, value)
    assert client.get("/health").status_code == 503
    response = client.get("/pvq/ready")
    assert response.status_code == 503
    assert response.json()["ready"] is False and reason in response.json()["reason"]


def test_info_tells_model_and_quantization_without_long_tables(app_client, model_folder):
    info = app_client([]).get("/pvq/info").json()
    assert info["model"] == str(model_folder) and info["served_names"] == ["demo"]
    assert info["quantization"] == "pvq" and info["dtype"] == "bfloat16"
    assert info["quantization_config"] == {"quant_method": "pvq", "codebook": {"name": "pvq4"}, "modules": 40}
    assert info["weight_bytes"] == 1000 and info["max_model_len_tokens"] == 512
    assert "torch" in info["versions"]
