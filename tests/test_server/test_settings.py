# SPDX-License-Identifier: Apache-2.0
import tomllib

import pytest

from server.errors import ServerError
from server.settings import load, load_settings


@pytest.fixture
def settings_file(tmp_path):
    """Return a function: text -> path of a TOML file with it."""

    def write(text):
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return str(path)

    return write


def test_flag_wins_over_environment_over_file_over_default(monkeypatch, settings_file):
    file = settings_file('host = "127.0.0.3"\nport = 9000\nmax_waiting = 5\n')
    monkeypatch.setenv("PVQ_PORT", "9001")
    monkeypatch.setenv("PVQ_HOST", "127.0.0.2")
    loaded = load(file, port="9002", host=None)
    settings = loaded.settings
    assert (settings.port, settings.host, settings.max_waiting) == (9002, "127.0.0.2", 5)
    assert settings.health_timeout_s == 10.0
    origins = loaded.origins
    assert [origins[name] for name in ("port", "host", "max_waiting", "health_timeout_s")] == [
        "flag",
        "PVQ_HOST",
        file,
        "default",
    ]


def test_the_file_may_come_from_the_environment(monkeypatch, settings_file):
    monkeypatch.setenv("PVQ_CONFIG_FILE", settings_file("port = 9003"))
    assert load_settings().port == 9003


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    monkeypatch.setenv("PVQ_API_KEY", "")
    assert load_settings().api_key is None


def test_the_file_may_hold_flags_of_vllm(settings_file):
    table = '[vllm]\nmax-model-len = 2048\nenforce_eager = true\nenable-prefix-caching = false\nx = ["a", 1]\ny = {z = 1}'
    assert load(settings_file(table)).vllm_flags == [
        "--max-model-len=2048",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--x",
        "a",
        "1",
        '--y={"z": 1}',
    ]


def test_shown_settings_are_toml_with_origins_and_without_secrets(monkeypatch):
    monkeypatch.setenv("PVQ_API_KEY", "very secret")
    text = load(port="9004").show(["--hf-token", "hidden", "--hf-token=hidden", "--max-num-seqs", "4"])
    assert "secret" not in text and "hidden" not in text
    assert tomllib.loads(text)["port"] == 9004 and tomllib.loads(text)["api_key"] == "********"
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["port"].endswith("# flag") and lines["api_key"].endswith("# PVQ_API_KEY")
    assert lines["host"].endswith("# default") and '"--max-num-seqs", "4"' in text.splitlines()[-1]


def test_the_key_is_not_shown():
    settings = load_settings(api_key="very secret")
    assert settings.api_key.get_secret_value() == "very secret"
    assert "very secret" not in repr(settings) + str(settings.model_dump())


def test_a_bad_value_is_named_with_flag_and_variable(monkeypatch):
    monkeypatch.setenv("PVQ_DRAIN_TIMEOUT_S", "soon")
    with pytest.raises(ServerError, match=r"--drain-timeout-s .*PVQ_DRAIN_TIMEOUT_S"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 0", r"--port .* in .*serve\.toml cannot be used"),
        ("prot = 8000", r"serve\.toml: there is no setting 'prot'"),
        ("port = ", r"serve\.toml is not TOML"),
        ("vllm = 3", r"serve\.toml: vllm must be a table"),
        ('ssl_certfile = "/nosuch.pem"', r"/nosuch\.pem is no file"),
        ('on_engine_death = "panic"', r"--on-engine-death"),
    ],
)
def test_a_mistake_in_the_file_is_named(settings_file, text, message):
    with pytest.raises(ServerError, match=message):
        load(settings_file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ServerError, match=r"--config-file .*nosuch\.toml cannot be read"):
        load(str(tmp_path / "nosuch.toml"))


def test_a_key_without_a_certificate_is_refused(tmp_path):
    (tmp_path / "key.pem").write_text("x")
    with pytest.raises(ServerError, match="need --ssl-certfile"):
        load_settings(ssl_keyfile=str(tmp_path / "key.pem"))


def test_a_certificate_that_is_none_is_named_before_anything_starts(tmp_path):
    (tmp_path / "cert.pem").write_text("x")
    with pytest.raises(ServerError, match=r"--ssl-certfile.* cannot be used"):
        load_settings(ssl_certfile=str(tmp_path / "cert.pem"))


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_ports_out_of_range_are_refused(port):
    with pytest.raises(ServerError, match="--port"):
        load_settings(port=port)


def test_origins_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("PVQ_CORS_ORIGINS", "https://a.example, https://b.example")
    assert load_settings().cors_origins == ("https://a.example", "https://b.example")
