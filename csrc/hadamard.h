// SPDX-License-Identifier: Apache-2.0
// Hadamard matrices by Paley's constructions and the random signs of the rotation (docs/format.md §5).
#pragma once

#include <cstdint>
#include <vector>

namespace pvq {

constexpr bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

// True for 2^k, p + 1 with p prime = 3 mod 4, and 2 (p + 1) with p prime = 1 mod 4.
bool is_hadamard_order(int order);

// [order, order] of +-1, row-major; `order` must satisfy is_hadamard_order and not be a power of two.
std::vector<float> dense_hadamard(int order);

// s_i for i in [first, first + count): -1 where the bit of the SplitMix64 stream is set.
std::vector<float> rotation_signs(std::uint64_t seed, std::int64_t first, std::int64_t count);

}  // namespace pvq
