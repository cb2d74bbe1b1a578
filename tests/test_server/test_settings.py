# SPDX-License-Identifier: Apache-2.0
import pytest

from server.errors import ServerError
from server.settings import load_settings


def test_flag_wins_over_environment_over_default(monkeypatch):
    monkeypatch.setenv("PVQ_PORT", "9001")
    monkeypatch.setenv("PVQ_HOST", "127.0.0.2")
    settings = load_settings(port=9002, host=None)
    assert (settings.port, settings.host, settings.health_timeout_s) == (9002, "127.0.0.2", 10.0)


def test_the_key_is_not_shown():
    settings = load_settings(api_key="very secret")
    assert settings.api_key.get_secret_value() == "very secret"
    assert "very secret" not in repr(settings) + str(settings.model_dump())


def test_a_bad_value_is_named_with_flag_and_variable(monkeypatch):
    monkeypatch.setenv("PVQ_DRAIN_TIMEOUT_S", "soon")
    with pytest.raises(ServerError, match=r"--drain-timeout-s .*PVQ_DRAIN_TIMEOUT_S"):
        load_settings()


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_ports_out_of_range_are_refused(port):
    with pytest.raises(ServerError, match="--port"):
        load_settings(port=port)
