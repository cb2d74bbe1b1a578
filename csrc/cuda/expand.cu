// SPDX-License-Identifier: Apache-2.0
// A warp takes a chunk of 16 rows, 2 KB decoded and contiguous. It turns the fragments over in shared memory: the swizzle spreads
// the words of a fragment over all banks.
#include <algorithm>
#include <stdexcept>

#include "decode.cuh"
#include "expand.h"
#include "launch.h"
#include "mma.cuh"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / 32, kBlocks = 3;  // blocks of a multiprocessor
constexpr int kExpandedTile = kTileRows * kChunkColumns;
constexpr int kStages = 128, kTablesFrom = kStages + kWarps * kExpandedTile;  // bytes from the start: gains, stages, digits

constexpr std::int64_t table_alignment(CodebookId id) { return std::max(table_bytes(id), 128); }
constexpr std::int64_t shared_bytes(CodebookId id) {
  return round_up(kMaxSharedBase + kTablesFrom, table_alignment(id)) + table_bytes(id);
}

struct Parameters {
  const std::uint8_t* weight;
  const std::uint32_t* table;
  std::uint8_t* expanded;
  std::int32_t tiles_by_chunks, chunks;

  // In the order of the result: [64 rows][chunk][tile].
  struct Place {
    std::int64_t row_group, chunk;
    int tile;
  };
  __device__ __forceinline__ Place place(int i) const {
    const int rest = i / 4, row_group = rest / chunks;
    return {row_group, rest - row_group * chunks, i % 4};
  }
  template <CodebookId kId>
  __device__ __forceinline__ const std::uint8_t* from(int i) const {
    const Place at = place(i);
    return weight + ((at.row_group * 4 + at.tile) * chunks + at.chunk) * chunk_bytes(kId);
  }
  __device__ __forceinline__ std::uint8_t* to(int i) const {
    const Place at = place(i);
    return expanded + ((at.row_group / 2 * chunks + at.chunk) * 8 + at.row_group % 2 * 4 + at.tile) * kExpandedTile;
  }
};

__device__ __forceinline__ uint4 load_words(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

template <CodebookId kId>
__global__ void __launch_bounds__(kThreads, kBlocks) expand_kernel(const Parameters p) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const std::uint32_t base = shared_address(shared);
  constexpr std::uint32_t kAlignment = table_alignment(kId);
  const std::uint32_t table = (base + kTablesFrom + kAlignment - 1) & ~(kAlignment - 1);

  const int stride = gridDim.x * kWarps;
  int i = blockIdx.x * kWarps + warp;
  LaneChunk<kId> next;
  if (i < p.tiles_by_chunks) next.load(p.from<kId>(i), lane);
  for (int j = threadIdx.x; j < table_words(kId) / 4; j += kThreads)
    copy_async_16(shared + (table - base) + 16 * j, p.table + 4 * j);
  write_gains<kId>(shared, threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  wait_for_dependencies();
  launch_dependents();

  const Tables tables{table, base};
  const std::uint32_t stage = base + kStages + warp * kExpandedTile;
  const std::uint32_t row = stage + g * kChunkColumns + 4 * t;
  for (; i < p.tiles_by_chunks; i += stride) {
    const LaneChunk<kId> chunk = next;
    if (i + stride < p.tiles_by_chunks) next.load(p.from<kId>(i + stride), lane);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      std::uint32_t a[4];
      chunk.decode(s, tables, a);
      const std::uint32_t low = row + 16 * ((2 * s) ^ g), high = row + 16 * ((2 * s + 1) ^ g);
      store_shared(low, a[0]);
      store_shared(low + 8 * kChunkColumns, a[1]);
      store_shared(high, a[2]);
      store_shared(high + 8 * kChunkColumns, a[3]);
    }
    __syncwarp();
    uint4* to = reinterpret_cast<uint4*>(p.to(i)) + lane;
#pragma unroll
    for (int j = 0; j < 4; ++j) to[32 * j] = load_words(stage + 512 * j + 16 * lane);
    __syncwarp();
  }
}

template <CodebookId kId>
void start(const Parameters& p, bool leaves_room, cudaStream_t stream) {
  const int most = device_properties().num_sms * (kBlocks - (leaves_room ? 1 : 0)),
            wanted = (p.tiles_by_chunks + kWarps - 1) / kWarps;
  launch(expand_kernel<kId>, dim3(static_cast<unsigned>(std::min(most, wanted))), dim3(kThreads),
         static_cast<std::size_t>(shared_bytes(kId)), stream, p);
}

}  // namespace

void expand(const Weight& weight, std::uint8_t* expanded, bool leaves_room, cudaStream_t stream) {
  if (weight.rows <= 0) return;
  const std::int64_t tiles = padded_rows(weight.rows) / kTileRows;
  const Parameters p{weight.data, weight.table, expanded, static_cast<std::int32_t>(tiles * weight.num_chunks),
                     static_cast<std::int32_t>(weight.num_chunks)};
  switch (weight.codebook) {
    case CodebookId::kPvq2:
      return start<CodebookId::kPvq2>(p, leaves_room, stream);
    case CodebookId::kPvq3:
      return start<CodebookId::kPvq3>(p, leaves_room, stream);
    case CodebookId::kPvq4:
      return start<CodebookId::kPvq4>(p, leaves_room, stream);
    case CodebookId::kInt8:
      return start<CodebookId::kInt8>(p, leaves_room, stream);
  }
  throw std::runtime_error("expand: unknown codebook");
}

}  // namespace pvq::cuda
