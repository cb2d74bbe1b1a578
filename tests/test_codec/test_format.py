# SPDX-License-Identifier: Apache-2.0
"""The format's gate: every way in which a checkpoint can be wrong is one sentence, and nothing is
allocated.
"""

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import (
    CheckpointConfig,
    Codebook,
    ModuleSpec,
    check_checkpoint,
    expected_tensors,
)
from pvq_vllm.codec.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header

CONFIG = {
    "quant_method": "pvq",
    "format_version": 1,
    "activation": "a8",
    "codebook": {"name": "pvq4"},
    "rotation": {"seed": 7, "factors": {"48": [12, 4], "24": [24]}},
    "modules": {
        "model.q_proj": {"rotation_blocks": 1},
        "model.o_proj": {"rotation_blocks": 2, "codebook": {"name": "pvq3"}},
        "model.c_proj": {
            "rotation_blocks": 1,
            "codebook": {"name": "canonical", "group_size": 16, "num_pulses": 27, "amplitude_bits": 4},
        },
        "lm_head": {"rotation_blocks": 0, "codebook": {"name": "int8"}},
    },
}
SHAPES = {"model.q_proj": (5, 48), "model.o_proj": (6, 48), "model.c_proj": (7, 48), "lm_head": (9, 48)}


def changed(path: str, value) -> dict:
    """Return CONFIG with the entry at the dotted ``path`` replaced (or, for ``...``, removed)."""
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split("/")
    entry = config
    for key in parents:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return config


def test_config_round_trips_through_json():
    config = CheckpointConfig.from_dict(json.loads(json.dumps(CONFIG)))
    assert config.to_dict() == CONFIG
    assert CheckpointConfig.from_dict(config.to_dict()) == config
    in_pyramids = CheckpointConfig.from_dict(changed("activation", "pvq:16,58"))
    assert in_pyramids.activation == in_pyramids.to_dict()["activation"] == "pvq:16,58"
    assert config.modules["model.c_proj"] == ModuleSpec(Codebook("canonical", 16, 27, 4), 1)
    assert config.rotation_factors == {48: [12, 4], 24: [24]}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("quant_method", "gptq", "quant_method"),
        ("format_version", 2, "format_version"),
        ("format_version", True, "format_version"),
        ("activation", "a4", "activation"),
        ("activation", "pvq:12,5", "activation"),
        ("activation", {"name": "pvq", "group_size": 16, "num_pulses": 58}, "activation"),
        ("activation", ..., "activation"),
        ("codebook", {"name": "pvq5"}, "pvq5"),
        ("codebook", {"name": "pvq4", "group_size": 8}, "group_size"),
        ("codebook", {"name": "canonical", "group_size": 8, "num_pulses": 3}, "amplitude_bits"),
        ("codebook", "pvq4", "codebook"),
        ("rotation/seed", -1, "seed"),
        ("rotation/factors/48", [12, 5], "48"),
        ("rotation/factors/48", [4, 12], "48"),
        ("rotation/factors/48", [], "48"),
        ("rotation/factors/x", [4], "x"),
        ("rotation/sign", 1, "sign"),
        ("modules/model.q_proj", {}, "rotation_blocks"),
        ("modules/model.q_proj", {"rotation_blocks": 1.0}, "rotation_blocks"),
        ("modules/model.q_proj", {"rotation_blocks": 1, "bits": 4}, "bits"),
        ("modules", [], "modules"),
        ("ignore", [], "ignore"),
    ],
)
def test_config_refuses_what_it_does_not_know_and_names_it(path, value, named):
    with pytest.raises(PVQError, match=named):
        CheckpointConfig.from_dict(changed(path, value))


def test_codebook_shapes_and_rates():
    assert Codebook("pvq4").packed_shape(5, 48) == (5, 6, 4)
    assert Codebook("int8").packed_shape(5, 48) == (5, 6, 8)
    # the paper's example: D = 16, K = 58 needs 64 bits; with 4 for the amplitude 3 groups take 204 bits
    assert Codebook("canonical", 16, 58, 4).packed_shape(3, 48) == (3, 26)
    assert Codebook("pvq4").bits_per_weight(1024) == 4 + 16 / 1024
    assert [Codebook(name).h for name in ("pvq2", "pvq3", "pvq4", "int8")] == [1, 1, 1, 0]
    with pytest.raises(PVQError, match="44"):
        Codebook("pvq4").packed_shape(5, 44)
    with pytest.raises(PVQError, match="group_size"):
        Codebook("canonical", 2000, 3, 1)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two shards that fits CONFIG, with a function that writes it again after a change."""

    def write(config=CONFIG, change=lambda tensors: None):
        parsed = CheckpointConfig.from_dict(CONFIG)
        tensors = {"model.norm.weight": torch.ones(48, dtype=torch.bfloat16)}
        types = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
        for name, spec in parsed.modules.items():
            for tensor, (dtype, shape) in expected_tensors(name, spec.codebook, *SHAPES[name]).items():
                tensors[tensor] = torch.zeros(shape, dtype=types[dtype])
        change(tensors)
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
        for shard, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / shard)
        weight_map = {name: shard for shard, part in parts.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        return tmp_path

    return write


@pytest.mark.parametrize("module_shapes", [None, SHAPES])
def test_a_good_checkpoint_passes(checkpoint, module_shapes):
    config, tensors = check_checkpoint(checkpoint(), module_shapes)
    assert config.to_dict() == CONFIG
    assert tensors["model.o_proj.weight_packed"].shape == (6, 6, 3)
    assert tensors["model.c_proj.weight_levels"].dtype == "F32"
    assert tensors["model.norm.weight"].nbytes == 96


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("lm_head.weight_scale"), "lm_head.weight_scale"),
        (lambda t: t.pop("model.c_proj.weight_levels"), "model.c_proj.weight_levels"),
        (lambda t: t.update({"lm_head.weight_scale": torch.zeros(8, dtype=torch.float16)}), "lm_head"),
        (lambda t: t.update({"lm_head.weight_scale": torch.zeros(9)}), "lm_head.weight_scale"),
        (lambda t: t.update({"lm_head.weight_packed": torch.zeros(9, 6, 4, dtype=torch.uint8)}), "lm_head"),
        (lambda t: t.update({"model.o_proj.weight_packed": torch.zeros(6, 18, dtype=torch.uint8)}), "o_proj"),
        (
            lambda t: t.update({"model.o_proj.weight_packed": torch.zeros(6, 5, 3, dtype=torch.uint8)}),
            "o_proj",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(9, 48)}), "lm_head.weight"),
        (lambda t: t.update({"model.k_proj.weight_scale": torch.zeros(9)}), "model.k_proj"),
    ],
)
def test_wrong_tensors_are_refused_by_name(checkpoint, change, named):
    with pytest.raises(PVQError, match=named):
        check_checkpoint(checkpoint(change=change))


def test_shapes_of_the_model_win_over_claims(checkpoint):
    with pytest.raises(PVQError, match=r"model\.q_proj.*\[4, 6, 4\]"):
        check_checkpoint(checkpoint(), {**SHAPES, "model.q_proj": (4, 48)})


def test_folder_level_errors_name_the_file(checkpoint, tmp_path):
    with pytest.raises(PVQError, match="nowhere"):
        check_checkpoint(tmp_path / "nowhere")
    with pytest.raises(PVQError, match=r"config\.json"):
        check_checkpoint(tmp_path)
    folder = checkpoint()
    (folder / "config.json").write_text("{}")
    with pytest.raises(PVQError, match="not quantized"):
        check_checkpoint(folder)
    with pytest.raises(PVQError, match=r"config\.json.*format_version"):
        check_checkpoint(checkpoint(config=changed("format_version", 99)))
    shard = checkpoint() / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(PVQError, match=r"00002-of-00002.*truncated"):
        check_checkpoint(folder)
    shard.unlink()
    with pytest.raises(PVQError, match=r"00002-of-00002.*missing"):
        check_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "model.bin"])
def test_the_index_cannot_name_files_outside_the_folder(checkpoint, shard):
    folder = checkpoint()
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PVQError, match=r"not a \.safetensors file of the folder"):
        check_checkpoint(folder)


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


ATTACKS = {
    "empty file": (b"", "truncated"),
    "short length": (b"\x01\x00\x00", "truncated"),
    "header past the end": (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
    "header length 2^64-1": (b"\xff" * 8 + b"{}", "truncated"),
    "not JSON": (b"hello", "unreadable header"),
    "not UTF-8": (b"\xff\xfe", "unreadable header"),
    "deep nesting": (b"[" * 200_000, "unreadable header"),
    "not an object": (b"[]", "not a JSON object"),
    "name twice": (b'{"a": {}, "a": {}}', "occurs twice"),
    "metadata is no map": ({"__metadata__": [1]}, "__metadata__"),
    "entry is no object": ({"a": 3}, "'a' must have exactly"),
    "unknown key": ({"a": entry(extra=1)}, "'a' must have exactly"),
    "unknown dtype": ({"a": entry("U7")}, "unknown dtype 'U7'"),
    "dtype is a list": ({"a": entry(["U8"])}, "unknown dtype"),
    "negative shape": ({"a": entry(shape=(-4,))}, "impossible shape"),
    "shape of booleans": ({"a": entry(shape=(True,), offsets=(0, 1))}, "impossible shape"),
    "shape of floats": ({"a": entry(shape=(4.0,))}, "impossible shape"),
    "too many dimensions": ({"a": entry(shape=(1,) * 17, offsets=(0, 1))}, "impossible shape"),
    "shape overflows 64 bits": ({"a": entry(shape=(1 << 40, 1 << 40))}, "needs"),
    "wrong number of bytes": ({"a": entry("F16", offsets=(0, 4))}, "needs 8"),
    "offsets reversed": ({"a": entry(offsets=(4, 0))}, "needs 4"),
    "negative offset": ({"a": entry(offsets=(-4, 0))}, "impossible data_offsets"),
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, "'b' overlaps tensor 'a'"),
    "same bytes twice": ({"a": entry(), "b": entry()}, "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(6, 10))}, "leaves a hole"),
    "hole at the start": ({"a": entry(offsets=(1, 5))}, "leaves a hole after the header"),
    "past the end": ({"a": entry(shape=(1 << 50,), offsets=(0, 1 << 50))}, "truncated"),
    "bytes of no tensor": ({"a": entry(shape=(3,), offsets=(0, 3))}, "belong to no tensor"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_with_the_name_of_the_file(tmp_path, attack):
    content, says = ATTACKS[attack]
    if isinstance(content, dict):
        content = json.dumps(content).encode()
        content = struct.pack("<Q", len(content)) + content + bytes(4)
    elif len(content) >= 2 and attack not in ("short length", "header past the end", "header length 2^64-1"):
        content = struct.pack("<Q", len(content)) + content
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(PVQError, match=says) as error:
        read_safetensors_header(path)
    assert str(path) in str(error.value)


def test_giant_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "giant.safetensors"
    with open(path, "wb") as file:  # sparse: takes no space on the disk
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 9)
    with pytest.raises(PVQError, match="header of 100,000,001 bytes"):
        read_safetensors_header(path)


def test_header_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "good.safetensors")
    assert {name: info.shape for name, info in header.items()} == {"a": (2, 3), "scalar": (), "empty": (0, 4)}
    assert {name: info.dtype for name, info in header.items()} == {
        "a": "F32",
        "scalar": "I64",
        "empty": "F32",
    }
