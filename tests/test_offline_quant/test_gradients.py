# SPDX-License-Identifier: Apache-2.0
"""Squares of gradients against autograd on the whole model, and the weights of tokens that follow from them."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PhiConfig, PhiForCausalLM

from offline_quant import calibration, gradients
from offline_quant.calibration import LayerwiseForward
from offline_quant.calibration_data import calibration_tokens
from offline_quant.gradients import OutputGradients, output_gradients
from offline_quant.hessian import HessianSum
from offline_quant.model_source import ModelSource
from offline_quant.part_worker import PartWorker
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError

LEADERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@pytest.fixture(autouse=True)
def small_batches_in_float32(monkeypatch):
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 128)
    monkeypatch.setattr(calibration, "forward_dtype", lambda device="cpu": torch.float32)
    monkeypatch.setattr(gradients, "LOGIT_TOKENS", 48)
    monkeypatch.setattr(gradients, "CACHED", 10000)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("stored_bytes", [1, 1 << 30])  # a slice for each batch, and all layers in memory
def test_squares_equal_those_of_the_whole_model(tiny_model_folder, monkeypatch, name, stored_bytes):
    source = ModelSource.open(tiny_model_folder(name))
    ids = calibration_tokens(source.folder, "builtin", 5, 64)
    monkeypatch.setattr(gradients, "STORED_BYTES", stored_bytes)
    # The labels are drawn; here the most likely ones, so that both sides have the same.
    monkeypatch.setattr(gradients, "_draw", lambda p, generator: p.argmax(dim=-1, keepdim=True))
    found = output_gradients(source, ids, 0, "cpu")

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    outputs: dict[str, torch.Tensor] = {}
    tokens: dict[str, torch.Tensor] = {}

    def record(key: str):
        parent, _, leaf = key.rpartition(".")
        leader = f"{parent}.{LEADERS.get(leaf, leaf)}"

        def keep(g: torch.Tensor) -> None:
            outputs[key] = g.square().mean(dim=(0, 1))
            tokens[leader] = tokens.get(leader, 0) + g.square().mean(dim=2).flatten()

        return lambda _module, _inputs, output: output.register_hook(keep) and None

    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in module_name:
            module.register_forward_hook(record(module_name))
    log_p = model(ids).logits.log_softmax(-1)
    (-log_p.max(dim=-1).values.sum()).backward()
    assert set(found.outputs) == set(outputs) and len(outputs) == 14
    assert set(found.tokens) == set(outputs) and len(tokens) == 8
    for key in outputs:
        torch.testing.assert_close(found.outputs[key], outputs[key], rtol=1e-3, atol=1e-9)
    for key in found.tokens:
        parent, _, leaf = key.rpartition(".")
        expected = tokens[f"{parent}.{LEADERS.get(leaf, leaf)}"]
        torch.testing.assert_close(found.tokens[key], expected, rtol=1e-3, atol=1e-9)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_how_much_is_in_memory_does_not_change_a_bit(tiny_model_folder, monkeypatch, name):
    source = ModelSource.open(tiny_model_folder(name))
    ids = calibration_tokens(source.folder, "builtin", 5, 64)
    found = []
    for stored_bytes, way in ((1 << 30, "_backward_in_memory"), (1 << 30, "_backward"), (1, "_backward")):
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "STORED_BYTES", stored_bytes)
            if way == "_backward":
                patch.setattr(gradients, "_backward_in_memory", gradients._backward)
            else:
                patch.delattr(gradients, "_backward")
            found.append(output_gradients(source, ids, 3, "cpu").to_tensors())
    assert len(found[0]) == 22
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in found[0].items())


def test_drawn_labels_follow_the_seed(tiny_llama):
    source = ModelSource.open(tiny_llama)
    ids = calibration_tokens(tiny_llama, "builtin", 2, 64)
    first, again, other = (output_gradients(source, ids, seed, "cpu").outputs for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


@pytest.mark.parametrize("block", [2, 4, 7, 256])
def test_labels_are_drawn_by_their_probabilities(monkeypatch, block):
    monkeypatch.setattr(gradients, "DRAW_BLOCK", block)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0, 0.0])
    drawn = gradients._draw(probabilities.expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    found = torch.bincount(drawn[:, 0], minlength=7) / 20000
    assert (found[probabilities == 0] == 0).all()
    torch.testing.assert_close(found, probabilities, rtol=0, atol=0.02)


def test_a_number_at_the_end_of_the_sums_draws_nothing_impossible():
    cumulated = torch.tensor([[0.25, 1.0, 1.0], [0.0, 0.0, 0.5]])
    assert gradients._first_above(cumulated, torch.tensor([[1.0], [0.75]])).tolist() == [[1], [2]]
    assert gradients._first_above(cumulated, torch.tensor([[0.25], [0.0]])).tolist() == [[1], [2]]


def test_what_is_stored_comes_back():
    before = OutputGradients({"a.b": torch.rand(3)}, {"a.b": torch.rand(5), "c": torch.rand(5)})
    after = OutputGradients.from_tensors(before.to_tensors())
    assert after.outputs.keys() == before.outputs.keys() and after.tokens.keys() == before.tokens.keys()
    assert torch.equal(after.outputs["a.b"], before.outputs["a.b"])
    assert torch.equal(after.tokens["c"], before.tokens["c"])


def test_a_tensor_of_several_layers_is_stored_and_weighed_once(tiny_llama):
    source = ModelSource.open(tiny_llama)
    ids = calibration_tokens(tiny_llama, "builtin", 2, 64)
    before = output_gradients(source, ids, 0, "cpu")
    stored = before.to_tensors()
    assert len([key for key in stored if key.startswith("tokens/")]) == 8 and len(before.tokens) == 14
    after = OutputGradients.from_tensors(stored)
    assert after.tokens.keys() == before.tokens.keys()
    for found in (after.tokens, after.token_weights()):
        assert len(found) == 14 and len({id(tensor) for tensor in found.values()}) == 8
        q, k, v = (found[f"model.layers.1.self_attn.{one}_proj"] for one in "qkv")
        assert q is k is v
        assert found["model.layers.1.mlp.gate_proj"] is found["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("rate", [{}, {"target_bpw": 3.0}])
def test_no_more_than_the_weights_of_layers_to_come_stay_in_memory(tiny_llama, tmp_path, monkeypatch, rate):
    left = []
    make = PartWorker.make

    def watched(worker: PartWorker, index: int, progress) -> None:
        make(worker, index, progress)
        if worker.parts[index].layer is not None:
            left.append({int(name.split(".")[2]) for name in worker._weights})
            assert not any(type(one) is OutputGradients for one in gc.get_objects())

    monkeypatch.setattr(PartWorker, "make", watched)
    settings = Settings(calibration="builtin", calibration_sequences=2, calibration_length=32, **rate)
    quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    assert left == [{1}, set()]


def test_learned_positions_need_only_reach_over_a_sequence(tmp_path, monkeypatch):
    config = OPTConfig(
        vocab_size=512,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = ModelSource.open(tmp_path)
    ids = torch.arange(3 * 48).reshape(3, 48)
    monkeypatch.setattr(gradients, "_draw", lambda p, generator: p.argmax(dim=-1, keepdim=True))
    parts = output_gradients(source, ids, 0, "cpu")
    monkeypatch.setattr(gradients, "LOGIT_TOKENS", 512)  # two sequences of a batch at once
    whole = output_gradients(source, ids, 0, "cpu")
    assert len(whole.outputs) == 6
    for name in whole.outputs:
        torch.testing.assert_close(whole.outputs[name], parts.outputs[name], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(whole.tokens[name], parts.tokens[name], rtol=1e-4, atol=1e-9)


def test_weights_are_roots_of_mean_one():
    squares = torch.tensor([0.0, 1.0, 4.0, 25.0])
    weights = OutputGradients(tokens={"a": squares, "silent": torch.zeros(4)}).token_weights()
    assert set(weights) == {"a"}  # where nothing matters, all tokens count alike
    torch.testing.assert_close(weights["a"], torch.tensor([0.0, 0.5, 1.0, 2.5]))


def test_gradients_that_overflow_are_an_error():
    with pytest.raises(PVQError, match="--token-weights uniform"):
        OutputGradients(tokens={"a": torch.tensor([1.0, torch.inf])}).token_weights()


def test_hessian_counts_tokens_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 16, generator=generator), torch.rand(6, generator=generator)
    total = HessianSum(16)
    total.add(x[:4].reshape(2, 2, 16), weights[:4])
    total.add(x[4:], weights[4:])
    torch.testing.assert_close(total.mean(), (x.T * weights) @ x / 6)


def test_every_batch_gets_its_own_weights(tiny_llama):
    """A weight of zero for all tokens but those of one sequence leaves the Hessian of this sequence."""
    source = ModelSource.open(tiny_llama)
    ids = calibration_tokens(tiny_llama, "builtin", 5, 64)
    name = "model.layers.0.self_attn.q_proj"
    weights = torch.zeros(5, 64)
    weights[3] = 5
    with (forward := LayerwiseForward(source, ids)).loaded(0):
        weighted = forward.collect(0, source.linear_names(0), {name: weights.flatten()})
        plain = forward.collect(0, source.linear_names(0))
    with (forward := LayerwiseForward(source, ids[3:4])).loaded(0):
        alone = forward.collect(0, source.linear_names(0))
    torch.testing.assert_close(weighted[name].mean(), alone[name].mean(), rtol=1e-4, atol=1e-5)
    assert weighted["model.layers.0.self_attn.v_proj"] is weighted[name]
    other = "model.layers.0.mlp.down_proj"
    assert torch.equal(weighted[other].total, plain[other].total)


def test_a_head_with_a_bias_is_loaded_whole(tmp_path, tiny_llama):
    config = PhiConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config).bfloat16()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    source = ModelSource.open(tmp_path)
    ids = torch.arange(20).reshape(2, 10)
    forward = LayerwiseForward(source, ids)
    with forward.loaded(0):
        forward.advance(0)
    with forward.head_loaded():
        found = forward.logits(forward.hidden[0])
    torch.testing.assert_close(found, model.float()(ids).logits, rtol=1e-3, atol=1e-3)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert output_gradients(source, ids, 0, "cpu").tokens


def test_a_module_that_is_not_quantized_leaves_the_weights_of_its_neighbours(tiny_llama):
    source = ModelSource.open(tiny_llama)
    ids = calibration_tokens(tiny_llama, "builtin", 2, 64)
    weights = output_gradients(source, ids, 0, "cpu").token_weights()
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
    with (forward := LayerwiseForward(source, ids)).loaded(0):
        alone = forward.collect(0, names[:1], weights)[names[0]].total
        both = forward.collect(0, names, weights)[names[0]].total
    assert torch.equal(alone, both)
