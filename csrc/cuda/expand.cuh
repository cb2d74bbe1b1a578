// SPDX-License-Identifier: Apache-2.0
// What expand.cu and the spare warps of prefill_wgmma.cu share: a warp and the chunks that it expands.
#pragma once

#include "decode.cuh"
#include "expand.h"

namespace pvq::cuda {

// A tile of a chunk, packed and expanded.
template <CodebookId kId>
struct ExpandedChunk {
  const std::uint8_t* from;
  std::uint8_t* to;

  ExpandedChunk() = default;
  __device__ __forceinline__ ExpandedChunk(const Weight& weight, const Expansion& e, const ExpansionOrder::Piece& piece,
                                           int chunk) {
    const std::int64_t chunks = e.order.chunks;
    from = weight.data + (static_cast<std::int64_t>(piece.block * kBlockTiles + piece.tile) * chunks + chunk) * chunk_bytes(kId);
    to = e.data + ((piece.block * chunks + chunk) * kBlockTiles + piece.tile) * kExpandedTile;
  }
  __device__ __forceinline__ void next() {
    from += chunk_bytes(kId);
    to += kBlockTiles * kExpandedTile;
  }
};

// A lane's registers of a step are words of rows g and g + 8, of the first and the second 16 bytes of its 32.
template <CodebookId kId>
__device__ __forceinline__ void expand_chunk(const LaneChunk<kId>& packed, const Tables& tables, std::uint8_t* to, int lane) {
  constexpr int kRows = 8 * kChunkColumns / 4, kUnit = 8 * 16 / 4;  // words of eight rows; of 16 bytes of them
  std::uint32_t* words = reinterpret_cast<std::uint32_t*>(to) + lane;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    std::uint32_t a[4];
    decode(packed, step, tables, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i % 2 * kRows + (2 * step + i / 2) * kUnit] = a[i];
  }
}

}  // namespace pvq::cuda
