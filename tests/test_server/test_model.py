# SPDX-License-Identifier: Apache-2.0
import pytest

from server import model as server_model
from server.errors import ServerError
from server.model import check_folder, quantization_facts, read_config


def test_config_of_a_folder_is_read(model_folder):
    assert read_config(str(model_folder))["model_type"] == "llama"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ServerError, match="nosuch does not exist"):
        read_config(str(tmp_path / "nosuch"))


def test_a_hub_name_is_left_to_vllm_unless_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert read_config("some-owner/some-model") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ServerError, match="some-owner/some-model"):
        read_config("some-owner/some-model")


def test_a_file_is_no_model(model_folder):
    with pytest.raises(ServerError, match="is a file"):
        read_config(str(model_folder / "config.json"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "is missing"), ("{", "as JSON"), ("[]", "model_type"), ('{"model_type": 3}', "model_type")],
)
def test_a_bad_config_is_named(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ServerError, match=f"config.json .*{complaint}"):
        read_config(str(tmp_path))


def test_an_unquantized_model_has_no_facts():
    assert quantization_facts({"model_type": "llama"}) is None


def test_the_check_of_the_quantization_method_runs_and_no_other(monkeypatch, tmp_path):
    seen = []

    class Entry:
        def __init__(self, name):
            self.name = name

        def load(self):
            return lambda folder: seen.append((self.name, folder))

    def entry_points(group, name):
        assert group == "pvq.checkpoint_checks"
        return [entry for entry in (Entry("pvq"), Entry("other")) if entry.name == name]

    monkeypatch.setattr(server_model.importlib.metadata, "entry_points", entry_points)
    check_folder(str(tmp_path), {"quantization_config": {"quant_method": "pvq"}})
    assert seen == [("pvq", tmp_path)]
    check_folder(str(tmp_path), {})
    assert seen == [("pvq", tmp_path)]
