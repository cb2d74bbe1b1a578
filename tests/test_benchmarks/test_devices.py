# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality/devices.py: it sees that answers are the same, and where they part."""

import pytest

from benchmarks.quality import devices
from benchmarks.quality.devices import Answer, parting
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint


@pytest.mark.parametrize(
    "other, place",
    [([5, 6, 7], None), ([5, 9, 7], 1), ([5, 6], 2), ([5, 6, 7, 8], 3), ([4, 6, 7], 0)],
)
def test_where_answers_part(other, place):
    one = Answer([5, 6, 7], [1.0, 1.0, 1.0], "")
    assert parting(one, Answer(other, [1.0] * len(other), "")) == place
    assert parting(Answer(other, [1.0] * len(other), ""), one) == place


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "pvq4"
    quantize_checkpoint(tiny_llama, out, Settings())
    return out


def test_a_device_agrees_with_itself(checkpoint, capsys):
    assert devices.main([str(checkpoint), "--devices", "cpu,cpu", "--tokens", "6"]) == 0
    assert "8 of 8 answers are the same token by token on cpu and cpu" in capsys.readouterr().out


class WrongOnGPU(devices.Model):
    """On a CPU in any case; "cuda" gives one wrong answer."""

    def __init__(self, folder, device, dtype, activation):
        super().__init__(folder, "cpu", dtype, activation)
        self.wrong = devices.QUESTIONS[-1] if device == "cuda" else None

    def answer(self, question, max_tokens):
        right = super().answer(question, max_tokens)
        return right._replace(token_ids=[*right.token_ids[:2], -1]) if question == self.wrong else right


def test_another_answer_is_noticed(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(devices, "Model", WrongOnGPU)
    assert devices.main([str(checkpoint), "--activation", "a16", "--tokens", "6"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "part at token 2, where the best is ahead by" in lines[-2]
    assert lines[-1] == "7 of 8 answers are the same token by token on cpu and cuda"
