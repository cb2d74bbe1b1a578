# SPDX-License-Identifier: Apache-2.0
"""The rotation by matrix products is the codec's rotation, both ways."""

import pytest
import torch

from offline_quant.rotation import rotate_rows, unrotate_rows
from pvq_vllm.codec.rotation import Rotation, rotation_layout


@pytest.mark.parametrize(
    ("width", "splits"), [(8, 1), (576, 1), (1536, 1), (4096, 1), (14336, 1), (1536, 2), (96, 4)]
)
def test_products_with_small_matrices_equal_the_codec(width, splits):
    blocks, factors = rotation_layout(width, splits)
    rotation = Rotation(5, width, blocks, factors)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    rotated = rotate_rows(x, rotation)
    torch.testing.assert_close(rotated, rotation.rotate(x), rtol=0, atol=2e-5)
    assert (rotated - x).abs().max() > 0.5
    torch.testing.assert_close(unrotate_rows(rotated, rotation), x, rtol=0, atol=2e-5)


def test_no_rotation_is_the_identity():
    x = torch.randn(2, 24)
    assert rotate_rows(x, None) is x and unrotate_rows(x, None) is x
    assert torch.equal(rotate_rows(x, Rotation(0, 24, 0, [])), x)
