# SPDX-License-Identifier: Apache-2.0
"""A vLLM linear layer whose weight stays packed: create, load, pack, apply.

Loading fills the flat buffer of ``parameter.LayerWeights`` with the checkpoint's bytes; after loading they
are packed once into the kernel's layout and the loaded bytes are freed, so that neither a dense weight nor a
second packed copy stays. ``apply`` is one operator, ``torch.ops.pvq.linear``, which rotates and quantizes the
activation, multiplies and adds the bias (docs/format.md sections 5 to 7). Everything the operator has to know
besides the tensors is one string, the plan, made first of all: a layer that cannot run is refused before it is loaded.
"""

from functools import cache
from pathlib import Path

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from pvq_vllm import ops, quantizer_ops
from pvq_vllm.codec.activation import check_width
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig, Codebook, read_shard_headers
from pvq_vllm.parameter import LayerWeights, Shard

_DUMMY_GROUPS = 4096


class PVQLinearMethod(LinearMethodBase):
    """Quantization method of one ``LinearBase`` or ``ParallelLMHead``.

    Args:
        config: of the checkpoint, with the activation mode to use.
        names: the modules that the layer fuses, in the order of their rows; all listed in ``config.modules``.
        folder: of the checkpoint, to name the file of a damaged tensor; None if there is none.
    Raises:
        PVQError: modules that cannot share one activation because their rotations differ.
    """

    def __init__(self, config: CheckpointConfig, names: list[str], folder: Path | None = None):
        self.config, self.names, self.folder = config, names, folder
        self.rotation_blocks = config.modules[names[0]].rotation_blocks
        for name in names:
            if config.modules[name].rotation_blocks != self.rotation_blocks:
                raise PVQError(
                    f"{names[0]} and {name} read the same activation but have rotation_blocks "
                    f"{self.rotation_blocks} and {config.modules[name].rotation_blocks}: "
                    "quantize the model again"
                )

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Allocate the buffers that the checkpoint is loaded into; ``params_dtype`` plays no part.

        Raises:
            PVQError: an unknown rotation, or ranks that would cut through one of its blocks or a group, of weights
                or of activations; a GPU that cannot run the layer.
        """
        ranks = input_size // input_size_per_partition
        width, rest = divmod(input_size, self.rotation_blocks or 1)
        if self.rotation_blocks and (rest or width not in self.config.rotation_factors):
            raise PVQError(
                f"rotation.factors in config.json lacks the width of {self.names[0]}, {input_size} / "
                f"{self.rotation_blocks}: quantize the model again"
            )
        if self.rotation_blocks % ranks:
            raise PVQError(
                f"{self.names[0]} is rotated in {self.rotation_blocks} block(s), which {ranks} "
                f"tensor-parallel ranks cannot share: quantize the model again with --tensor-parallel {ranks}"
            )
        check_width(self.config.activation, input_size_per_partition, self.names[0])
        rank = layer.tp_rank if ranks > 1 else 0
        weights = layer.pvq_weights = LayerWeights(
            layer_shards(self.config, self.names, layer, output_partition_sizes, output_size),
            shard_ids(layer, len(output_partition_sizes)),
            input_size_per_partition,
            input_size,
            rank * input_size_per_partition,
        )
        layer.pvq_blocks = self.rotation_blocks // ranks
        for kind, parameter in weights.make_parameters().items():
            layer.register_parameter(kind, parameter)
        layer.pvq_out_features = weights.out_features
        try:
            layer.pvq_plan = ops.make_plan(
                [(shard.memory_codebook, shard.num_rows) for shard in weights.shards],
                weights.in_features,
                seed=self.config.rotation_seed,
                first_column=weights.source_column,
                rotation_blocks=layer.pvq_blocks,
                factors=self.config.rotation_factors[width] if self.rotation_blocks else None,
                activation=self.config.activation,
            )
            ops.check_device(layer.weight_packed.device, layer.pvq_plan)
        except PVQError as error:
            raise PVQError(f"{', '.join(self.names)}: {error}") from error

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the loaded bytes for the kernel and free them.

        Raises:
            PVQError: a tensor was missing, a scale is not finite or a code is out of range.
        """
        weights: LayerWeights = layer.pvq_weights
        if not weights.check_complete(layer.weight_scale):
            fill_with_dummy_codes(weights, layer.weight_packed, layer.weight_scale)
        codes = [weights.codes(layer.weight_packed, index) for index in range(len(weights.shards))]
        try:
            packed = ops.pack_linear(codes, layer.weight_scale.detach(), layer.pvq_plan)
        except PVQError as error:
            raise PVQError(f"{self._files()}{', '.join(self.names)}: {error}") from error
        del codes
        for kind in ("weight_packed", "weight_scale", "weight_levels"):
            layer.register_parameter(kind, None)
            delattr(layer, kind)
        for name, tensor in zip(("pvq_weight", "pvq_row_scale", "pvq_row_sum"), packed, strict=True):
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def _files(self) -> str:
        """The shards that hold the layer's codes, as the beginning of a sentence; "" if they are not known."""
        if self.folder is None:
            return ""
        tensors = read_shard_headers(self.folder)
        names = [f"{name}.weight_packed" for name in self.names]
        return ", ".join(sorted({str(tensors[name].shard) for name in names if name in tensors})) + ": "

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x W^T + bias, [..., out_features on this rank], dtype of ``x``."""
        return torch.ops.pvq.linear(
            x,
            layer.pvq_weight,
            layer.pvq_row_scale,
            layer.pvq_row_sum,
            bias,
            layer.pvq_out_features,
            layer.pvq_plan,
        )

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        raise PVQError(
            f"{self.names[0]} is quantized and cannot share the embedding's weight: config.json must say "
            "tie_word_embeddings: false; quantize the model again"
        )


def shard_ids(layer: torch.nn.Module, num_partitions: int) -> tuple[str | int | None, ...]:
    """Return the names by which vLLM's loaders call the parts of ``layer``."""
    if hasattr(layer, "total_num_kv_heads"):
        return ("q", "k", "v")
    return (None,) if num_partitions == 1 else tuple(range(num_partitions))


def layer_shards(
    config: CheckpointConfig,
    names: list[str],
    layer: torch.nn.Module,
    output_partition_sizes: list[int],
    output_size: int,
) -> list[Shard]:
    """Describe the rows of each part of ``layer`` on this rank.

    Reads ``tp_rank``, ``tp_size`` and ``num_kv_head_replicas`` (QKV) or ``shard_indices`` (vocabulary) of the
    layer, in the meaning they have in vLLM 0.24 to 0.33.

    Raises:
        PVQError: the number of parts does not fit the checkpoint.
    """
    if len(names) == 1:  # also a layer that the checkpoint itself stores fused
        names = names * len(output_partition_sizes)
    if len(names) != len(output_partition_sizes):
        raise PVQError(
            f"{', '.join(names)}: vLLM fuses {len(output_partition_sizes)} modules here, the checkpoint has "
            f"{len(names)}; this model is not supported"
        )
    codebooks = [config.modules[name].codebook for name in names]
    if (vocabulary := getattr(layer, "shard_indices", None)) is not None:
        start = vocabulary.org_vocab_start_index
        loaded_rows = vocabulary.org_vocab_end_index - start
        return [
            Shard(names[0], codebooks[0], output_partition_sizes[0], layer.org_vocab_size, start, loaded_rows)
        ]
    ranks = output_size // sum(output_partition_sizes)  # 1 where the output is not split
    rank = layer.tp_rank if ranks > 1 else 0
    shards = []
    for index, (name, codebook, rows) in enumerate(
        zip(names, codebooks, output_partition_sizes, strict=True)
    ):
        # With fewer key-value heads than ranks, each head is loaded by several ranks.
        replicas = getattr(layer, "num_kv_head_replicas", 1) if index else 1
        shards.append(Shard(name, codebook, rows, rows * ranks // replicas, rank // replicas * rows, rows))
    return shards


def fill_with_dummy_codes(
    weights: LayerWeights, weight_packed: torch.Tensor, weight_scale: torch.Tensor
) -> None:
    """Fill the buffers of a layer with valid codes of random weights, in place, for ``load_format="dummy"``.

    vLLM fills only floating-point parameters there, and arbitrary bytes are not valid codes. The codes are
    those of Gaussian weights, so that a benchmark decodes what it would decode in a real model.
    """
    for index, shard in enumerate(weights.shards):
        view = weights.codes(weight_packed, index)
        table = _dummy_codes(shard.memory_codebook).to(view.device)
        view = view.view(-1, table.shape[1])
        for part in view.split(1 << 20):  # bounds the memory of the random numbers
            part.copy_(table[torch.randint(len(table), (len(part),), device=view.device)])
    weight_scale.detach().abs_()


@cache
def _dummy_codes(codebook: str) -> torch.Tensor:
    """Codes of random groups, one a row, on the CPU: int8 for codebook int8, uint8 for the others."""
    # vLLM sets torch's default device and dtype while it loads: nothing here may depend on them.
    settings = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)
    gaussian = torch.randn(_DUMMY_GROUPS // 64, 8 * 64, generator=generator, **settings)
    if codebook == "int8":
        return (gaussian * 32).round().clamp(-127, 127).to(torch.int8).view(-1, 8)
    scale = torch.full((len(gaussian),), 2.0**-5, **settings)
    codes, _ = quantizer_ops.quantize_rows(gaussian, codebook, scale)
    return codes.reshape(-1, Codebook(codebook).bytes_per_group)
