# SPDX-License-Identifier: Apache-2.0
"""The softmax of attention scores (csrc/causal_softmax.h) against torch's in double precision."""

import pytest
import torch

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.quantizer_ops import causal_softmax


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 33), (5, 5), (16, 16), (17, 64), (7, 40), (128, 300)]
)
def test_each_query_sees_the_keys_up_to_its_own_position(queries, keys, size):
    scores = torch.randn(3, 2 * queries, keys, generator=torch.Generator().manual_seed(0)) * size
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1).repeat(2, 1)
    expected = scores.double().masked_fill(later, -torch.inf).softmax(dim=-1)
    result = causal_softmax(scores.clone(), queries)
    assert result.dtype == torch.bfloat16
    assert (result[:, later] == 0).all()
    # bfloat16 has eight binary digits; what is below float32's normal numbers may be 0
    error = (result.double() - expected).abs()
    assert (error <= expected * 2**-8 * 1.001 + 2.0**-125).all()


def test_large_scores_do_not_overflow():
    scores = torch.tensor([[[1e4, -1e30, 1e4, 3e38]]])
    assert causal_softmax(scores[..., :3].contiguous(), 1).tolist() == [[[0.5, 0.0, 0.5]]]
    assert causal_softmax(scores, 1).tolist() == [[[0.0, 0.0, 0.0, 1.0]]]


@pytest.mark.parametrize(("rows", "queries", "keys"), [(6, 4, 8), (6, 6, 5), (6, 0, 8)])
def test_queries_that_do_not_fit_the_scores_are_refused(rows, queries, keys):
    with pytest.raises(PVQError, match=f"{rows} rows and {keys} keys"):
        causal_softmax(torch.zeros(1, rows, keys), queries)
