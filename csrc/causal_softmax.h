// SPDX-License-Identifier: Apache-2.0
// Softmax of attention scores, for positions that see themselves and those before them only.
#pragma once

#include <cstdint>

namespace pvq {

// probabilities[r] = softmax(scores[r]) over the keys that row r sees, rounded to bfloat16, and 0 behind them: one pass over
// memory. Row r is query r % queries of the last `queries` positions, so that it sees keys - queries + r % queries + 1 of them.
// scores [rows, keys] are overwritten.
void causal_softmax(float* scores, std::int64_t rows, std::int64_t queries, std::int64_t keys, std::uint16_t* probabilities);

}  // namespace pvq
