# SPDX-License-Identifier: Apache-2.0
"""What the operators of both devices check before an address leaves Python, and the plan string they share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import GROUP_SIZE, INT8_ID, SERVING

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def require(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Check one argument; None in `shape` is any size. Returns the tensor."""
    wanted = f"{dtype} [{', '.join('any' if s is None else str(s) for s in shape)}]"
    fits = tensor.dim() == len(shape) and all(
        w in (None, s) for w, s in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise PVQError(f"{name} must be {wanted}; got {tensor.dtype} {list(tensor.shape)}.")
    if tensor.device != torch.device(device):
        raise PVQError(f"{name} is on {tensor.device}; the other arguments need it on {device}.")
    if not tensor.is_contiguous():
        raise PVQError(f"{name} must be contiguous.")
    return tensor


def activation_dtype(x: torch.Tensor) -> int:
    """The compiled module's number of the dtype of activations."""
    if x.dtype not in _DTYPES:
        raise PVQError(f"x has dtype {x.dtype}; use float32, float16 or bfloat16.")
    return _DTYPES[x.dtype]


def check_call(x: torch.Tensor, out_features: int, layer) -> int:
    """Check the input of a product against its plan (LinearPlan or CudaPlan); returns the number of its dtype."""
    dtype = activation_dtype(x)
    if x.shape[-1] != layer.in_features:
        raise PVQError(f"x has {x.shape[-1]} columns; the layer has in_features {layer.in_features}.")
    if out_features != layer.out_features:
        raise PVQError(f"out_features is {out_features}; the plan has {layer.out_features}.")
    return dtype


def code_bytes(name: str) -> int:
    """Bytes of a group of eight weights."""
    return GROUP_SIZE if name == "int8" else SERVING[name].bytes_per_group


def codebook_name(identity: int) -> str:
    """The inverse of ``codec.serving.codebook_id``."""
    return "int8" if identity == INT8_ID else next(c.name for c in SERVING.values() if c.id == identity)


class PlanArguments(NamedTuple):
    """A plan string, parsed; in the order that LinearPlan and CudaPlan of the compiled module take."""

    in_features: int
    segments: list[tuple[int, int]]  # (number of the codebook, rows)
    num_planes: int
    seed: int
    first_column: int
    rotation_blocks: int
    factors: list[int]
    group_size: int = 0  # of the projection of `pvq` activations, as num_pulses; 0, 0: none
    num_pulses: int = 0

    @classmethod
    def parse(cls, text: str) -> PlanArguments:
        in_features, parts, planes, seed, first_column, blocks, orders, *projection = text.split(";")
        segments = [(int(c), int(r)) for c, r in (p.split(":") for p in parts.split(","))]
        factors = [int(f) for f in orders.split("x")] if orders else []
        group_size, num_pulses = projection[0].split(",") if projection else (0, 0)
        return cls(
            int(in_features),
            segments,
            int(planes),
            int(seed),
            int(first_column),
            int(blocks),
            factors,
            int(group_size),
            int(num_pulses),
        )

    def __str__(self) -> str:
        parts = ",".join(f"{codebook}:{rows}" for codebook, rows in self.segments)
        orders = "x".join(str(f) for f in self.factors)
        projection = f";{self.group_size},{self.num_pulses}" if self.group_size else ""
        return (
            f"{self.in_features};{parts};{self.num_planes};{self.seed};{self.first_column};"
            f"{self.rotation_blocks};{orders}{projection}"
        )


def view_codes(
    index: int, codes: torch.Tensor, codebook: int, rows: int, in_features: int, device: torch.device | str
) -> torch.Tensor:
    """Check the codes of segment `index`; int8 [rows, in_features] is taken as codebook int8."""
    name = codebook_name(codebook)
    if codes.dtype == torch.int8 and name == "int8" and codes.dim() == 2:
        codes = codes.contiguous().view(torch.uint8).view(len(codes), -1, GROUP_SIZE)
    shape = (rows, in_features // GROUP_SIZE, code_bytes(name))
    return require(f"codes[{index}]", codes, torch.uint8, shape, device)


def check_scales(row_scale: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return the row scales as float32 [out_features]; PVQError for a wrong shape or an unusable value."""
    if row_scale.shape != (out_features,):
        raise PVQError(f"row_scale must have shape [{out_features}]; got {list(row_scale.shape)}.")
    scales = row_scale.float()
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise PVQError("row_scale has a value that is negative or not finite: copy the checkpoint again.")
    return scales
