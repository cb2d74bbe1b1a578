# SPDX-License-Identifier: Apache-2.0
"""The layer-by-layer forward pass equals the model's own, shares Hessians and keeps one layer in memory."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    OPTConfig,
)

from offline_quant import calibration
from offline_quant.calibration import LayerwiseForward
from offline_quant.calibration_data import calibration_tokens
from offline_quant.model_source import ModelSource


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 128)  # five sequences of 64: batches of 2, 2 and 1


def tokens_of(source: ModelSource) -> torch.Tensor:
    return calibration_tokens(source.folder, "builtin", 5, 64)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_hidden_states_and_hessians_equal_those_of_the_whole_model(tiny_model_folder, name):
    source = ModelSource.open(tiny_model_folder(name))
    ids = tokens_of(source)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, key=module_name: inputs.__setitem__(key, args[0])
            )
    with torch.inference_mode():
        model(ids)

    forward = LayerwiseForward(source, ids, torch.float32)
    assert [len(hidden) for hidden in forward.hidden] == [2, 2, 1]
    for layer in range(2):
        names = source.linear_names(layer)
        with forward.loaded(layer):
            sums = forward.collect(layer, names)
            forward.advance(layer)
        for linear, total in sums.items():
            x = inputs[linear].flatten(0, 1)
            assert total.num_tokens == 320
            torch.testing.assert_close(total.mean(), x.T @ x / 320, rtol=1e-3, atol=1e-3)
    head = inputs["lm_head"].flatten(0, 1)
    torch.testing.assert_close(forward.collect_head().mean(), head.T @ head / 320, rtol=1e-3, atol=1e-3)


def test_linears_that_read_the_same_tensor_share_one_hessian(tiny_llama):
    source = ModelSource.open(tiny_llama)
    forward = LayerwiseForward(source, tokens_of(source))
    with forward.loaded(0):
        sums = forward.collect(0, source.linear_names(0))
    by_name = {name.rpartition(".")[2]: total for name, total in sums.items()}
    assert by_name["q_proj"] is by_name["k_proj"] is by_name["v_proj"]
    assert by_name["gate_proj"] is by_name["up_proj"]
    assert len({id(total) for total in by_name.values()}) == 4


def test_only_one_layer_has_weights_at_any_time(tiny_llama):
    source = ModelSource.open(tiny_llama)

    def real_parameters() -> set[str]:
        return {name for name, parameter in source.skeleton.named_parameters() if not parameter.is_meta}

    forward = LayerwiseForward(source, tokens_of(source))
    assert real_parameters() == set()
    for layer in range(2):
        with forward.loaded(layer):
            assert {name.split(".")[2] for name in real_parameters()} == {str(layer)}
            forward.advance(layer)
        assert real_parameters() == set()


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        BloomConfig(vocab_size=512, hidden_size=64, n_layer=1, n_head=4),
        GPTJConfig(vocab_size=512, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=48),
        GPTNeoConfig(
            vocab_size=512,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        OPTConfig(
            vocab_size=512,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_decoders_may_take_the_result_of_a_layer_or_the_first_of_a_tuple(tmp_path, config):
    """[0] of a bare tensor is its first sequence: an error at best, with a single layer wrong logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path)
    source = ModelSource.open(tmp_path)
    ids = torch.arange(3 * 48).reshape(3, 48)
    forward = LayerwiseForward(source, ids, torch.float32)
    for layer in range(len(source.layers)):
        with forward.loaded(layer):
            forward.advance(layer)
    with forward.head_loaded():
        found = torch.cat([forward.logits(hidden) for hidden in forward.hidden])
    with torch.inference_mode():
        expected = model.float()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert forward.collect_head().num_tokens == 144


def test_collecting_ends_a_pass_after_the_last_linear_but_not_the_first_pass(tiny_llama):
    """What lies behind the last linear's input is computed once, to learn which linear is the last."""
    source = ModelSource.open(tiny_llama)
    tokens = torch.arange(16 * 1024).reshape(16, 1024) % 512
    forward = LayerwiseForward(source, tokens)
    assert len(forward.hidden) > 1
    outputs = []
    with forward.loaded(0) as module:
        handle = module.register_forward_hook(lambda *_: outputs.append(1))
        sums = forward.collect(0, source.linear_names(0))
        handle.remove()
    assert len(outputs) == 1
    assert {total.num_tokens for total in sums.values()} == {tokens.numel()}
