// SPDX-License-Identifier: Apache-2.0
// The kernel of many_columns_wgmma.cu: a tile of y is the sum over chunks of decoded weights times activations.
//
// Two warpgroups have 64 rows each. Their warps fetch packed weights straight into registers, some chunks ahead, and decode a
// chunk there, in the order in which the tensor cores take it, while they multiply the one before. A warp more copies the
// activations to a ring of stages in shared memory, in the order they lie in global memory; one more for each warpgroup fetches
// what its epilogue needs (wgmma_finish.cuh).
#pragma once

#include <cuda_runtime.h>

#include "decode.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"
#include "wgmma_split.cuh"
#include "wgmma_work.cuh"

namespace pvq::cuda {

constexpr int kWgmmaThreads = kWgmmaGroups * 128 + 128;  // a warpgroup more: one of its warps copies, two load areas

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;  // with 256 columns
// Those of all threads at the start, in steps of eight; more would never come.
static_assert(128 * kCopyRegisters + 128 * kWgmmaGroups * kMultiplyRegisters <= kWgmmaThreads * (65536 / kWgmmaThreads / 8 * 8));

// Activations to stages, by one thread, from unit to unit (a chunk of a tile of y).
template <int kN>
struct WgmmaCopies {
  const WgmmaArguments& p;
  const WgmmaWork& work;
  int unit = 0, tile, chunk, bytes = 0;  // bytes: of all columns of the tile
  const std::int8_t* columns = nullptr;

  __device__ __forceinline__ WgmmaCopies(const WgmmaArguments& p, const WgmmaWork& work)
      : p(p), work(work), tile(work.first), chunk(work.begin) {
    start_tile();
  }
  __device__ __forceinline__ void start_tile() {
    if (tile >= p.schedule.order.tiles()) return;
    int row_tile, column_tile;
    p.schedule.order.place(tile, row_tile, column_tile);
    const std::int64_t first = static_cast<std::int64_t>(column_tile) * kN, left = p.a.padded_columns - first;
    bytes = static_cast<int>(left < kN ? left : kN) * kChunkColumns;
    columns = p.a.data + first * kChunkColumns;
  }
  __device__ __forceinline__ void advance() {
    ++unit;
    if (++chunk < work.end) return;
    if (work.middle > 0) {
      chunk = work.middle_begin + unit - (work.end - work.begin);
      return;
    }
    chunk = work.begin;
    tile += work.stride;
    start_tile();
  }
  __device__ __forceinline__ void copy(int stage) const {
    const std::uint32_t full = work.full(stage), to = work.stage(p.schedule, stage);
    const std::int8_t* from = columns + chunk * p.a.padded_columns * kChunkColumns;
    expect_bytes(full, bytes);
    copy_bulk(to, from, bytes, full);
  }
};

template <int kN>
__device__ __forceinline__ void copy_tiles(const WgmmaArguments& p, const WgmmaWork& work) {
  Ring ring;
  WgmmaCopies<kN> copies(p, work);
  for (const int units = work.units(p.schedule); copies.unit < units; copies.advance()) {
    wait_barrier(work.empty(ring.stage), ring.parity ^ 1);
    copies.copy(ring.stage);
    ring.advance(p.schedule.stages);
  }
}

__device__ __forceinline__ void pin(std::uint32_t (&values)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) pin(values[step]);
}

// The area of a warpgroup for each of its tiles, by a warp.
template <int kN>
__device__ __forceinline__ void load_areas(const WgmmaArguments& p, const WgmmaWork& work, char* shared, int warpgroup,
                                           int lane) {
  const FinishArea<kN> area(shared + kSharedArea + warpgroup * p.schedule.area_stride);
  std::uint32_t parity = 1;  // of the phase before; the first tile waits for none
  for (int tile = work.first; tile < p.schedule.order.tiles(); tile += work.stride, parity ^= 1) {
    int row_tile, column_tile;
    p.schedule.order.place(tile, row_tile, column_tile);
    wait_barrier(work.free(warpgroup), parity);
    area.load(p, row_tile * kWgmmaRows + warpgroup * 64, column_tile * kN, lane);
    arrive(work.ready(warpgroup));
  }
}

// Before activations are read. Of two launches, the second one may start from then on.
__device__ __forceinline__ void wait_for_activations(const WgmmaArguments& p) {
  if (!p.follows) wait_for_dependencies();
  if (p.followed) launch_dependents();
}

// Where a warp's next chunk of packed weights is. It is fetched up to kWgmmaAhead chunks before it is multiplied, from tile to
// tile; behind the last one, and where the warp has no rows, some are fetched again.
template <CodebookId kId, int kN, int kSplits>
struct WeightCursor {
  static constexpr int kChunkBytes = chunk_bytes(kId);
  // The place of the next tile is found when its first chunk is fetched, or once a tile, out of the loop. This decides in which
  // order ptxas puts the loop's instructions: either is 1 to 6% faster where it is used (docs/kernels_gpu.md).
  static constexpr bool kFindsInLoop = kSplits == 1 && kN == 256;

  const WgmmaArguments& p;
  const WgmmaWork& work;
  const int warp;
  int tile, left = 0, step = kChunkBytes;  // left: chunks of the tile
  const std::uint8_t *at, *next_tile;

  __device__ __forceinline__ WeightCursor(const WgmmaArguments& p, const WgmmaWork& work, int warp)
      : p(p), work(work), warp(warp), tile(work.first), at(p.weight.data), next_tile(at) {
    if constexpr (kFindsInLoop) {
      start_tile();
    } else {
      left = work.end - work.begin;
      at = next_tile = first_chunk(tile);
      find_next_tile();
    }
  }

  __device__ __forceinline__ void advance() {
    --left;
    if constexpr (kFindsInLoop) {
      if (left > 0) {
        at += step;
      } else {
        tile += work.stride;
        start_tile();
      }
    } else if constexpr (kSplits == 1) {
      if (left == 0) left = work.end;
      at = left == work.end ? next_tile : at + kChunkBytes;
    } else if (kSplits == 2 && left == 0) {
      at += (work.middle_begin - work.end + 1) * kChunkBytes;
    } else if (left > -middle_chunks(kSplits)) {
      at += kChunkBytes;
    }
  }

  // Before the first chunk of a tile is multiplied; those of the one after it are not fetched yet (choose_wgmma_schedule).
  __device__ __forceinline__ void find_next_tile() {
    if constexpr (kSplits == 1 && !kFindsInLoop) {
      tile += work.stride;
      if (tile < p.schedule.order.tiles()) next_tile = first_chunk(tile);
    }
  }

 private:
  __device__ __forceinline__ std::int64_t row_tile_of(int tile) const {  // of the warp, of kTileRows
    int row_tile, column_tile;
    p.schedule.order.place(tile, row_tile, column_tile);
    return row_tile * (kWgmmaRows / kTileRows) + warp;
  }
  __device__ __forceinline__ const std::uint8_t* first_chunk(int tile) const {
    const std::int64_t last = round_up(p.weight.rows, std::int64_t{kRowAlignment}) / kTileRows - 1;
    return p.weight.data + (min(row_tile_of(tile), last) * p.weight.num_chunks + work.begin) * kChunkBytes;
  }
  __device__ __forceinline__ void start_tile() {
    left = work.end - work.begin;
    step = 0;
    if (tile >= p.schedule.order.tiles()) return;
    const std::int64_t row_tile = row_tile_of(tile);
    if (row_tile / 4 * kRowAlignment >= p.weight.rows) return;
    at = p.weight.data + (row_tile * static_cast<int>(p.weight.num_chunks) + work.begin) * kChunkBytes;
    step = kChunkBytes;
  }
};

// A warpgroup. Each warp has 16 rows.
template <CodebookId kId, int kN, int kSplits>
__device__ __forceinline__ void multiply_tiles(const WgmmaArguments& p, const WgmmaWork& work, char* shared) {
  const WgmmaSchedule& s = p.schedule;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), warpgroup = warp / 4;
  const int lane = threadIdx.x % 32;

  WeightCursor<kId, kN, kSplits> weights(p, work, warp);
  LaneChunk<kId> packed[2];
  const auto refill = [&](int i) {
    packed[i].load(weights.at, lane);
    weights.advance();
  };
  // The second chunk after the table, which would come later behind it, but for one kernel whose loop then has an order of
  // instructions that is 2% slower.
  constexpr bool kBothFirst = kN == 128 && kSplits == 1;
  refill(0);
  if constexpr (kBothFirst) refill(1);

  // A chunk is looked up, expanded and multiplied in three iterations: what it takes of shared memory has come when it is needed.
  // It is copied out of the registers that the next but one is loaded to: loaded when they are free, that would come too late.
  const Tables tables{work.window + s.shared_digits, work.window + s.shared_gains};
  constexpr bool kLooksUp = table_bytes(kId) > 0;
  if constexpr (kLooksUp) wait_barrier(work.window + kTableBarrier, 0);
  if constexpr (!kBothFirst) refill(1);
  LaneChunk<kId> looked_up;
  typename LaneChunk<kId>::Found found[kSteps];
  const auto look_up = [&](int i) {
    if constexpr (kLooksUp) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) packed[i].find(step, tables, found[step]);
      looked_up = packed[i];
      refill(i);
    }
  };
  std::uint32_t a[2][kSteps][4];  // of the chunk that is multiplied, and of the next one
  // From the last step on (and find_joined reads gains before digits): what the compiler makes of that is 2 to 4% faster for
  // pairs of CTAs with 256 columns.
  const auto expand = [&](int i) {
#pragma unroll
    for (int step = kSteps - 1; step >= 0; --step) (kLooksUp ? looked_up : packed[i]).expand(step, found[step], a[i][step]);
    if constexpr (!kLooksUp) refill(i);
    pin(a[i]);
  };
  look_up(0);
  expand(0);
  look_up(1);
  if constexpr (kSplits == 2) wait_cluster();  // the other CTA has barriers
  wait_for_activations(p);

  std::int32_t acc[kN / 2] = {};
  Ring ring;
  const auto multiply_chunk = [&](auto which) {
    constexpr int kNow = decltype(which)::value, kNext = 1 - kNow;
    const std::uint64_t b = swizzled_operand(work.stage(s, ring.stage));
    wait_barrier(work.full(ring.stage), ring.parity);
    fence_operands();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      multiply_registers<kN>(acc, a[kNow][step], b + 2 * step);  // 32 bytes, in units of 16
    commit_products();
    expand(kNext);  // meanwhile; and while this warpgroup waits, the other one multiplies
    look_up(kNow);
    wait_products<0>();
    pin(a[kNow]);
    __syncwarp();
    if (lane == 0) arrive(work.empty(ring.stage));
    ring.advance(s.stages);
  };
  std::uint32_t parity = 0;
  for (int tile = work.first;;) {
    bool odd = true;
    for (int left = work.chunks(warpgroup == work.rank);;) {
      multiply_chunk(std::integral_constant<int, 0>{});
      if (--left == 0) break;
      multiply_chunk(std::integral_constant<int, 1>{});
      odd = --left > 0;
      if (!odd) break;
    }
    pin(acc);
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // what depends on it is not kept in registers from tile to tile
    thread &= 127;
    int row_tile, column_tile;
    s.order.place(tile, row_tile, column_tile);
    const int first_row = row_tile * kWgmmaRows + warpgroup * 64, first_column = column_tile * kN;
    const FinishArea<kN> area(shared + kSharedArea + warpgroup * s.area_stride);
    if constexpr (kSplits == 2) {
      return finish_pair<kN>(p, work, area, warpgroup, thread, acc, first_row, first_column);
    } else if constexpr (kSplits == 3) {
      return finish_three<kN>(p, work, area, warpgroup, thread, acc, first_row, first_column);
    } else {
      wait_barrier(work.ready(warpgroup), parity);
      if (first_row < p.weight.rows)
        finish_tile<kN>(p, area, first_row, first_column, thread, kWarpgroupBarrier + warpgroup, acc);
      tile += work.stride;
      if (tile >= s.order.tiles()) return;
      weights.find_next_tile();
      arrive(work.free(warpgroup));
      parity ^= 1;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
      if (odd) {  // the next tile begins as this one did
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i) a[0][step][i] = a[1][step][i];
        const LaneChunk<kId> other = packed[0];
        packed[0] = packed[1];
        packed[1] = other;
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <CodebookId kId, int kN, int kSplits>
__global__ void __launch_bounds__(kWgmmaThreads, 1) many_columns_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char dynamic[];
  // Within a cluster an address has the number of the CTA in its upper bits.
  const std::uint32_t window = shared_address(dynamic) - kSharedBase;
  if ((shared_address(dynamic) & 0xffffffu) != kSharedBase) __trap();  // the schedule counts on it
  char* shared = dynamic - kSharedBase;
  const WgmmaSchedule& s = p.schedule;

  if (!p.followed) launch_dependents();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const WgmmaWork work(s, static_cast<int>(cluster_rank()), kSplits, static_cast<int>(p.weight.num_chunks), window);
  if (threadIdx.x == 0) {
    init_barrier(window + kTableBarrier, 1);
    for (int stage = 0; stage < s.stages; ++stage) {
      init_barrier(work.full(stage), 1);
      init_barrier(work.empty(stage), kWgmmaGroups * 4);
    }
    for (int warpgroup = 0; warpgroup < kWgmmaGroups; ++warpgroup) {
      init_barrier(work.ready(warpgroup), 32);
      init_barrier(work.free(warpgroup), 128);
    }
    if constexpr (kSplits > 1) {
      for (int part = 0; part < kSplitParts; ++part) init_barrier(work.part(part), 1);
    }
    fence_barrier_init();
    if constexpr (kSplits == 2) expect_pair<kN>(work);
    if constexpr (table_bytes(kId) > 0) {
      expect_bytes(window + kTableBarrier, table_bytes(kId));
      copy_bulk(window + s.shared_digits, p.weight.table, table_bytes(kId), window + kTableBarrier);
    }
  }
  if constexpr (table_bytes(kId) > 0) {
    if (warp == kWgmmaGroups * 4) write_gains<kId>(shared + kSharedGains, lane);
  }
  __syncthreads();
  if constexpr (kSplits == 2) arrive_cluster();

  if (warp >= kWgmmaGroups * 4) {
    if constexpr (kN == 256) shrink_registers<kCopyRegisters>();
    if constexpr (kSplits == 2) wait_cluster();
    wait_for_activations(p);
    if (warp == kWgmmaGroups * 4) {
      if (lane == 0) copy_tiles<kN>(p, work);
    } else if (warp <= kWgmmaGroups * 4 + kWgmmaGroups) {
      load_areas<kN>(p, work, shared, warp - kWgmmaGroups * 4 - 1, lane);
    }
    __syncwarp();
    if constexpr (kSplits == 3) synchronize_cluster();  // with finish_three
    if (p.follows) wait_for_dependencies();             // what comes next waits for this launch only
  } else {
    if constexpr (kN == 256) grow_registers<kMultiplyRegisters>();
    multiply_tiles<kId, kN, kSplits>(p, work, shared);
  }
#endif
}

template <CodebookId kId>
void launch_many_columns_wgmma(const WgmmaArguments& p, cudaStream_t stream) {
  const WgmmaSchedule& s = p.schedule;
  const auto start = [&](auto columns) {
    constexpr int kN = decltype(columns)::value;
    const dim3 grid(static_cast<unsigned>(s.workers * s.splits)), block(kWgmmaThreads);
    const auto kernel = s.splits == 3   ? many_columns_wgmma_kernel<kId, kN, 3>
                        : s.splits == 2 ? many_columns_wgmma_kernel<kId, kN, 2>
                                        : many_columns_wgmma_kernel<kId, kN, 1>;
    launch_clusters(s.splits, p.follows || starts_early(p.a, grid.x), kernel, grid, block,
                    static_cast<std::size_t>(s.shared_bytes), stream, p);
  };
  switch (s.columns_per_tile) {
    case 128:
      return start(std::integral_constant<int, 128>{});
    default:
      return start(std::integral_constant<int, 256>{});
  }
}

// One source file for each codebook: they compile side by side.
extern template void launch_many_columns_wgmma<CodebookId::kPvq2>(const WgmmaArguments&, cudaStream_t);
extern template void launch_many_columns_wgmma<CodebookId::kPvq3>(const WgmmaArguments&, cudaStream_t);
extern template void launch_many_columns_wgmma<CodebookId::kPvq4>(const WgmmaArguments&, cudaStream_t);
extern template void launch_many_columns_wgmma<CodebookId::kInt8>(const WgmmaArguments&, cudaStream_t);

}  // namespace pvq::cuda
