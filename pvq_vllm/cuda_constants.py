# SPDX-License-Identifier: Apache-2.0
"""What a plan needs on a GPU besides the weight: tables, signs, counters.

The kernels get addresses of it, so nothing here is ever freed, and it is made when the first weight is packed there: never during
a capture, but for the counters of later captures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, wraps
from typing import NamedTuple

import numpy as np
import torch

from pvq_vllm import _C
from pvq_vllm.arguments import PlanArguments
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import INT8_ID

_LOCK = threading.RLock()


@contextmanager
def on_gpu(index: int):
    """For calls of the compiled module on GPU `index`: its errors, which are CUDA's or about a plan, become PVQError.

    It would make that GPU the current one itself, and then go back. That makes a context of hundreds of MB on a GPU that has none
    yet, where torch only remembers which one was current.
    """
    with torch.cuda.device(index):
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise PVQError(f"CUDA: {error}") from error


def _made_once(make: Callable) -> Callable:
    """functools.cache that makes nothing twice: of two tensors for two threads, one would be freed with its address in use."""
    cached = cache(make)

    @wraps(make)
    def get(*arguments):
        with _LOCK:
            return cached(*arguments)

    return get


@cache
def make_plan(text: str) -> _C.cuda.CudaPlan:
    """The plan as the kernels for GPUs see it: neighbouring segments with the same codebook are one."""
    try:
        return _C.cuda.CudaPlan(*PlanArguments.parse(text))
    except ValueError as error:
        raise PVQError(str(error)) from None


def _words(values: list[int], device: int) -> torch.Tensor:
    words = np.array(values, dtype=np.uint32).view(np.int32)
    return torch.from_numpy(words).to(torch.device("cuda", device))


@_made_once
def _table(codebook: int, device: int) -> torch.Tensor:
    return _words(_C.cuda.device_table(codebook), device)


def table_address(codebook: int, device: int) -> int:
    return 0 if codebook == INT8_ID else _table(codebook, device).data_ptr()


@_made_once
def _signs(bits: tuple[int, ...], device: int) -> torch.Tensor:
    return _words(list(bits), device)  # one tensor for all layers of a width


class OnDevice(NamedTuple):
    """A plan on a GPU whose kernels are loaded there."""

    layer: _C.cuda.CudaPlan
    constants: _C.cuda.Constants  # addresses of the tensors that _table and _signs keep
    counters: Counters


@_made_once
def on_device(text: str, device: int) -> OnDevice:
    layer = make_plan(text)
    used = {codebook for codebook, *_ in layer.segments}
    tables = [table_address(codebook, device) if codebook in used else 0 for codebook in range(INT8_ID + 1)]
    signs = _signs(tuple(layer.sign_bits), device).data_ptr() if layer.sign_bits else 0
    with on_gpu(device):
        _C.cuda.prepare(layer, device)
    return OnDevice(layer, _C.cuda.Constants(tables, signs), counters(device))


class Counters:
    """Zeros by which the blocks that divide a reduction meet (`Scratch` of csrc/cuda/linear.h); each product leaves zeros behind.

    Products that may run at the same time need rows of their own: a stream has one, and so has every captured graph, which may
    be replayed beside anything. Rows are not given back: nobody says when a graph is gone.
    """

    _FIRST_ROWS = 64

    def __init__(self, device: torch.device):
        self._rows: dict[tuple[int, int | None], torch.Tensor] = {}
        self._device = device
        # Copied and not zeroed there: they are zeros now, for streams that wait for nothing.
        self._spare = list(self._zeros(self._FIRST_ROWS, "cpu").to(device))

    @staticmethod
    def _zeros(rows: int, device: torch.device | str) -> torch.Tensor:
        return torch.zeros((rows, _C.cuda.num_counters), dtype=torch.int32, device=device)

    def address(self, stream: int, capture: int | None) -> int:
        """Address of the counters for the next product on a stream, which is the current one.

        Args:
            capture: its number, while the stream is being captured (``_C.cuda.capture_of``).
        """
        key = (stream, capture)
        with _LOCK:
            if key not in self._rows:
                # A new row is zeroed on this stream, or by this graph whenever it is replayed.
                self._rows[key] = self._spare.pop() if self._spare else self._zeros(1, self._device)[0]
            return self._rows[key].data_ptr()


@_made_once
def counters(device: int) -> Counters:
    return Counters(torch.device("cuda", device))
