# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from benchmarks.snr import REFERENCE, TOLERANCE_DB, canonical_snr


@pytest.mark.parametrize("group_size, num_pulses", REFERENCE)
def test_canonical_codebook_has_the_expected_snr_on_gaussian_weights(group_size, num_pulses):
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    values = canonical_snr(weight, group_size, num_pulses)
    assert values == pytest.approx(REFERENCE[group_size, num_pulses], abs=TOLERANCE_DB)
