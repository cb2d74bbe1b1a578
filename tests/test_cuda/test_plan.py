# SPDX-License-Identifier: Apache-2.0
"""What needs no GPU: the plan of the kernels for GPUs, and what is said where they cannot run."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from pvq_vllm import _C, cuda_ops, ops
from pvq_vllm.arguments import PlanArguments
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.rotation import Rotation, rotation_layout

PVQ4, INT8 = 2, 3


def test_a_plan_string_means_what_was_written():
    arguments = PlanArguments(96, [(2, 5), (3, 7)], 2, 11, 192, 2, [12, 4])
    assert PlanArguments.parse(str(arguments)) == arguments
    assert PlanArguments.parse(ops.make_plan([("pvq4", 5)], 8)) == PlanArguments(8, [(2, 5)], 1, 0, 0, 0, [])


@pytest.mark.cuda_build
def test_neighbours_with_one_codebook_become_one_segment():
    plan = ops.make_plan([("pvq4", 100), ("pvq4", 28), ("int8", 17), ("pvq4", 1)], 200)
    layer = cuda_ops.make_plan(plan)
    # 64 rows and 128 columns are the units; a tile of 16 rows by 128 columns has 1024 bytes, of int8 2048.
    assert layer.segments == [
        (PVQ4, 128, 0, 0),
        (INT8, 17, 8 * 2 * 1024, 128),
        (PVQ4, 1, 8 * 2 * 1024 + 4 * 2 * 2048, 192),
    ]
    assert layer.packed_rows == 256 and layer.out_features == 146
    assert layer.weight_bytes == 8 * 2 * 1024 + 4 * 2 * 2048 + 4 * 2 * 1024


@pytest.mark.cuda_build
@pytest.mark.parametrize("tokens", [1, 3, 8, 1000])
@pytest.mark.parametrize("mode", ["a8", "a16"])
def test_parts_of_the_workspace_do_not_overlap(tokens, mode):
    layer = cuda_ops.make_plan(ops.make_plan([("pvq4", 100)], 200, activation=mode))
    at = layer.workspace_offsets(tokens)
    columns = tokens * (2 if mode == "a16" else 1)
    assert at["padded_columns"] % 8 == 0 and columns <= at["padded_columns"] < columns + 8
    assert at["activations"] == 0 and at["sums"] >= 2 * 128 * at["padded_columns"]
    assert at["token_scale"] >= at["sums"] + 4 * columns
    assert at["bytes"] > at["token_scale"] + 4 * tokens
    assert all(value % 256 == 0 for name, value in at.items() if name != "padded_columns")


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "blocks, chunks, round_blocks",
    [(1, 1, 1), (1, 5, 1), (3, 4, 2), (16, 32, 16), (47, 33, 22), (225, 32, 16)],
)
def test_a_weight_is_expanded_in_the_order_of_the_rounds(blocks, chunks, round_blocks):
    pieces = _C.cuda.expansion_order(blocks, chunks, round_blocks)
    every = itertools.product(range(blocks), range(math.ceil(chunks / 4)), range(8))
    assert pieces == sorted(every, key=lambda piece: (piece[0] // round_blocks, piece[1], piece[0], piece[2]))


@pytest.mark.cuda_build
@pytest.mark.parametrize("panel_shift", [3, 4])
@pytest.mark.parametrize(
    "row_tiles, column_tiles",
    [(1, 1), (2, 7), (47, 8), (7, 9), (132, 15), (448, 16), (3, 40), (2000, 1), (70000, 250), (8016, 8016)],
)
def test_tiles_are_walked_in_panels(row_tiles, column_tiles, panel_shift):
    width = 1 << panel_shift
    tiles, count = row_tiles * column_tiles, min(row_tiles * column_tiles, 4000)
    for first in {0, (tiles - count) // 2, tiles - count}:
        places = _C.cuda.tile_order(row_tiles, column_tiles, panel_shift, first, count)
        for tile, place in enumerate(places, first):
            panel, local = divmod(tile, row_tiles * width)
            row, column = divmod(local, min(width, column_tiles - panel * width))
            assert place == (row, panel * width + column)


@pytest.mark.cuda_build
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_every_chunk_of_a_divided_tile_is_multiplied_once(splits):
    for num_chunks in range(4, 70):
        ctas = _C.cuda.wgmma_shares(splits, num_chunks)
        for warpgroup in range(2):
            chunks = [chunk for cta in ctas for chunk in cta[warpgroup]]
            assert sorted(chunks) == list(range(num_chunks))
        counts = [len(chunks) for cta in ctas for chunks in cta]
        # Of two, each has two chunks more for the rows that it finishes.
        assert max(counts) - min(counts) <= (3 if splits == 2 else 1)
        if splits == 2:
            assert len(ctas[0][0]) - len(ctas[0][1]) == len(ctas[1][1]) - len(ctas[1][0]) == 2


@pytest.mark.cuda_build
@pytest.mark.parametrize("table_bytes", [0, 32768])
def test_launches_of_many_columns_fit_the_device(table_bytes):
    max_shared, resident = 232448, [132, 66, 42]
    choices = set()
    for rows, columns, chunks in itertools.product(
        (1, 130, 3000, 4096, 6144, 8192, 16896, 17200, 28672, 57344),
        (65, 128, 200, 256, 300, 1024),
        (1, 3, 4, 5, 8, 32, 64, 112),
    ):
        first_rows, launches = _C.cuda.wgmma_launches(
            rows, columns, chunks, table_bytes, max_shared, resident
        )
        assert 0 < first_rows <= rows and (first_rows == rows or first_rows % 128 == 0)
        assert len(launches) == (1 if first_rows == rows else 2)
        for launch, launch_rows in zip(launches, (first_rows, rows - first_rows), strict=False):
            n, splits = launch["columns_per_tile"], launch["splits"]
            choices.add((n, splits, len(launches)))
            assert launch["tiles"] == math.ceil(launch_rows / 128) * math.ceil(columns / n)
            assert splits <= chunks and launch["workers"] <= launch["tiles"]
            # Divided tiles are never taken in turn, nor are those of few chunks: the next tile's weights would come too late.
            if splits > 1 or chunks <= 4:
                assert launch["workers"] == launch["tiles"]
            else:
                assert launch["workers"] == min(launch["tiles"], resident[0])
            assert launch["stages"] >= 2 and launch["shared_bytes"] <= max_shared
            room = launch["shared_stages"] - launch["shared_sums"]
            assert room == (64 * n * 4 if splits == 2 else 0)
            if splits == 3:  # sums of three CTAs for three of eight parts, in the place of the stages
                assert 3 * 3 * 128 * (n // 8) * 4 <= launch["stages"] * n * 128
    # Of the second launches some divide their tiles.
    assert {(256, 1, 1), (256, 2, 1), (256, 3, 1), (128, 2, 1), (128, 3, 1), (256, 2, 2)} <= choices


@pytest.mark.cuda_build
@pytest.mark.parametrize("rows, chunks", [(17096, 5), (20000, 7)])
def test_blocks_of_128_columns_that_take_several_tiles(rows, chunks):
    """That is what these shapes are there for in test_linear.py."""
    (launch,) = _C.cuda.wgmma_launches(rows, 65, chunks, 32768, 232448, [132, 66, 42])[1]
    assert (launch["columns_per_tile"], launch["splits"]) == (128, 1) and launch["workers"] < launch["tiles"]


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "rows, columns, chunks", [(57344, 256, 64), (57344, 80, 64), (128 * 182, 100, 33), (128 * 182, 200, 33)]
)
def test_a_last_round_that_leaves_most_of_the_device_idle_is_a_launch_of_its_own(rows, columns, chunks):
    first_rows, launches = _C.cuda.wgmma_launches(rows, columns, chunks, 32768, 232448, [132, 66, 42])
    assert first_rows == rows // (128 * 132) * (128 * 132)
    assert [launch["splits"] for launch in launches] == [1, 2]


@pytest.mark.cuda_build
def test_sign_bits_are_the_signs_of_the_rotation():
    blocks, factors = rotation_layout(72)
    plan = ops.make_plan([("pvq4", 1)], 72, seed=3, first_column=40, rotation_blocks=blocks, factors=factors)
    words = cuda_ops.make_plan(plan).sign_bits
    bits = [words[i // 32] >> (i % 32) & 1 for i in range(72)]
    signs = Rotation(3, 72, blocks, factors, first_column=40).signs
    assert [-1.0 if bit else 1.0 for bit in bits] == list(signs)


@pytest.mark.cuda_build
@pytest.mark.parametrize("order", [24, 84, 148])
def test_a_rotation_without_a_kernel_is_refused_and_not_left_out(order):
    plan = ops.make_plan([("pvq4", 1)], order * 2, rotation_blocks=1, factors=[order, 2])
    with pytest.raises(PVQError, match=f"order {order} has no kernel for GPUs: .* --rotation residual:128"):
        cuda_ops.make_plan(plan)


def report(**changes) -> SimpleNamespace:
    usual = dict(
        name="NVIDIA A100",
        capability=80,
        code=80,
        max_shared_bytes=163 * 1024,
        driver_version=13000,
        runtime_version=13000,
    )
    return SimpleNamespace(**usual | {"fault": ""} | changes)


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(fault="driver", driver_version=12040, name=""),
            "supports CUDA 12.4, but .* CUDA 13.0: update the driver",
        ),
        (dict(fault="driver", driver_version=0), "no NVIDIA driver"),
        (dict(capability=75, fault="image"), "compute capability 7.5.* too old: .* 8.0"),
        (dict(fault="image"), "no kernels in this build.*CMAKE_CUDA_ARCHITECTURES=80$"),
        (dict(fault="image", capability=90), "CMAKE_CUDA_ARCHITECTURES=90a$"),
        (dict(fault="out of memory", name=""), "GPU 1 cannot be used: out of memory"),
    ],
)
def test_the_sentence_says_what_to_do(changes, words):
    import re

    assert re.search(words, cuda_ops.explain(report(**changes), 1))


def test_nothing_is_wrong_with_a_fitting_gpu():
    assert cuda_ops.explain(report(), 0) is None


def plan_of_width(columns: int, factors: list[int], activation: str = "a8") -> str:
    blocks = columns // math.prod(factors) if factors else 0
    return ops.make_plan(
        [("pvq4", 16)], columns, rotation_blocks=blocks, factors=factors, activation=activation
    )


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    "columns, factors, activation, code, remedy",
    [
        (65536, [], "a16", 80, None),  # nothing to keep
        (24576, [12, 2048], "a8", 80, "--rotation residual:128"),
        (22528, [44, 512], "a8", 120, "--rotation residual:128"),
        (23552, [512], "a8", 80, None),  # dense orders up to 28, and none, need a small matrix
        (25216, [128], "a16", 80, None),
        (28672, [28, 1024], "a8", 80, "--tensor-parallel 2 or more"),
        (28672, [28, 1024], "a8", 120, "--rotation residual:128"),
        (28672, [128], "a8", 80, "--tensor-parallel 2 or more"),
        (65536, [256], "a8", 120, None),  # in the registers of a cluster
        (28672, [], "pvq:32,105", 120, "--tensor-parallel 2 or more"),
    ],
)
def test_only_what_exceeds_shared_memory_is_refused(columns, factors, activation, code, remedy):
    """99 KB, of most GPUs: a token is there while it is rotated or projected, and in small blocks it takes less."""
    problem = cuda_ops.explain_plan(
        report(max_shared_bytes=99 * 1024, code=code), 1, plan_of_width(columns, factors, activation)
    )
    assert (problem is None) if remedy is None else (remedy in problem and f" {columns} input" in problem)


@pytest.mark.cuda_build
def test_a_build_without_kernels_says_so_before_anything_else(monkeypatch):
    plan = plan_of_width(64, [])
    monkeypatch.setattr(_C, "with_cuda", False)
    monkeypatch.delattr(_C, "cuda")
    with pytest.raises(PVQError, match="has no CUDA kernels: install it again"):
        cuda_ops.pack_linear([torch.zeros(16, 8, 4, dtype=torch.uint8)], torch.ones(16), plan)


def test_a_gpu_that_is_full_is_no_error_of_pvq():
    """vLLM and others catch OutOfMemoryError and try with less."""
    with pytest.raises(torch.OutOfMemoryError), cuda_ops._on_gpu_of(torch.zeros(1)):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(PVQError, match="CUDA: launch failed"), cuda_ops._on_gpu_of(torch.zeros(1)):
        raise RuntimeError("launch failed")


@pytest.mark.parametrize("name", ["weight", "row_scale"])
def test_a_packed_tensor_must_be_contiguous_and_aligned(name):
    layer = SimpleNamespace(weight_bytes=64, packed_rows=64)
    wanted = f"{name} must be contiguous and begin at a multiple of 16 bytes"
    good = dict(weight=torch.zeros(64, dtype=torch.uint8), row_scale=torch.zeros(64))
    cuda_ops._check_packed(**good, layer=layer, device=torch.device("cpu"))
    for bad in (torch.zeros(65, dtype=good[name].dtype)[1:], torch.zeros(128, dtype=good[name].dtype)[::2]):
        with pytest.raises(PVQError, match=wanted):
            cuda_ops._check_packed(**good | {name: bad}, layer=layer, device=torch.device("cpu"))


def test_without_gpu_or_kernels_the_reason_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    wanted = "NVIDIA driver|cannot be used" if _C.with_cuda else "has no CUDA kernels: install it again"
    with pytest.raises(PVQError, match=wanted):
        ops.check_device(torch.device("cuda", 0), 64)
    ops.check_device(torch.device("cpu"), 10**6)


def test_the_operator_is_there_for_gpus_in_every_build():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("pvq::linear", "CUDA")
