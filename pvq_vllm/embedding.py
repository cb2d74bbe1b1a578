# SPDX-License-Identifier: Apache-2.0
"""An embedding of eight bits a weight: rows of int8 times one float16 scale, widened when looked up."""

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import CheckpointConfig
from pvq_vllm.linear import fill_with_dummy_codes, layer_shards
from pvq_vllm.parameter import LayerWeights


class PVQEmbeddingMethod(QuantizeMethodBase):
    """Quantization method of a ``VocabParallelEmbedding`` with codebook int8 and no rotation.

    Args:
        config: of the checkpoint.
        name: the module, listed in ``config.modules``.
    Raises:
        PVQError: another codebook, or a rotation.
    """

    def __init__(self, config: CheckpointConfig, name: str):
        self.config, self.name = config, name
        spec = config.modules[name]
        if spec.codebook.name != "int8" or spec.rotation_blocks:
            raise PVQError(
                f"{name} is an embedding with codebook {spec.codebook} and rotation_blocks "
                f"{spec.rotation_blocks}, but only int8 with 0 is supported: quantize the model again"
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
        """Allocate the buffers; ``params_dtype`` becomes the dtype of the looked-up rows."""
        shards = layer_shards(self.config, [self.name], layer, output_partition_sizes, output_size)
        layer.pvq_weights = LayerWeights(shards, (None,), input_size_per_partition, input_size)
        layer.pvq_dtype = params_dtype
        for kind, parameter in layer.pvq_weights.make_parameters().items():
            layer.register_parameter(kind, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Keep the loaded bytes as they are, viewed as int8 [vocabulary rows, embedding_dim].

        Raises:
            PVQError: a tensor was missing, a scale is not finite or a code is -128.
        """
        weights: LayerWeights = layer.pvq_weights
        if not weights.check_complete(layer.weight_scale):
            fill_with_dummy_codes(weights, layer.weight_packed, layer.weight_scale)
        q = weights.codes(layer.weight_packed, 0)
        if q.numel() and int(q.min()) == -128:
            raise PVQError(
                f"{self.name}.weight_packed holds the code -128, which int8 does not allow: quantize it again"
            )
        layer.pvq_weight = torch.nn.Parameter(q, requires_grad=False)
        layer.pvq_row_scale = torch.nn.Parameter(layer.weight_scale.detach(), requires_grad=False)
        del layer.weight_packed, layer.weight_scale

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids ``input_``, int64 [...], as [..., embedding_dim], rounded once."""
        rows = layer.pvq_weight[input_].float() * layer.pvq_row_scale[input_].float().unsqueeze(-1)
        return rows.to(layer.pvq_dtype)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise PVQError(
            f"{self.name} is quantized and cannot serve as lm_head: config.json must say "
            "tie_word_embeddings: false; quantize the model again"
        )
