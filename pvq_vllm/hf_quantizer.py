# SPDX-License-Identifier: Apache-2.0
"""PVQ checkpoints in plain transformers: ``import pvq_vllm.hf_quantizer``, then
``AutoModelForCausalLM.from_pretrained(OUT)``.

Importing this module registers the quantization method "pvq" with transformers (5.x). The layers that the
checkpoint lists are replaced by modules that hold the packed bytes and compute with the same operator as the
vLLM plugin, so both give the same numbers wherever the activations are the same. For inference only. To run
in another activation mode than the checkpoint's, load the config first, change
``config.quantization_config["activation"]`` and pass it as ``config=``.
"""

from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pvq_vllm import ops
from pvq_vllm.codec.activation import check_width
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import QUANT_METHOD, CheckpointConfig, ModuleSpec, check_checkpoint
from pvq_vllm.parameter import canonical_to_int8


class _PackedModule(nn.Module):
    """Holds a module's checkpoint tensors, under their names, until ``pack`` turns them into the kernel's."""

    def __init__(self, name: str, spec: ModuleSpec, out_features: int, in_features: int):
        super().__init__()
        self.name, self.spec = name, spec
        self.in_features, self.out_features = in_features, out_features
        packed_shape = spec.codebook.packed_shape(out_features, in_features)
        self.register_buffer("weight_packed", torch.empty(packed_shape, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float16))
        if spec.codebook.name == "canonical":
            levels = torch.empty(1 << spec.codebook.amplitude_bits, dtype=torch.float32)
            self.register_buffer("weight_levels", levels)

    def _take_loaded(self) -> tuple[torch.Tensor, str, torch.Tensor]:
        """Return codes or q, the codebook that they are held in, and the scale; forget the loaded tensors."""
        codebook, scale = self.spec.codebook, self.weight_scale
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise PVQError(
                f"{self.name}.weight_scale has a value that is negative or not finite: quantize it again"
            )
        codes = self.weight_packed
        if codebook.name == "canonical":
            codes = canonical_to_int8(self.name, codebook, codes, self.weight_levels, self.in_features)
            del self.weight_levels
        elif codebook.name == "int8":
            codes = codes.view(torch.int8).flatten(1)
        del self.weight_packed, self.weight_scale
        return codes, "int8" if codebook.name == "canonical" else codebook.name, scale

    def _apply(self, fn, recurse: bool = True):
        """Move to another device, but do not let ``model.to(dtype)`` change the scales."""
        scales = {name: data for name, data in self._buffers.items() if name.endswith(("scale", "levels"))}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            if (after := self._buffers[name]).dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class PVQLinear(_PackedModule):
    """Linear layer with a packed weight.

    Args:
        name: Hugging Face name, for messages.
        config: of the checkpoint; gives rotation and activation mode.
        out_features, in_features: of the ``nn.Linear`` that it replaces.
        bias: whether there is a bias, of ``dtype``.
    """

    def __init__(
        self,
        name: str,
        config: CheckpointConfig,
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
    ):
        spec = config.modules[name]
        super().__init__(name, spec, out_features, in_features)
        self.config = config
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self.plan: str | None = None

    def pack(self) -> None:
        """Pack the loaded tensors for the kernel, once, and free them.

        Raises:
            PVQError: a scale is not finite, a code out of range, or the width no multiple of an activation's
                group.
        """
        codes, codebook, scale = self._take_loaded()
        blocks = self.spec.rotation_blocks
        check_width(self.config.activation, self.in_features, self.name)
        plan = ops.make_plan(
            [(codebook, self.out_features)],
            self.in_features,
            seed=self.config.rotation_seed,
            rotation_blocks=blocks,
            factors=self.config.rotation_factors[self.in_features // blocks] if blocks else None,
            activation=self.config.activation,
        )
        try:
            packed = ops.pack_linear([codes], scale, plan)
        except PVQError as error:
            raise PVQError(f"{self.name}: {error}") from error
        self.plan = plan
        for buffer, tensor in zip(("pvq_weight", "pvq_row_scale", "pvq_row_sum"), packed, strict=True):
            self.register_buffer(buffer, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in_features] float32, float16 or bfloat16 -> [..., out_features], same dtype."""
        if self.plan is None:
            self.pack()
        packed = ops.PackedLinear(self.pvq_weight, self.pvq_row_scale, self.pvq_row_sum)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # they differ under torch.autocast
        return ops.linear(x, packed, bias, self.out_features, self.plan)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} to {self.out_features}, {self.spec.codebook}, bias={self.bias is not None}"
        )


class PVQEmbedding(_PackedModule):
    """Embedding of codebook int8; returns rows of ``dtype``."""

    def __init__(
        self, name: str, config: CheckpointConfig, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
    ):
        spec = config.modules[name]
        if spec.codebook.name != "int8" or spec.rotation_blocks:
            raise PVQError(
                f"{name} is an embedding and must have codebook int8 and rotation_blocks 0: quantize it again"
            )
        super().__init__(name, spec, num_embeddings, embedding_dim)
        self.dtype = dtype
        self.packed = False

    def pack(self) -> None:
        """Keep the loaded bytes as int8 [num_embeddings, embedding_dim]; PVQError when one is -128."""
        q, _, scale = self._take_loaded()
        if q.numel() and int(q.min()) == -128:
            raise PVQError(
                f"{self.name}.weight_packed holds the code -128, which int8 does not allow: quantize it again"
            )
        self.register_buffer("pvq_weight", q)
        self.register_buffer("pvq_row_scale", scale)
        self.packed = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` int64 [...] -> [..., embedding_dim]."""
        if not self.packed:
            self.pack()
        return (self.pvq_weight[ids].float() * self.pvq_row_scale[ids].float().unsqueeze(-1)).to(self.dtype)


@register_quantization_config(QUANT_METHOD)
class PVQQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` for transformers; takes the keys of docs/format.md section 2 and no others."""

    def __init__(self, **entry):
        self.quant_method = QUANT_METHOD
        self.checkpoint = CheckpointConfig.from_dict(entry)

    def to_dict(self) -> dict:
        return self.checkpoint.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()


@register_quantizer(QUANT_METHOD)
class PVQHfQuantizer(HfQuantizer):
    """Replaces the listed modules before loading and packs them after it."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **_) -> None:
        """Replace the modules and check the folder.

        Raises:
            PVQError: the checkpoint lists a module that the model does not have, or does not fit it.
        """
        config = self.quantization_config.checkpoint
        found = dict(model.named_modules())
        base = f"{model.base_model_prefix}."
        names = {}  # in the checkpoint -> in this model; they differ when only the base model is loaded
        for name in config.modules:
            if name in found:
                names[name] = name
            elif name.startswith(base) and name.removeprefix(base) in found:
                names[name] = name.removeprefix(base)
            elif name != "lm_head":
                raise PVQError(
                    f"config.json lists '{name}' as quantized, but {type(model).__name__} has no such module: "
                    "copy config.json again"
                )
        shapes = {name: tuple(found[here].weight.shape) for name, here in names.items()}
        if checkpoint_files:
            check_checkpoint(Path(checkpoint_files[0]).parent, shapes)
        for name, here in names.items():
            old, (rows, columns) = found[here], shapes[name]
            with torch.device("meta"):
                if isinstance(old, nn.Embedding):
                    new = PVQEmbedding(name, config, rows, columns, old.weight.dtype)
                elif isinstance(old, nn.Linear):
                    new = PVQLinear(name, config, rows, columns, old.bias is not None, old.weight.dtype)
                else:
                    raise PVQError(
                        f"{name} is a {type(old).__name__}, but only linear layers and embeddings can be "
                        "quantized: quantize the model again"
                    )
            model.set_submodule(here, new)

    def _process_model_after_weight_loading(self, model, **_):
        for module in model.modules():
            # Where accelerate has offloaded a module, it is packed when it is first used.
            if isinstance(module, _PackedModule) and not module.weight_packed.is_meta:
                module.pack()
        return model

    def is_serializable(self) -> bool:
        return False  # the checkpoint's own bytes are gone; copy its folder instead

    @property
    def is_trainable(self) -> bool:
        return False
