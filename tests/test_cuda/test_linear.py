# SPDX-License-Identifier: Apache-2.0
"""The product on a GPU equals the product on the CPU bit for bit, whichever kernel runs."""

import itertools

import pytest
import torch

from pvq_vllm import _C, cuda_constants, cuda_ops, ops
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.serving import codebook_id

pytestmark = pytest.mark.cuda

NAMES = ("pvq2", "pvq3", "pvq4", "int8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 32, 33, 50, 64, 65, 130, 257, 300)
SIZES = (  # (columns, rows, blocks)
    (8, 1, 1),
    (8, 100, 0),
    (64, 17, 1),
    (64, 960, 0),
    (576, 100, 1),
    (576, 960, 2),
    (1536, 960, 1),
    (4096, 17, 1),
    (4096, 960, 1),
    (14336, 100, 1),
    (14336, 960, 2),
    (14336, 300, 0),
    (8192, 600, 0),
    # Rotations inside of warps: 8, 64, 128 and 256 columns, with warps and chunks that end early.
    (136, 100, 17),
    (576, 960, 9),
    (4096, 300, 32),
    (14336, 960, 112),
    (8192, 100, 32),
)

# Every dense order that has a kernel, and a power of two that a cluster shares; blocks of 32 and 256 columns, and none, where
# threads hold 32 columns and these fill no chunk.
MORE_ROTATIONS = {(272, 1), (304, 1), (2304, 1), (2816, 1), (1920, 1), (8192, 1)}
MORE_ROTATIONS |= {(1056, 33), (1056, 0), (9224, 0), (9216, 36), (16384, 64)}


def need_wgmma() -> None:
    # Of what is loaded, which may be older than the GPU.
    code = _C.cuda.describe_device(torch.cuda.current_device()).code
    if code != 90 or "90a" not in _C.cuda.architectures:
        pytest.skip(f"no wgmma: this GPU runs code for {code}, this build is for {_C.cuda.architectures}")


def force(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel in ("tiles", "wgmma", "prefill"):
        need_wgmma()
    monkeypatch.setenv("PVQ_CUDA_KERNEL", kernel)


@pytest.mark.parametrize("mode", ["a8", "a16"])
@pytest.mark.parametrize("columns, blocks", sorted({(c, b) for c, _, b in SIZES} | MORE_ROTATIONS))
def test_activations(kit, columns, blocks, mode):
    """Rotation and quantization alone: if this fails, so does all below."""
    layer = kit.build_layer([("int8", 8)], columns, mode, blocks)
    wrong = []
    for tokens, dtype in itertools.product((1, 3, 8, 300, 1100), DTYPES):
        x = kit.random_tokens(tokens, columns, dtype)
        planes, scale = ops.quantize_activations(x, layer.plan)
        got_planes, got_scale = ops.quantize_activations(x.cuda(), layer.plan)
        for what, got, expected in (("planes", got_planes, planes), ("scale", got_scale, scale)):
            if difference := kit.describe_difference(got.cpu(), expected):
                wrong.append(f"{what}, {tokens} tokens, {dtype}: {difference}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns, rows", [(8, 1), (72, 100), (576, 960), (4096, 130)])
def test_packed_weights_hold_what_was_packed(kit, columns, rows, name):
    """Packing alone, of three tensors into one segment."""
    first, second = rows // 2, rows // 3
    segments = [(name, count) for count in (first, second, rows - first - second) if count]
    layer = kit.build_layer(segments, columns)
    assert torch.equal(cuda_ops.unpack_linear(layer.on_gpu.weight, layer.plan).cpu(), layer.q)


@pytest.mark.parametrize("mode", ["a8", "a16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns, rows, blocks", SIZES)
def test_every_number_of_tokens(kit, columns, rows, blocks, name, mode):
    layer = kit.build_layer([(name, rows)], columns, mode, blocks)
    wrong = []
    for i, tokens in enumerate(TOKENS):
        for dtype in DTYPES if tokens in (1, 8, 33) else DTYPES[i % 3 :][:1]:
            x = kit.random_tokens(tokens, columns, dtype)
            bias = torch.randn(rows).to(dtype) if i % 2 else None
            if difference := kit.describe_difference(*layer.both(x, bias)):
                wrong.append(f"{tokens} tokens, {dtype}: {difference}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kernel", ["few", "tiles", "mma", "wgmma", "prefill"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["a8", "a16"])
def test_every_kernel(kit, monkeypatch, kernel, name, mode):
    force(kernel, monkeypatch)
    wrong = []
    for columns, rows in ((72, 1), (136, 65), (1536, 192), (4096, 1100)):
        layer = kit.build_layer([(name, rows)], columns, mode)
        for tokens in (
            (1, 2, 4, 5, 8, 12, 16)
            if kernel == "few"
            else (2, 9, 15, 16, 17, 24, 31, 32)
            if kernel == "tiles"
            else (1, 7, 8, 9, 16, 31, 32, 63, 64, 127, 128, 129, 513)
        ):
            x = kit.random_tokens(tokens, columns, torch.bfloat16)
            if difference := kit.describe_difference(*layer.both(x)):
                wrong.append(f"{columns} columns, {rows} rows, {tokens} tokens: {difference}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kernel", ["auto", "wgmma", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tiles_than_multiprocessors(kit, monkeypatch, kernel, dtype):
    """A block takes several tiles, of several panels, one after another."""
    monkeypatch.setenv("PVQ_CUDA_KERNEL", kernel)
    for name, rows, columns, mode, tokens in (
        ("pvq3", 4500, 136, "a8", 2300),
        ("int8", 4500, 640, "a16", 1100),
        ("pvq4", 9000, 136, "a8", 512),
        ("pvq4", 4096, 136, "a8", 2048),
    ):
        layer = kit.build_layer([(name, rows)], columns, mode)
        x = kit.random_tokens(tokens, columns, dtype)
        assert kit.describe_difference(*layer.both(x, torch.randn(rows).to(dtype))) == ""


@pytest.mark.parametrize("name", NAMES)
def test_tiles_of_an_odd_number_of_chunks(kit, monkeypatch, name):
    """A block's next tile begins with the registers that its last one left to the chunk after the next."""
    force("wgmma", monkeypatch)
    for rows, columns, tokens in ((20000, 1152, 200), (17096, 640, 65), (20000, 896, 65), (17096, 384, 65)):
        layer = kit.build_layer([(name, rows)], columns, "a8")
        x = kit.random_tokens(tokens, columns, torch.float16)
        assert kit.describe_difference(*layer.both(x)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_round_of_tiles_in_a_launch_of_its_own(kit, monkeypatch, dtype):
    force("wgmma", monkeypatch)
    device, tokens, chunks = torch.cuda.current_device(), 200, 33
    whole_round = 128 * torch.cuda.get_device_properties(device).multi_processor_count
    codebook = codebook_id("pvq4")
    first_rows = _C.cuda.many_columns_wgmma_first_rows
    rows = whole_round + 200  # the last tile has 72
    assert 0 < first_rows(codebook, rows, tokens, chunks, device) < rows
    layer = kit.build_layer([("pvq4", rows)], 128 * chunks, "a8")
    x = kit.random_tokens(tokens, 128 * chunks, dtype)
    assert kit.describe_difference(*layer.both(x, torch.randn(rows).to(dtype))) == ""


def test_calls_of_two_launches_that_follow_each_other(kit, monkeypatch):
    """The second launch waits for no other, and what comes next must not overwrite the activations of either; in a graph, too."""
    force("wgmma", monkeypatch)
    device, tokens, chunks = torch.cuda.current_device(), 100, 33
    rows = 128 * (torch.cuda.get_device_properties(device).multi_processor_count + 50)
    assert _C.cuda.many_columns_wgmma_first_rows(codebook_id("pvq4"), rows, tokens, chunks, device) < rows
    layer = kit.build_layer([("pvq4", rows)], 128 * chunks, "a8")
    inputs = [kit.random_tokens(count, 128 * chunks, torch.float16) for count in (tokens, tokens - 1)]
    expected = [layer.both(x)[1] for x in inputs]
    on_gpu = [x.cuda() for x in inputs]

    def run() -> list[torch.Tensor]:
        return [ops.linear(on_gpu[i % 2], layer.on_gpu, None, rows, layer.plan) for i in range(8)]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
    for outputs in (run(), captured):
        for i, y in enumerate(outputs):
            assert kit.describe_difference(y.cpu(), expected[i % 2]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_expanding_while_multiplying(kit, name):
    """Where it pays: rounds of several tiles, whose weights are expanded in pieces of several chunks, most of them meanwhile."""
    need_wgmma()
    tokens, rows = 2048, 6000
    layer = kit.build_layer([(name, rows)], 4096)
    plan = cuda_constants.make_plan(layer.plan)
    apart = (
        plan.workspace_bytes(tokens, torch.cuda.current_device()) - plan.workspace_offsets(tokens)["bytes"]
    )
    assert apart > rows * 4096  # it was chosen
    x = kit.random_tokens(tokens, 4096, torch.float16)
    assert kit.describe_difference(*layer.both(x, torch.randn(rows).half())) == ""


def test_a_weight_that_is_expanded_in_several_parts(kit, monkeypatch):
    force("prefill", monkeypatch)
    layer = kit.build_layer([("pvq4", 4200)], 65536, blocks=0)  # 4096 rows are 256 MB
    x = kit.random_tokens(3, 65536, torch.bfloat16)
    assert kit.describe_difference(*layer.both(x, torch.randn(4200).bfloat16())) == ""


@pytest.mark.parametrize("mode", ["a8", "a16"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_divide_a_reduction(kit, monkeypatch, name, mode):
    """Few rows: clusters of two and three blocks add their sums up."""
    force("wgmma", monkeypatch)
    for columns, rows in ((2056, 6200), (2304, 4500), (4096, 3000), (512, 170)):
        layer = kit.build_layer([(name, rows)], columns, mode, 0)
        for tokens in (65, 128, 200, 256):
            x = kit.random_tokens(tokens, columns, torch.float16)
            assert kit.describe_difference(*layer.both(x, torch.randn(rows).half())) == ""


@pytest.mark.parametrize("name", NAMES)
def test_more_tiles_than_a_block_takes_at_once(kit, name):
    """Warps that own tiles go through several rounds."""
    for columns, rows in ((256, 40000), (384, 33800), (136, 64000)):
        layer = kit.build_layer([(name, rows)], columns, "a8", 0)
        for tokens in (24, 40, 64):
            x = kit.random_tokens(tokens, columns, torch.bfloat16)
            assert kit.describe_difference(*layer.both(x)) == ""


@pytest.mark.parametrize(
    "kernel, columns, tokens",
    [("auto", 96, 1), ("auto", 96, 3), ("auto", 96, 20), ("auto", 96, 100), ("prefill", 2304, 100)],
)
@pytest.mark.parametrize("mode", ["a8", "a16"])
def test_mixed_codebooks_in_one_layer(kit, monkeypatch, kernel, columns, tokens, mode):
    force(kernel, monkeypatch)
    segments = [("pvq4", 37), ("pvq4", 5), ("pvq2", 5), ("int8", 16), ("pvq3", 64), ("pvq3", 1)]
    layer = kit.build_layer(segments, columns, mode)
    x = kit.random_tokens(tokens, columns, torch.bfloat16)
    bias = torch.randn(128).bfloat16()
    assert kit.describe_difference(*layer.both(x, bias)) == ""


@pytest.mark.parametrize("rows", [28672, 128256])
def test_rows_of_large_models(kit, rows):
    layer = kit.build_layer([("pvq4", rows)], 256)
    for tokens in (1, 8, 40):
        x = kit.random_tokens(tokens, 256, torch.bfloat16)
        assert kit.describe_difference(*layer.both(x)) == ""


@pytest.mark.parametrize("blocks", [0, 1, 5])
@pytest.mark.parametrize("mode", ["a8", "a16"])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_zero_tiny_huge_and_broken_tokens(kit, mode, tokens, blocks):
    layer = kit.build_layer([("pvq4", 32)], 320, mode, blocks)
    for value in (0.0, 1e-30, 1e37, float("inf"), float("nan")):
        x = kit.random_tokens(tokens, 320, torch.float32)
        x[0] = x[0].sign() * value
        got, expected = layer.both(x)
        assert kit.describe_difference(got, expected) == ""
        assert not got[1:].isnan().any()


def test_largest_values_of_the_codebooks(kit):
    """Sums near 2^31: every weight and every activation of the largest magnitude, in 65536 columns."""
    columns = 65536
    codes = torch.full((16, columns), 127, dtype=torch.int8)
    plan = ops.make_plan([("int8", 16)], columns)
    scale = torch.ones(16).half()
    layer = type(kit.build_layer([("int8", 16)], 64))(
        plan,
        16,
        columns,
        codes,
        ops.pack_linear([codes], scale, plan),
        ops.pack_linear([codes.cuda()], scale.cuda(), plan),
    )
    for tokens in (1, 8, 64):
        assert kit.describe_difference(*layer.both(torch.full((tokens, columns), 2.0))) == ""


def test_a_token_does_not_depend_on_its_batch(kit):
    layer = kit.build_layer([("pvq4", 80)], 576)
    x = kit.random_tokens(64, 576, torch.bfloat16).cuda()
    together = ops.linear(x, layer.on_gpu, None, 80, layer.plan)
    alone = torch.cat([ops.linear(row[None], layer.on_gpu, None, 80, layer.plan) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kernel, counts", [("auto", (1, 4, 8, 24, 70)), ("prefill", (70, 600))])
def test_many_calls_in_a_row_and_on_two_streams(kit, monkeypatch, kernel, counts):
    """Workspace and counters are used again by the next call while the last one may still run."""
    force(kernel, monkeypatch)
    layers = [kit.build_layer([(name, 192)], 4096) for name in ("pvq4", "pvq3")]
    inputs = [kit.random_tokens(tokens, 4096, torch.bfloat16) for tokens in counts]
    expected = [ops.linear(x, layer.on_cpu, None, layer.rows, layer.plan) for layer in layers for x in inputs]
    on_gpu = [x.cuda() for x in inputs]
    torch.cuda.synchronize()
    outputs = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(50):
                outputs.append(
                    [
                        ops.linear(x, layer.on_gpu, None, layer.rows, layer.plan)
                        for layer in layers
                        for x in on_gpu
                    ]
                )
    torch.cuda.synchronize()
    for run in outputs:
        assert all(torch.equal(got.cpu(), want) for got, want in zip(run, expected, strict=True))


@pytest.mark.parametrize(
    "kernel, columns, tokens", [("auto", 576, 1), ("auto", 576, 7), ("auto", 576, 64), ("prefill", 2304, 64)]
)
def test_cuda_graph_replays_with_new_inputs(kit, monkeypatch, kernel, columns, tokens):
    force(kernel, monkeypatch)
    parts = ([("pvq4", columns)], [("pvq3", 96), ("int8", columns - 96)])
    layers = [kit.build_layer(part, columns) for part in parts]
    static = torch.zeros(tokens, columns, dtype=torch.bfloat16, device="cuda")

    def model(x, place):
        for layer in layers:
            x = ops.linear(x, getattr(layer, place), None, columns, layer.plan)
        return x

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing ran before it: all that is made once was made when packing
        output = model(static, "on_gpu")
    for seed in range(3):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
        static.copy_(x)
        graph.replay()
        assert torch.equal(output.cpu(), model(x, "on_cpu"))


def test_compiled_whole_and_for_any_number_of_tokens(kit):
    layer = kit.build_layer([("pvq4", 48)], 64)
    arguments = (*layer.on_gpu, None, 48, layer.plan)
    compiled = torch.compile(
        lambda x: torch.ops.pvq.linear(x, *arguments) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (2, 3, 40):
        x = kit.random_tokens(tokens, 64, torch.bfloat16).cuda()
        assert torch.equal(compiled(x), torch.ops.pvq.linear(x, *arguments) * 2)
    torch.library.opcheck(torch.ops.pvq.linear.default, (x, *arguments))


def test_layouts_of_the_input(kit):
    layer = kit.build_layer([("pvq4", 48)], 64)
    x = kit.random_tokens(12, 64, torch.bfloat16)
    expected = ops.linear(x, layer.on_cpu, None, 48, layer.plan)
    on_gpu = x.cuda()

    def product(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, layer.on_gpu, None, 48, layer.plan).cpu()

    assert torch.equal(product(on_gpu.T.contiguous().T), expected)
    assert torch.equal(product(on_gpu.view(3, 4, 64)), expected.view(3, 4, 48))
    assert product(on_gpu[:0]).shape == (0, 48)
    shifted = torch.empty(12 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(12, 64)  # two bytes off
    shifted.copy_(on_gpu)
    assert torch.equal(product(shifted), expected)


def test_wrong_arguments_are_named(kit, monkeypatch):
    layer = kit.build_layer([("pvq4", 48)], 64)
    x = torch.zeros(2, 64, device="cuda")
    with pytest.raises(PVQError, match="x has 56 columns"):
        ops.linear(x[:, :56], layer.on_gpu, None, 48, layer.plan)
    with pytest.raises(PVQError, match="float64"):
        ops.linear(x.double(), layer.on_gpu, None, 48, layer.plan)
    with pytest.raises(PVQError, match="bias must be"):
        ops.linear(x, layer.on_gpu, torch.zeros(47, device="cuda"), 48, layer.plan)
    with pytest.raises(PVQError, match="bias is on cpu"):
        ops.linear(x, layer.on_gpu, torch.zeros(48), 48, layer.plan)
    with pytest.raises(PVQError, match="does not belong to this plan"):
        ops.linear(x, layer.on_gpu._replace(weight=layer.on_gpu.weight[:-1]), None, 48, layer.plan)
    shifted = torch.cat([layer.on_gpu.weight[:1], layer.on_gpu.weight])[1:]
    with pytest.raises(PVQError, match="weight must be contiguous and begin at a multiple of 16 bytes"):
        ops.linear(x, layer.on_gpu._replace(weight=shifted), None, 48, layer.plan)
    moved = ops.PackedLinear(*(tensor.cuda() for tensor in layer.on_cpu))
    with pytest.raises(PVQError, match="packed for the CPU"):
        ops.linear(x, moved, None, 48, layer.plan)
    monkeypatch.setenv("PVQ_CUDA_KERNEL", "fast")
    with pytest.raises(PVQError, match="use auto, few, tiles, mma, wgmma or prefill"):
        ops.linear(x, layer.on_gpu, None, 48, layer.plan)
