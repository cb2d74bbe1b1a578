# SPDX-License-Identifier: Apache-2.0
"""Which bytes of the checkpoint reach which rank: vLLM's real layers, with the number of ranks made up.

Every expected value is a slice of the checkpoint's own tensors, written out here by hand.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_vocabulary

from pvq_vllm import cuda_ops, ops, quantizer_ops
from pvq_vllm.canonical_ops import decode_canonical, encode_canonical
from pvq_vllm.codec import reference
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import Codebook, ModuleSpec
from pvq_vllm.codec.rotation import Rotation
from pvq_vllm.config import PVQConfig

HEAD, HIDDEN = 16, 64
RATES = {"pvq2": 2, "pvq3": 3, "pvq4": 4, "int8": 8}


@pytest.fixture
def ranks(monkeypatch):
    """Return a function that makes vLLM's layers believe they are rank ``rank`` of ``size``."""

    def pretend(rank: int, size: int) -> None:
        for module in (vllm_linear, vllm_vocabulary):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        from vllm.model_executor import parameter

        monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: size)

    return pretend


def make_config(codebooks: dict[str, str], rotation_blocks: int = 1, activation: str = "a8") -> PVQConfig:
    """Return a config that lists the modules of ``codebooks`` (name -> codebook)."""
    modules = {n: {"rotation_blocks": rotation_blocks, "codebook": {"name": c}} for n, c in codebooks.items()}
    factors = {"64": [64], "32": [32]}
    return PVQConfig.from_config(
        {
            "quant_method": "pvq",
            "format_version": 1,
            "activation": activation,
            "codebook": {"name": "pvq4"},
            "rotation": {"seed": 3, "factors": factors},
            "modules": modules,
        }
    )


def random_tensors(codebook: str, rows: int, columns: int = HIDDEN) -> dict[str, torch.Tensor]:
    """Return weight_packed and weight_scale of one module; bytes need not be valid codes to be moved."""
    packed = torch.randint(0, 256, (rows, columns // 8, RATES[codebook]), dtype=torch.uint8)
    return {"weight_packed": packed, "weight_scale": torch.rand(rows).half()}


def load(layer, tensors: dict[str, torch.Tensor], shard_id=None) -> None:
    """Load as vLLM does: one tensor at a time, through the parameter's own loader."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *(() if shard_id is None else (shard_id,)))


def codes(layer, index: int) -> torch.Tensor:
    return layer.pvq_weights.codes(layer.weight_packed, index)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_at_three_rates_with_fewer_key_heads_than_ranks(ranks, size):
    """4 query heads and 2 key-value heads: on 4 ranks, two ranks load the same key-value head."""
    parts = {"q": ("pvq4", 4), "k": ("int8", 2), "v": ("pvq2", 2)}
    tensors = {x: random_tensors(codebook, heads * HEAD) for x, (codebook, heads) in parts.items()}
    for rank in range(size):
        ranks(rank, size)
        config = make_config({f"attn.{x}_proj": codebook for x, (codebook, _) in parts.items()})
        layer = vllm_linear.QKVParallelLinear(
            HIDDEN, HEAD, 4, 2, bias=False, quant_config=config, prefix="attn.qkv_proj"
        )
        for x in ("v", "q", "k"):  # the order of the files does not matter
            load(layer, tensors[x], x)
        row = 0
        for index, x in enumerate("qkv"):
            heads = parts[x][1]
            first = rank * heads * HEAD // size if heads >= size else rank // (size // heads) * HEAD
            rows = slice(first, first + max(heads // size, 1) * HEAD)
            expected = tensors[x]["weight_packed"][rows]
            assert torch.equal(codes(layer, index).view(torch.uint8).flatten(1), expected.flatten(1))
            assert torch.equal(
                layer.weight_scale[row : row + len(expected)], tensors[x]["weight_scale"][rows]
            )
            row += len(expected)
        assert row == layer.pvq_weights.out_features == layer.output_size_per_partition


@pytest.mark.parametrize("rank", [0, 1])
def test_merged_columns_are_split_each_on_its_own(ranks, rank):
    ranks(rank, 2)
    config = make_config({"mlp.gate_proj": "pvq3", "mlp.up_proj": "pvq4"})
    layer = vllm_linear.MergedColumnParallelLinear(
        HIDDEN, [48, 48], bias=False, quant_config=config, prefix="mlp.gate_up_proj"
    )
    tensors = [random_tensors("pvq3", 48), random_tensors("pvq4", 48)]
    for index, one in enumerate(tensors):
        load(layer, one, index)
    for index, one in enumerate(tensors):
        assert torch.equal(codes(layer, index), one["weight_packed"][rank * 24 : rank * 24 + 24])
    expected = torch.cat([one["weight_scale"][rank * 24 : rank * 24 + 24] for one in tensors])
    assert torch.equal(layer.weight_scale, expected)


def test_layer_that_the_checkpoint_stores_fused_is_split(ranks):
    """As in Phi-3: one tensor of q, k and v together, no shard id."""
    ranks(1, 2)
    config = make_config({"attn.qkv_proj": "pvq4"})
    layer = vllm_linear.QKVParallelLinear(
        HIDDEN, HEAD, 4, 2, bias=False, quant_config=config, prefix="attn.qkv_proj"
    )
    whole = random_tensors("pvq4", 8 * HEAD)
    load(layer, whole)
    rows = [*range(32, 64), *range(80, 96), *range(112, 128)]  # second halves of q, k and v
    assert torch.equal(torch.cat([codes(layer, i) for i in range(3)]), whole["weight_packed"][rows])
    assert torch.equal(layer.weight_scale, whole["weight_scale"][rows])


@pytest.mark.parametrize("codebook", ["pvq3", "int8"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("blocks", [2, 0])  # 0: not rotated, or offline
def test_row_parallel_takes_columns_and_its_own_rotation_blocks(ranks, blocks, rank, codebook):
    ranks(rank, 2)
    config = make_config({"mlp.down_proj": codebook}, rotation_blocks=blocks)
    layer = vllm_linear.RowParallelLinear(HIDDEN, 40, bias=False, quant_config=config, prefix="mlp.down_proj")
    whole = random_tensors(codebook, 40)
    load(layer, whole)
    expected = whole["weight_packed"][:, rank * 4 : rank * 4 + 4]
    assert torch.equal(codes(layer, 0).view(torch.uint8).flatten(1), expected.flatten(1))
    assert torch.equal(layer.weight_scale, whole["weight_scale"])
    assert layer.pvq_blocks == blocks // 2 and layer.pvq_weights.source_column == rank * 32


def test_one_rotation_over_two_ranks_is_refused_with_the_remedy(ranks):
    ranks(0, 2)
    with pytest.raises(PVQError, match=r"mlp\.down_proj .*--tensor-parallel 2"):
        vllm_linear.RowParallelLinear(
            HIDDEN,
            40,
            bias=False,
            quant_config=make_config({"mlp.down_proj": "pvq4"}),
            prefix="mlp.down_proj",
        )


def test_rotation_of_an_unknown_width_is_refused(ranks):
    ranks(0, 1)
    config = make_config({"x": "pvq4"}, rotation_blocks=4)  # blocks of 16
    with pytest.raises(PVQError, match=r"lacks the width of x, 64 / 4"):
        vllm_linear.ReplicatedLinear(HIDDEN, 24, bias=False, quant_config=config, prefix="x")


@pytest.mark.parametrize("rank", [0, 1])
def test_vocabulary_padding_has_scale_zero(ranks, rank):
    """100 words, padded to 128: the second of two ranks has 36 words and 28 rows of padding."""
    ranks(rank, 2)
    head = vllm_vocabulary.ParallelLMHead(
        100, HIDDEN, quant_config=make_config({"lm_head": "pvq4"}), prefix="lm_head"
    )
    whole = random_tensors("pvq4", 100)
    load(head, whole)
    words = 64 if rank == 0 else 36
    assert torch.equal(codes(head, 0)[:words], whole["weight_packed"][rank * 64 : rank * 64 + words])
    assert torch.equal(head.weight_scale[:words], whole["weight_scale"][rank * 64 : rank * 64 + words])
    assert not codes(head, 0)[words:].any() and not head.weight_scale[words:].any()


@pytest.fixture
def replicated(ranks):
    ranks(0, 1)
    return vllm_linear.ReplicatedLinear(
        HIDDEN, 24, bias=False, quant_config=make_config({"x": "pvq4"}), prefix="x"
    )


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("weight_packed", torch.zeros(24, 8, 4, dtype=torch.int8)),  # copy_ would cast it
        ("weight_packed", torch.zeros(24, 8, 1, dtype=torch.uint8)),  # copy_ would broadcast it
        ("weight_scale", torch.zeros(24, dtype=torch.bfloat16)),
        ("weight_scale", torch.zeros(1, dtype=torch.float16)),
    ],
)
def test_wrong_dtype_or_shape_is_refused_and_the_tensor_named(replicated, name, tensor):
    with pytest.raises(PVQError, match=rf"x\.{name} is "):
        load(replicated, {name: tensor})


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale"])
def test_missing_tensor_is_found_after_loading(replicated, missing):
    tensors = random_tensors("pvq4", 24)
    del tensors[missing]
    load(replicated, tensors)
    with pytest.raises(PVQError, match=rf"x\.{missing} is missing"):
        replicated.quant_method.process_weights_after_loading(replicated)


def test_nothing_loaded_at_all_is_found(replicated):
    with pytest.raises(PVQError, match=r"x\.weight_packed is missing"):
        replicated.quant_method.process_weights_after_loading(replicated)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_unusable_scale_is_refused(replicated, value):
    tensors = random_tensors("pvq4", 24)
    tensors["weight_scale"][5] = value
    load(replicated, tensors)
    with pytest.raises(PVQError, match=r"x\.weight_scale has a value"):
        replicated.quant_method.process_weights_after_loading(replicated)


def valid_tensors(codebook: str, rows: int, columns: int = HIDDEN) -> dict[str, torch.Tensor]:
    """Return weight_packed and weight_scale of random weights, rotated or not: any codes will do."""
    weight = torch.randn(rows, columns)
    scale = quantizer_ops.search_row_scale(weight, codebook)
    packed = quantizer_ops.quantize_rows(weight, codebook, scale)[0]
    return {"weight_packed": packed, "weight_scale": scale.half()}


def finish(layer) -> None:
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"pvq_weight", "pvq_row_scale", "pvq_row_sum"}


def test_ranks_of_a_column_split_compute_the_columns_of_one(ranks):
    parts = {
        "q": valid_tensors("pvq4", 4 * HEAD),
        "k": valid_tensors("pvq2", 2 * HEAD),
        "v": valid_tensors("int8", 2 * HEAD),
    }
    x = torch.randn(3, HIDDEN)

    def outputs(rank: int, size: int) -> list[torch.Tensor]:
        ranks(rank, size)
        config = make_config({"a.q_proj": "pvq4", "a.k_proj": "pvq2", "a.v_proj": "int8"})
        layer = vllm_linear.QKVParallelLinear(
            HIDDEN, HEAD, 4, 2, bias=False, quant_config=config, prefix="a.qkv_proj"
        )
        for shard_id, tensors in parts.items():
            load(layer, tensors, shard_id)
        sizes = layer.output_partition_sizes
        finish(layer)
        return layer.quant_method.apply(layer, x).split(sizes, dim=1)

    (q0, k0, v0), (q1, k1, v1) = outputs(0, 2), outputs(1, 2)
    split = [torch.cat(pair, 1) for pair in ((q0, q1), (k0, k1), (v0, v1))]
    assert all(map(torch.equal, split, outputs(0, 1)))


@pytest.mark.parametrize("activation", ["a8", "pvq:32,105"])
def test_ranks_of_a_row_split_compute_the_reference_of_their_columns(ranks, activation):
    tensors = valid_tensors("pvq3", 40)
    q = quantizer_ops.decode_codes(tensors["weight_packed"], "pvq3")
    x = torch.randn(5, HIDDEN)
    for rank in range(2):
        ranks(rank, 2)
        layer = vllm_linear.RowParallelLinear(
            HIDDEN,
            40,
            bias=False,
            quant_config=make_config({"down": "pvq3"}, rotation_blocks=2, activation=activation),
            prefix="down",
        )
        load(layer, tensors)
        finish(layer)
        columns = slice(rank * 32, rank * 32 + 32)
        rotation = Rotation(3, 32, 1, [32], first_column=rank * 32)
        expected = reference.linear(
            x[:, columns], q[:, columns], 1, tensors["weight_scale"], rotation, activation
        )
        assert torch.equal(layer.quant_method.apply(layer, x[:, columns]), expected)


def test_a_group_of_activations_must_not_straddle_ranks(ranks):
    config = make_config({"down": "pvq3"}, rotation_blocks=2, activation="pvq:64,199")
    ranks(0, 1)
    vllm_linear.RowParallelLinear(HIDDEN, 40, bias=False, quant_config=config, prefix="down")
    ranks(0, 2)
    with pytest.raises(PVQError, match=r"down has 32 input columns on a rank, .* pvq:64,199"):
        vllm_linear.RowParallelLinear(HIDDEN, 40, bias=False, quant_config=config, prefix="down")


@pytest.mark.parametrize("rank", [0, 1])
def test_canonical_columns_are_decoded_before_they_are_split(ranks, rank):
    """A row of canonical codes is one bit stream, which cannot be cut; levels may come before or after the
    codes."""
    ranks(rank, 2)
    weight = torch.randn(24, HIDDEN)
    packed, levels, scale = encode_canonical(weight, 16, 24, 4)
    q = decode_canonical(packed, levels, 16, 24, 4, HIDDEN)
    config = make_config({"down": "int8"}, rotation_blocks=2)
    codebook = Codebook("canonical", group_size=16, num_pulses=24, amplitude_bits=4)
    config.checkpoint.modules["down"] = ModuleSpec(codebook, 2)
    names = ["weight_packed", "weight_levels", "weight_scale"]
    for order in (names, names[::-1]):
        layer = vllm_linear.RowParallelLinear(HIDDEN, 24, bias=False, quant_config=config, prefix="down")
        tensors = dict(weight_packed=packed, weight_levels=levels, weight_scale=scale)
        load(layer, {name: tensors[name] for name in order})
        assert torch.equal(codes(layer, 0), q[:, rank * 32 : rank * 32 + 32])
        finish(layer)


def test_code_out_of_range_is_refused_and_the_module_named(replicated):
    tensors = valid_tensors("pvq4", 24)
    tensors["weight_packed"][7, 3] = 255
    load(replicated, tensors)
    with pytest.raises(PVQError, match=r"x: .*row 7"):
        replicated.quant_method.process_weights_after_loading(replicated)


def test_code_out_of_range_names_the_file(replicated, tmp_path):
    tensors = valid_tensors("pvq4", 24)
    tensors["weight_packed"][7, 3] = 255
    save_file({f"x.{kind}": tensor for kind, tensor in tensors.items()}, tmp_path / "model.safetensors")
    load(replicated, tensors)
    replicated.quant_method.folder = tmp_path
    with pytest.raises(
        PVQError, match=rf"^{tmp_path}/model\.safetensors: x: .*row 7.*copy the checkpoint again"
    ):
        replicated.quant_method.process_weights_after_loading(replicated)


def test_dummy_weights_are_valid_and_give_finite_numbers(ranks):
    ranks(0, 1)
    config = make_config({"gate_proj": "pvq3", "up_proj": "int8"})
    layer = vllm_linear.MergedColumnParallelLinear(
        HIDDEN, [48, 48], bias=False, quant_config=config, prefix="gate_up_proj"
    )
    layer.weight_scale.data.uniform_(
        -1e-3, 1e-3
    )  # as vLLM's dummy loader does; it leaves integers as they are
    layer.weight_packed.data.fill_(255)
    finish(layer)
    y = layer.quant_method.apply(layer, torch.randn(2, HIDDEN))
    assert torch.isfinite(y).all() and y.std() > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_embedding_returns_the_rows_of_its_rank_widened(ranks, rank):
    ranks(rank, 2)
    tensors = valid_tensors("int8", 100)
    q = tensors["weight_packed"].view(torch.int8).flatten(1)
    layer = vllm_vocabulary.VocabParallelEmbedding(
        100,
        HIDDEN,
        quant_config=make_config({"embed_tokens": "int8"}, rotation_blocks=0),
        prefix="embed_tokens",
    )
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    words = torch.arange(36)
    expected = q.float() * tensors["weight_scale"].float()[:, None]
    assert torch.equal(layer.quant_method.embedding(layer, words), expected[rank * 64 :][:36])


def reload_as_vllm_does(layer, tensors: dict[str, torch.Tensor]) -> None:
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    reload.initialize_layerwise_reload(layer)
    load(layer, tensors)
    reload.finalize_layerwise_processing(layer, None)


@pytest.mark.parametrize("name", ["pvq4", "canonical"])
def test_a_layer_can_be_loaded_again(ranks, name):
    """vLLM counts what a loader copies to meta tensors, loads it once more, and fills the tensors that graphs may hold."""
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")
    ranks(0, 1)
    config = make_config({"x": "int8"})
    sizes = dict(group_size=16, num_pulses=24, amplitude_bits=4) if name == "canonical" else {}
    config.checkpoint.modules["x"] = ModuleSpec(Codebook(name, **sizes), 1)

    def checkpoint() -> dict[str, torch.Tensor]:
        if name != "canonical":
            return valid_tensors(name, 23)
        encoded = encode_canonical(torch.randn(23, HIDDEN), 16, 24, 4)
        return dict(zip(("weight_packed", "weight_levels", "weight_scale"), encoded, strict=True))

    def new_layer():
        return vllm_linear.ReplicatedLinear(HIDDEN, 23, bias=False, quant_config=config, prefix="x")

    first, second, x = checkpoint(), checkpoint(), torch.randn(3, HIDDEN)
    expected = new_layer()
    load(expected, second)
    finish(expected)
    layer = new_layer()
    reload.record_metadata_for_reloading(layer)
    load(layer, first)
    finish(layer)
    packed = layer.pvq_weight
    assert not torch.equal(layer.quant_method.apply(layer, x), expected.quant_method.apply(expected, x))
    reload_as_vllm_does(layer, second)
    assert layer.pvq_weight is packed
    assert torch.equal(layer.quant_method.apply(layer, x), expected.quant_method.apply(expected, x))


@pytest.mark.cuda_build
def test_a_rotation_that_gpus_cannot_do_is_refused_before_loading(ranks, monkeypatch):
    """As of down_proj of Qwen2.5-7B, 18944 = 148 * 128."""
    ranks(0, 1)
    config = make_config({"mlp.down_proj": "pvq4"})
    config.checkpoint.rotation_factors[296] = [148, 2]
    arguments = dict(bias=False, quant_config=config, prefix="mlp.down_proj")
    vllm_linear.ReplicatedLinear(296, 24, **arguments)
    a100 = dict(name="A100", capability=80, code=80, fault="", max_shared_bytes=163 * 1024)
    monkeypatch.setattr(cuda_ops, "_describe", lambda index: SimpleNamespace(**a100))
    monkeypatch.setattr(ops, "check_device", lambda device, plan: cuda_ops.check_device(0, plan))
    with pytest.raises(
        PVQError, match=r"mlp\.down_proj: .*order 148 has no kernel for GPUs: .*--rotation residual:128"
    ):
        vllm_linear.ReplicatedLinear(296, 24, **arguments)
