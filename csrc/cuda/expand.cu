// SPDX-License-Identifier: Apache-2.0
// The part of a weight that prefill_wgmma.cu wants expanded before it starts. A warp takes a tile of a chunk.
#include <algorithm>

#include "expand.cuh"
#include "launch.h"
#include "mma.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32, kBlocks = 3;  // blocks of a multiprocessor
constexpr int kTablesFrom = 128;                                    // bytes from the start, behind the gains

constexpr std::int64_t table_alignment(CodebookId id) { return std::max(table_bytes(id), 128); }
constexpr std::int64_t shared_bytes(CodebookId id) {
  return round_up(kMaxSharedBase + kTablesFrom, table_alignment(id)) + table_bytes(id);
}

struct Parameters {
  Weight weight;
  Expansion expansion;
};

template <CodebookId kId>
__global__ void __launch_bounds__(kThreads, kBlocks) expand_kernel(const __grid_constant__ Parameters p) {
  constexpr int kPieceChunks = ExpansionOrder::kPieceChunks;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t base = shared_address(shared);
  constexpr std::uint32_t kAlignment = table_alignment(kId);
  const std::uint32_t table = (base + kTablesFrom + kAlignment - 1) & ~(kAlignment - 1);

  const ExpansionOrder& order = p.expansion.order;
  const int stride = gridDim.x * kWarps, end = p.expansion.first() * kPieceChunks;
  int i = blockIdx.x * kWarps + warp;
  LaneChunk<kId> next;
  const auto load = [&](int at, std::uint8_t*& to) {
    to = nullptr;
    if (at >= end) return;
    const ExpansionOrder::Piece piece = order.at(at / kPieceChunks);
    const int chunk = piece.group * kPieceChunks + at % kPieceChunks;
    if (chunk >= order.chunks || !p.expansion.exists(piece)) return;
    const ExpandedChunk<kId> place(p.weight, p.expansion, piece, chunk);
    next.load(place.from, lane);
    to = place.to;
  };
  std::uint8_t* to;
  load(i, to);
  for (int j = threadIdx.x; j < table_words(kId) / 4; j += kThreads)
    copy_async_16(shared + (table - base) + 16 * j, p.weight.table + 4 * j);
  write_gains<kId>(shared, threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  wait_for_dependencies();
  launch_dependents();
  for (int j = blockIdx.x * kThreads + threadIdx.x; j < order.counters(); j += gridDim.x * kThreads) p.expansion.counters[j] = 0;

  const Tables tables{table, base};
  while (i < end) {
    const LaneChunk<kId> chunk = next;
    std::uint8_t* const here = to;
    i += stride;
    load(i, to);
    if (here != nullptr) expand_chunk(chunk, tables, here, lane);
  }
}

template <CodebookId kId>
void start(const Parameters& p, bool leaves_room, cudaStream_t stream) {
  const int most = device_properties().num_sms * (kBlocks - (leaves_room ? 1 : 0));
  const int wanted = ceil_div(p.expansion.first() * ExpansionOrder::kPieceChunks, kWarps);
  launch(expand_kernel<kId>, dim3(static_cast<unsigned>(std::clamp(wanted, 1, most))), dim3(kThreads),
         static_cast<std::size_t>(shared_bytes(kId)), stream, p);
}

}  // namespace

void expand(const Weight& weight, const Expansion& expansion, bool leaves_room, cudaStream_t stream) {
  with_codebook(weight.codebook, [&](auto id) { start<decltype(id)::value>({weight, expansion}, leaves_room, stream); });
}

}  // namespace pvq::cuda
