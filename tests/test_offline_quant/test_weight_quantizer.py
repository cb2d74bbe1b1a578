# SPDX-License-Identifier: Apache-2.0
"""One matrix: error feedback against its definition, scales, corner cases, and the way back."""

import pytest
import torch

from offline_quant import error_feedback, weight_quantizer
from offline_quant.error_feedback import descend, feedback, fit_scale
from offline_quant.hessian import HessianSum, RotatedHessian, inverse_factor, rotate_hessian
from offline_quant.weight_quantizer import dequantize_weight, quantize_weight, stored_weight_snr
from pvq_vllm import quantizer_ops
from pvq_vllm.codec.errors import PVQError
from pvq_vllm.codec.format import Codebook, expected_tensors
from pvq_vllm.codec.rotation import Rotation, rotation_layout

CODEBOOKS = [
    Codebook("pvq2"),
    Codebook("pvq3"),
    Codebook("pvq4"),
    Codebook("int8"),
    Codebook("canonical", 8, 8, 4),
]


def rotation_of(width: int, splits: int = 1) -> Rotation:
    blocks, factors = rotation_layout(width, splits)
    return Rotation(3, width, blocks, factors)


def correlated_inputs(tokens: int, width: int) -> torch.Tensor:
    """Activations with a few directions far stronger than the others, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) * torch.logspace(0, -2, width) @ basis


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse():
    hessian = correlated_inputs(200, 24).double()
    hessian = hessian.T @ hessian / 200
    factor = inverse_factor(hessian.float(), damping=0.01).double()
    assert torch.equal(factor, factor.triu())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-4, atol=1e-5)


def test_inverse_factor_survives_dead_columns_and_singular_hessians():
    x = correlated_inputs(5, 16)  # rank 5
    x[:, 3] = 0
    hessian = x.T @ x
    factor = inverse_factor(hessian)
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()
    assert factor[3, 4:].abs().max() == 0 and factor[:3, 3].abs().max() == 0  # no feedback from or to it
    assert torch.equal(inverse_factor(torch.zeros(16, 16)), torch.eye(16))
    with pytest.raises(PVQError, match="overflow"):
        inverse_factor(torch.full((16, 16), torch.inf))


def test_rotated_hessian_is_the_hessian_of_rotated_inputs():
    rotation = rotation_of(48)
    x = correlated_inputs(100, 48)
    original, rotated = HessianSum(48), HessianSum(48)
    original.add(x[:60])
    original.add(x[60:].reshape(2, 20, 48))
    rotated.add(rotation.rotate(x))
    expected = rotated.mean()
    torch.testing.assert_close(rotate_hessian(original.mean(), rotation), expected, rtol=1e-4, atol=1e-2)
    assert (original.mean() - expected).abs().max() > 1  # a rotation that does nothing cannot pass


def test_hessian_of_many_columns_is_whole_and_symmetric():
    """Wider than the blocks in which it is computed, and no multiple of them."""
    x = correlated_inputs(50, 600)
    total = HessianSum(600)
    total.add(x[:20])
    total.add(x[20:])
    mean = total.mean()
    expected = x.double().T @ x.double() / 50
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (mean[256:, :256] == mean[:256, 256:].T).all() and mean[512:, 256:512].abs().min() > 0


def prepared(width: int, tokens: int = 400) -> RotatedHessian:
    inputs = correlated_inputs(tokens, width)
    return RotatedHessian.of(inputs.T @ inputs / tokens, None)


def damped_of(hessian: RotatedHessian) -> torch.Tensor:
    return hessian.hessian.double() + hessian.damping * torch.eye(len(hessian.hessian), dtype=torch.float64)


def test_prepared_hessian_holds_the_metrics_of_its_groups():
    hessian = prepared(40)
    damped = damped_of(hessian)
    assert hessian.damping == pytest.approx(0.01 * hessian.hessian.diagonal().mean().item())
    torch.testing.assert_close(hessian.factor, inverse_factor(hessian.hessian))
    for g in range(5):
        block, rest = slice(8 * g, 8 * g + 8), slice(8 * g + 8, 40)
        # with the columns before fixed and those after free to answer: the Schur complement
        free = damped[block, block].clone()
        if g < 4:
            free -= damped[block, rest] @ torch.linalg.inv(damped[rest, rest]) @ damped[rest, block]
        for metrics, m in (
            (hessian.feedback_metrics[g], free),
            (hessian.descent_metrics[g], damped[block, block]),
        ):
            torch.testing.assert_close(metrics[1].double(), m, rtol=1e-3, atol=1e-3 * m.abs().max().item())
            inverse = torch.linalg.inv(metrics[0].double())
            torch.testing.assert_close(inverse @ inverse.T, m, rtol=1e-3, atol=1e-3 * m.abs().max().item())
            assert torch.equal(metrics[0], metrics[0].triu())


@pytest.mark.parametrize("name", ["pvq2", "pvq4", "int8"])
def test_feedback_follows_its_definition_group_by_group(name):
    """W_hat_Q = quantize(W_Q), then W_R -= (W_Q - W_hat_Q) U_QQ^-1 U_QR, written out in float64; 200 columns
    cross a block.
    """
    rows, width = 6, 200
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    hessian = prepared(width)
    scale = torch.full((rows,), 0.03)
    codes, q = feedback(weight, hessian, name, scale)
    assert torch.equal(quantizer_ops.decode_codes(codes, name), q)

    work, u = weight.double(), hessian.factor.double()
    half = 0.0 if name == "int8" else 0.5
    agreeing = 0
    for start in range(0, width, 8):
        group, rest = slice(start, start + 8), slice(start + 8, width)
        own, metrics = (
            u[group, group].float().contiguous(),
            hessian.feedback_metrics[start // 8 : start // 8 + 1],
        )
        _, expected, _ = quantizer_ops.feedback_block(
            work[:, group].float().contiguous(), own, metrics, name, scale
        )
        agreeing += (expected == q[:, group]).all(dim=1).sum().item()
        # go on from the module's own choice, so that a tie decided otherwise does not spoil what follows
        error = work[:, group] - (q[:, group].double() + half) * 0.03
        work[:, rest] -= (
            torch.linalg.solve_triangular(u[group, group], error, upper=True, left=False) @ u[group, rest]
        )
    assert agreeing >= rows * width // 8 * 0.97


def test_feedback_on_two_groups_equals_the_closed_form():
    """With two groups the second must be near w_2 + e_1 H_12 H_22^-1, the conditional optimum, in the metric
    H_22: no single other group of the sample's codewords may fit better by more than rounding.
    """
    hessian = prepared(16)
    damped = damped_of(hessian)
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    scale = torch.full((50,), 0.03)
    _, q = feedback(weight, hessian, "pvq4", scale)
    error = weight[:, :8].double() - (q[:, :8].double() + 0.5) * 0.03
    target = weight[:, 8:].double() + error @ damped[:8, 8:] @ torch.linalg.inv(damped[8:, 8:])

    def cost(q: torch.Tensor) -> torch.Tensor:
        off = target - (q.double() + 0.5) * 0.03
        return (off @ damped[8:, 8:] * off).sum(dim=1)

    _, nearest = quantizer_ops.quantize_rows(target.float().contiguous(), "pvq4", scale)
    assert (cost(q[:, 8:]) <= cost(nearest) * (1 + 1e-4)).float().mean() >= 0.96
    assert cost(q[:, 8:]).sum() < 0.9 * cost(nearest).sum()


@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4", "int8"])
def test_descent_lowers_the_loss_of_every_row(name):
    hessian = prepared(200)
    damped = damped_of(hessian)
    weight = torch.randn(20, 200, generator=torch.Generator().manual_seed(3))
    scale = torch.full((20,), 0.03)
    codes, q = feedback(weight, hessian, name, scale)
    half = 0.0 if name == "int8" else 0.5

    def loss() -> torch.Tensor:
        error = weight.double() - (q.double() + half) * 0.03
        return (error @ damped * error).sum(dim=1)

    losses = [loss()]
    for _ in range(3):
        descend(weight, codes, q, hessian, name, int(2 * half), scale)
        losses.append(loss())
        assert (losses[-1] <= losses[-2] * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.99 * losses[0].sum()
    assert torch.equal(quantizer_ops.decode_codes(codes, name), q)


def test_the_fitted_scale_is_the_best_of_all():
    hessian = prepared(32)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 32, generator=generator)
    levels = (weight / 0.03 + torch.randn(5, 32, generator=generator)).round()
    best = fit_scale(weight, levels, hessian.hessian, torch.ones(5))

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = (weight - scale[:, None] * levels).double()
        return (error @ hessian.hessian.double() * error).sum(dim=1)

    assert (loss(best) < loss(best * 1.002)).all() and (loss(best) < loss(best * 0.998)).all()
    assert torch.equal(fit_scale(weight, torch.zeros(5, 32), None, torch.ones(5)), torch.ones(5))


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=str)
@pytest.mark.parametrize("with_hessian", [False, True])
def test_quantized_tensors_fit_the_format_and_decode_to_what_was_promised(codebook, with_hessian):
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    before = weight.clone()
    rotation = rotation_of(96)
    inputs = correlated_inputs(300, 96)
    hessian = RotatedHessian.of(inputs.T @ inputs / 300, rotation) if with_hessian else None
    result = quantize_weight(weight, codebook, rotation, hessian, dequantize=True)
    assert torch.equal(weight, before)
    names = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
    expected = expected_tensors("x", codebook, 20, 96)
    assert {f"x.{kind}" for kind in result.tensors} == set(expected)
    for name, (dtype, shape) in expected.items():
        tensor = result.tensors[name.removeprefix("x.")]
        assert (tensor.dtype, tuple(tensor.shape)) == (names[dtype], shape)
    restored = dequantize_weight(result.tensors, codebook, 96, rotation, weight.dtype)
    assert torch.equal(restored, result.dequantized)
    error = (restored - weight).float()
    snr = 10 * torch.log10(weight.float().square().sum() / error.square().sum()).item()
    assert snr == pytest.approx(result.weight_snr_db, abs=0.4)  # bfloat16 adds noise at 55 dB
    assert snr > {"pvq2": 5, "pvq3": 10, "pvq4": 15, "int8": 35, "canonical": 8}[codebook.name]
    assert (result.output_snr_db is None) == (hessian is None)
    assert stored_weight_snr(weight, result.tensors, codebook, rotation) == pytest.approx(
        result.weight_snr_db, abs=1e-3
    )


@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4"])
def test_feedback_lowers_the_output_error(name):
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(4))
    rotation = rotation_of(192)
    inputs = correlated_inputs(1000, 192)
    hessian = RotatedHessian.of(inputs.T @ inputs / 1000, rotation)
    plain = quantize_weight(weight, Codebook(name), rotation, None, dequantize=True)
    fed_back = quantize_weight(weight, Codebook(name), rotation, hessian, dequantize=True)

    def output_snr(restored: torch.Tensor) -> float:
        return (
            10
            * torch.log10(
                (inputs @ weight.T).square().sum() / (inputs @ (weight - restored).T).square().sum()
            ).item()
        )

    assert output_snr(fed_back.dequantized) == pytest.approx(fed_back.output_snr_db, abs=0.05)
    assert fed_back.output_snr_db > output_snr(plain.dequantized) + 3
    assert fed_back.weight_snr_db < plain.weight_snr_db  # what it costs


@pytest.mark.parametrize("name", ["pvq2", "pvq3", "pvq4"])
def test_descent_gains_on_feedback_alone(name, monkeypatch):
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(4))
    hessian = prepared(192, tokens=1000)

    def output_snr(passes: int) -> float:
        monkeypatch.setattr(weight_quantizer, "DESCENT_PASSES", passes)
        return quantize_weight(weight, Codebook(name), None, hessian).output_snr_db

    alone, default = output_snr(0), output_snr(error_feedback.DESCENT_PASSES)
    assert default > alone + 0.5


def test_rows_of_zeros_stay_zero():
    weight = torch.randn(4, 64)
    weight[1] = 0
    weight[2] = 1e-12  # below float16 once divided by the codebook's rms
    for codebook in CODEBOOKS:
        for hessian in (None, RotatedHessian.of(torch.eye(64), None)):
            result = quantize_weight(weight, codebook, rotation_of(64), hessian, dequantize=True)
            assert result.tensors["weight_scale"][1] == 0 and result.dequantized[1].abs().max() == 0
            assert result.dequantized.isfinite().all()


def test_tall_matrices_are_done_in_pieces_with_the_same_result(monkeypatch):
    weight = torch.randn(37, 48)
    hessian = RotatedHessian.of(torch.eye(48), None)
    whole = quantize_weight(weight, Codebook("pvq4"), rotation_of(48), hessian, dequantize=True)
    monkeypatch.setattr("offline_quant.weight_quantizer.CHUNK_WEIGHTS", 48 * 10)
    pieces = quantize_weight(weight, Codebook("pvq4"), rotation_of(48), hessian, dequantize=True)
    assert all(torch.equal(whole.tensors[kind], pieces.tensors[kind]) for kind in whole.tensors)
    assert torch.equal(whole.dequantized, pieces.dequantized)
    assert whole.weight_snr_db == pytest.approx(pieces.weight_snr_db)


def test_a_width_without_groups_is_refused():
    with pytest.raises(PVQError, match="44"):
        quantize_weight(torch.zeros(2, 44), Codebook("pvq4"))
