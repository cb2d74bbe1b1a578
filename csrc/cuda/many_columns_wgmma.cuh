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

namespace pvq::cuda {

constexpr int kWgmmaGroups = 2;                          // that multiply
constexpr int kWgmmaThreads = kWgmmaGroups * 128 + 128;  // a warpgroup more: one of its warps copies, two load areas

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;  // with 256 columns
// Those of all threads at the start, in steps of eight; more would never come.
static_assert(128 * kCopyRegisters + 128 * kWgmmaGroups * kMultiplyRegisters <= kWgmmaThreads * (65536 / kWgmmaThreads / 8 * 8));

// Addresses in shared memory.
constexpr int kTableBarrier = kSharedBase, kFullBarriers = kSharedBase + 16, kEmptyBarriers = kFullBarriers + 8 * kWgmmaMaxStages;
constexpr int kPartBarriers = kEmptyBarriers + 8 * kWgmmaMaxStages;  // [most_parts][kWgmmaGroups]
// Of a warpgroup's area: it holds what the tile needs; it can be filled again.
constexpr int kReadyBarriers = kPartBarriers + 8 * most_parts(2) * kWgmmaGroups,
              kFreeBarriers = kReadyBarriers + 8 * kWgmmaGroups;
static_assert(kFreeBarriers + 8 * kWgmmaGroups <= kSharedGains && kSharedGains % 64 == 0 &&
              kSharedGains + kGainTableBytes <= kSharedArea);

constexpr int kWarpgroupBarrier = 1;  // named, one for each warpgroup that multiplies; 0 is __syncthreads

// What a CTA does: chunks [begin, end) of the tiles first, first + stride, ...
struct WgmmaWork {
  int first, stride, begin, end, rank;
  std::uint32_t window;  // where this CTA's shared memory starts

  __device__ __forceinline__ int units(const WgmmaSchedule& s) const {
    return ((s.order.tiles() - 1 - first) / stride + 1) * (end - begin);
  }
  __device__ __forceinline__ std::uint32_t full(int stage) const { return window + kFullBarriers + 8 * stage; }
  __device__ __forceinline__ std::uint32_t empty(int stage) const { return window + kEmptyBarriers + 8 * stage; }
  __device__ __forceinline__ std::uint32_t ready(int warpgroup) const { return window + kReadyBarriers + 8 * warpgroup; }
  __device__ __forceinline__ std::uint32_t free(int warpgroup) const { return window + kFreeBarriers + 8 * warpgroup; }
  __device__ __forceinline__ std::uint32_t part(int part, int warpgroup) const {
    return window + kPartBarriers + 8 * (part * kWgmmaGroups + warpgroup);
  }
  __device__ __forceinline__ std::uint32_t stage(const WgmmaSchedule& s, int stage) const {
    return window + s.shared_stages + stage * s.stage_bytes;
  }
};

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

// Values of which the compiler knows no more than that they are in registers, from here on.
template <typename Value, int kCount>
__device__ __forceinline__ void pin(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i]));
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

// The CTAs of a cluster send each other their sums, and each adds up and finishes its parts of the columns. A warpgroup.
template <int kN>
__device__ __forceinline__ void finish_split(const WgmmaArguments& p, const WgmmaWork& work, const FinishArea<kN>& area,
                                             int warpgroup, int thread, const std::int32_t (&acc)[kN / 2], int first_row,
                                             int first_column) {
  constexpr int kPart = kN / kSplitParts, kQuads = kPart / 8, kBytes = kQuads * 2048;  // of a part: of a CTA and a warpgroup
  const int splits = p.schedule.splits, first = first_part(work.rank, splits);
  const int parts = min(kSplitParts, ceil_div(static_cast<int>(p.a.num_columns()) - first_column, kPart));  // that exist
  synchronize_cluster();  // all stages have been read
  if (first_row >= p.weight.rows) return;
  const std::uint32_t sums = work.window + p.schedule.shared_stages + thread * 16;
  const auto place = [&](int part, int rank) { return ((part * kWgmmaGroups + warpgroup) * splits + rank) * kBytes; };
  const int bound = first_part(1, splits), bound2 = splits > 2 ? first_part(2, splits) : kSplitParts;
#pragma unroll
  for (int part = 0; part < kSplitParts; ++part) {
    if (part >= parts) break;
    const int owner = (part >= bound) + (part >= bound2), local = part - (part >= bound2 ? bound2 : part >= bound ? bound : 0);
    const std::uint32_t to = sums + place(local, work.rank);
    const std::int32_t* v = acc + part * (kPart / 2);
    if (owner == work.rank) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) store_shared(to + q * 2048, make_int4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]));
    } else {
      const std::uint32_t remote = address_in(to, owner), barrier = address_in(work.part(local, warpgroup), owner);
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        send(remote + q * 2048, make_int4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]), barrier);
    }
  }
  const int mine = min(first_part(work.rank + 1, splits), parts) - first;
  if (mine <= 0) return;
  using Finish = WgmmaFinish<kPart, kN>;
  Finish(p, area, first_row, first_column, first * kPart, thread, kWarpgroupBarrier + warpgroup)
      .template store<1>(mine, [&](int part, typename Finish::Sums& total) {
        if (thread == 0) expect_bytes(work.part(part, warpgroup), (splits - 1) * kBytes);
        wait_barrier(work.part(part, warpgroup), 0);
#pragma unroll
        for (int i = 0; i < Finish::kSums; ++i) total[i] = 0;
        for (int rank = 0; rank < splits; ++rank) {
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            const int4 v = shared_quad(sums + place(part, rank) + q * 2048);
            total[4 * q] += v.x;
            total[4 * q + 1] += v.y;
            total[4 * q + 2] += v.z;
            total[4 * q + 3] += v.w;
          }
        }
      });
}

// A warpgroup. Each warp has 16 rows.
template <CodebookId kId, int kN, bool kSplit>
__device__ __forceinline__ void multiply_tiles(const WgmmaArguments& p, const WgmmaWork& work, char* shared) {
  constexpr int kChunkBytes = chunk_bytes(kId);
  const WgmmaSchedule& s = p.schedule;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), warpgroup = warp / 4;
  const int lane = threadIdx.x % 32, num_chunks = static_cast<int>(p.weight.num_chunks);

  // Packed weights are on their way to registers two chunks ahead. Past the last chunk, and without rows, some are read again.
  int load_tile = work.first, loads_left = 0, load_step = 0;  // chunks left of the tile of y
  const std::uint8_t* load_from = p.weight.data;
  const auto start_tile = [&] {
    loads_left = work.end - work.begin;
    load_step = 0;
    if (load_tile >= s.order.tiles()) return;
    int row_tile, column_tile;
    s.order.place(load_tile, row_tile, column_tile);
    const std::int64_t tile = row_tile * kWgmmaRows / kTileRows + warp;
    if (tile / 4 * kRowAlignment >= p.weight.rows) return;
    load_from = p.weight.data + (tile * num_chunks + work.begin) * kChunkBytes;
    load_step = kChunkBytes;
  };
  const auto next_load = [&] {
    if (--loads_left > 0) {
      load_from += load_step;
    } else {
      load_tile += work.stride;
      start_tile();
    }
  };
  LaneChunk<kId> packed[2];
  const auto refill = [&](int i) {
    packed[i].load(load_from, lane);
    next_load();
  };
  start_tile();
  refill(0);
  refill(1);

  // A chunk is looked up, expanded and multiplied in three iterations: what it takes of shared memory has come when it is needed.
  // It is copied out of the registers that the next but one is loaded to: loaded when they are free, that would come too late.
  const Tables tables{work.window + s.shared_digits, work.window + s.shared_gains};
  constexpr bool kLooksUp = table_bytes(kId) > 0;
  if constexpr (kLooksUp) wait_barrier(work.window + kTableBarrier, 0);
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
  const auto expand = [&](int i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) (kLooksUp ? looked_up : packed[i]).expand(step, found[step], a[i][step]);
    if constexpr (!kLooksUp) refill(i);
    pin(a[i]);
  };
  look_up(0);
  expand(0);
  look_up(1);
  wait_for_dependencies();

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
    for (int left = work.end - work.begin;;) {
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
    wait_barrier(work.ready(warpgroup), parity);
    if constexpr (kSplit) {
      finish_split<kN>(p, work, area, warpgroup, thread, acc, first_row, first_column);
      return;  // a tile each
    } else {
      if (first_row < p.weight.rows)
        finish_tile<kN>(p, area, first_row, first_column, thread, kWarpgroupBarrier + warpgroup, acc);
      tile += work.stride;
      if (tile >= s.order.tiles()) return;
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

template <CodebookId kId, int kN, bool kSplit>
__global__ void __launch_bounds__(kWgmmaThreads, 1) many_columns_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char dynamic[];
  // Within a cluster an address has the number of the CTA in its upper bits.
  const std::uint32_t window = shared_address(dynamic) - kSharedBase;
  if ((shared_address(dynamic) & 0xffffffu) != kSharedBase) __trap();  // the schedule counts on it
  char* shared = dynamic - kSharedBase;
  const WgmmaSchedule& s = p.schedule;

  launch_dependents();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), num_chunks = static_cast<int>(p.weight.num_chunks);
  WgmmaWork work{static_cast<int>(blockIdx.x) / s.splits, s.workers, 0, num_chunks, rank, window};
  if constexpr (kSplit) {
    work.begin = num_chunks * rank / s.splits;
    work.end = num_chunks * (rank + 1) / s.splits;
  }
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
    if constexpr (kSplit) {
      for (int i = 0; i < most_parts(2) * kWgmmaGroups; ++i) init_barrier(window + kPartBarriers + 8 * i, 1);
    }
    fence_barrier_init();
    if constexpr (table_bytes(kId) > 0) {
      expect_bytes(window + kTableBarrier, table_bytes(kId));
      copy_bulk(window + s.shared_digits, p.weight.table, table_bytes(kId), window + kTableBarrier);
    }
  }
  if constexpr (table_bytes(kId) > 0) {
    if (warp == kWgmmaGroups * 4) write_gains<kId>(shared + kSharedGains, lane);
  }
  __syncthreads();

  if (warp >= kWgmmaGroups * 4) {
    if constexpr (kN == 256) shrink_registers<kCopyRegisters>();
    wait_for_dependencies();
    if (warp == kWgmmaGroups * 4) {
      if (lane == 0) copy_tiles<kN>(p, work);
    } else if (warp <= kWgmmaGroups * 4 + kWgmmaGroups) {
      load_areas<kN>(p, work, shared, warp - kWgmmaGroups * 4 - 1, lane);
    }
    __syncwarp();
    if constexpr (kSplit) synchronize_cluster();  // with finish_split
  } else {
    if constexpr (kN == 256) grow_registers<kMultiplyRegisters>();
    multiply_tiles<kId, kN, kSplit>(p, work, shared);
  }
#endif
}

template <CodebookId kId>
void launch_many_columns_wgmma(const WgmmaArguments& p, cudaStream_t stream) {
  const WgmmaSchedule& s = p.schedule;
  const auto start = [&](auto columns) {
    constexpr int kN = decltype(columns)::value;
    const dim3 grid(static_cast<unsigned>(s.workers * s.splits)), block(kWgmmaThreads);
    const auto kernel = s.splits > 1 ? many_columns_wgmma_kernel<kId, kN, true> : many_columns_wgmma_kernel<kId, kN, false>;
    launch_clusters(s.splits, starts_early(p.a, grid.x), kernel, grid, block, static_cast<std::size_t>(s.shared_bytes), stream,
                    p);
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
