// SPDX-License-Identifier: Apache-2.0
// `pvq` activations: the pyramid S(D, K) that every group of D activations is projected onto (docs/format.md §6).
#pragma once

namespace pvq {

struct Projection {
  int group_size = 0, num_pulses = 0;  // D, K; 0, 0: no projection, the activations are a8 or a16
};

constexpr int kMinProjectedGroup = 8, kMaxProjectedGroup = 256;  // powers of two
constexpr int kMaxProjectedPulses = 4096;                        // K^2 is exact in float32

}  // namespace pvq
