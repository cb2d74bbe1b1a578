// SPDX-License-Identifier: Apache-2.0
// The kernel of many_columns_wgmma.cu: a tile of y is the sum over chunks of decoded weights times activations.
//
// Two warpgroups have 64 rows each. Their warps fetch packed weights straight into registers, some chunks ahead, and decode a
// chunk there, in the order in which the tensor cores take it, while they multiply the one before. A warp more copies the
// activations to a ring of stages in shared memory, in the order they lie in global memory.
#pragma once

#include <cuda_runtime.h>

#include "decode.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"

namespace pvq::cuda {

constexpr int kWgmmaGroups = 2;                          // that multiply
constexpr int kWgmmaThreads = kWgmmaGroups * 128 + 128;  // a warpgroup more: one of its warps copies

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;  // with 256 columns
// Those of all threads at the start, in steps of eight; more would never come.
static_assert(128 * kCopyRegisters + 128 * kWgmmaGroups * kMultiplyRegisters <= kWgmmaThreads * (65536 / kWgmmaThreads / 8 * 8));

// Addresses in shared memory.
constexpr int kTableBarrier = kSharedBase, kFullBarriers = kSharedBase + 16, kEmptyBarriers = kFullBarriers + 8 * kWgmmaMaxStages;
static_assert(kEmptyBarriers + 8 * kWgmmaMaxStages <= kSharedGains && kSharedGains % 64 == 0 &&
              kSharedGains + kGainTableBytes <= kSharedArea);

constexpr int kMultiplyingBarrier = 1, kWarpgroupBarrier = 2;  // named; 0 is __syncthreads

// What a CTA does: chunks [begin, end) of the tiles first, first + stride, ...
struct WgmmaWork {
  int first, stride, begin, end, rank;
  std::uint32_t window;  // where this CTA's shared memory starts

  __device__ __forceinline__ int units(const WgmmaSchedule& s) const {
    return ((s.tiles() - 1 - first) / stride + 1) * (end - begin);
  }
  __device__ __forceinline__ std::uint32_t full(int stage) const { return window + kFullBarriers + 8 * stage; }
  __device__ __forceinline__ std::uint32_t empty(int stage) const { return window + kEmptyBarriers + 8 * stage; }
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
    if (tile >= p.schedule.tiles()) return;
    int row_tile, column_tile;
    p.schedule.place(tile, row_tile, column_tile);
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

// The CTAs of a cluster add their sums up, and each finishes its part of the columns. All threads of the warpgroups that
// multiply.
template <int kN>
__device__ __forceinline__ void finish_split(const WgmmaArguments& p, const WgmmaWork& work, char* shared, int warpgroup,
                                             int thread, const std::int32_t (&acc)[kN / 2], int first_row, int first_column) {
  constexpr int kParts = 8, kPart = kN / kParts, kQuads = kN / 8, kPartQuads = kQuads / kParts;
  const WgmmaSchedule& s = p.schedule;
  synchronize_threads(kMultiplyingBarrier, 128 * kWgmmaGroups);  // the stages have been read
  int4* sums = reinterpret_cast<int4*>(shared + s.shared_stages) + warpgroup * kQuads * 128 + thread;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) sums[q * 128] = make_int4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
  synchronize_cluster();
  const std::uint32_t address = work.window + s.shared_stages + (warpgroup * kQuads * 128 + thread) * 16;
  const int last = kParts * (work.rank + 1) / s.splits;
  for (int part = kParts * work.rank / s.splits; part < last; ++part) {
    if (first_row >= p.weight.rows || first_column + part * kPart >= p.a.num_columns()) break;
    std::int32_t total[kPart / 2] = {};
    for (int rank = 0; rank < s.splits; ++rank) {
      const std::uint32_t other = address_in(address + part * kPartQuads * 2048, rank);
#pragma unroll
      for (int q = 0; q < kPartQuads; ++q) {
        const int4 v = load_remote(other + q * 2048);
        total[4 * q] += v.x;
        total[4 * q + 1] += v.y;
        total[4 * q + 2] += v.z;
        total[4 * q + 3] += v.w;
      }
    }
    WgmmaFinish<kPart> finish(p, first_row, first_column + part * kPart, thread, shared + kSharedArea + warpgroup * s.area_stride,
                              kWarpgroupBarrier + warpgroup);
    finish.load();
    finish.store(total);
  }
}

// A warpgroup. Each warp has 16 rows.
template <CodebookId kId, int kN, bool kSplit>
__device__ __forceinline__ void multiply_tiles(const WgmmaArguments& p, const WgmmaWork& work, char* shared) {
  constexpr int kChunkBytes = chunk_bytes(kId);
  const WgmmaSchedule& s = p.schedule;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), warpgroup = warp / 4;
  const int lane = threadIdx.x % 32, num_chunks = static_cast<int>(p.weight.num_chunks);

  // Packed weights are on their way to registers two chunks ahead.
  int load_tile = work.first, loads_left = 0;  // chunks left of the tile of y
  bool has_rows = false;
  const std::uint8_t* load_from = nullptr;
  const auto start_tile = [&] {
    loads_left = work.end - work.begin;
    has_rows = false;
    if (load_tile >= s.tiles()) return;
    int row_tile, column_tile;
    s.place(load_tile, row_tile, column_tile);
    const std::int64_t tile = row_tile * kWgmmaRows / kTileRows + warp;
    has_rows = tile / 4 * kRowAlignment < p.weight.rows;
    load_from = p.weight.data + (tile * num_chunks + work.begin) * kChunkBytes;
  };
  LaneChunk<kId> packed[2] = {};
  const auto load_ahead = [&](LaneChunk<kId>& to) {
    if (has_rows) to.load(load_from, lane);
    load_from += kChunkBytes;
    if (--loads_left == 0) {
      load_tile += work.stride;
      start_tile();
    }
  };
  start_tile();
  load_ahead(packed[0]);
  load_ahead(packed[1]);

  const Tables tables{work.window + s.shared_digits, work.window + s.shared_gains};
  if constexpr (table_bytes(kId) > 0) wait_barrier(work.window + kTableBarrier, 0);
  std::uint32_t a[2][kSteps][4];  // of the chunk that is multiplied, and of the next one
  const auto decode = [&](int i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) packed[i].decode(step, tables, a[i][step]);
    load_ahead(packed[i]);
    pin(a[i]);
  };
  decode(0);
  wait_for_dependencies();

  std::int32_t acc[kN / 2] = {};
  Ring ring;
  int tile = work.first, chunk = work.begin;
  // The next chunk of the tile; false: it was the last one of the last tile.
  const auto multiply_chunk = [&](auto which) {
    constexpr int kNow = decltype(which)::value, kNext = 1 - kNow;
    const std::uint64_t b = swizzled_operand(work.stage(s, ring.stage));
    wait_barrier(work.full(ring.stage), ring.parity);
    fence_operands();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      multiply_registers<kN>(acc, a[kNow][step], b + 2 * step);  // 32 bytes, in units of 16
    commit_products();
    decode(kNext);  // meanwhile; and while this warpgroup waits, the other one multiplies
    wait_products<0>();
    pin(a[kNow]);
    __syncwarp();
    if (lane == 0) arrive(work.empty(ring.stage));
    ring.advance(s.stages);
    if (++chunk < work.end) return true;

    pin(acc);
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // what depends on it is not kept in registers from tile to tile
    thread &= 127;
    int row_tile, column_tile;
    s.place(tile, row_tile, column_tile);
    const int first_row = row_tile * kWgmmaRows + warpgroup * 64;
    if constexpr (kSplit) {
      finish_split<kN>(p, work, shared, warpgroup, thread, acc, first_row, column_tile * kN);
    } else if (first_row < p.weight.rows) {
      WgmmaFinish<kN> finish(p, first_row, column_tile * kN, thread, shared + kSharedArea + warpgroup * s.area_stride,
                             kWarpgroupBarrier + warpgroup);
      finish.load();
      finish.store(acc);
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
    chunk = work.begin;
    tile += work.stride;
    return tile < s.tiles();
  };
  while (multiply_chunk(std::integral_constant<int, 0>{}) && multiply_chunk(std::integral_constant<int, 1>{})) {
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
    if (warp == kWgmmaGroups * 4 && lane == 0) {
      wait_for_dependencies();
      copy_tiles<kN>(p, work);
    }
    __syncwarp();
    if constexpr (kSplit) synchronize_cluster();  // with finish_split
  } else {
    if constexpr (kN == 256) grow_registers<kMultiplyRegisters>();
    multiply_tiles<kId, kN, kSplit>(p, work, shared);
    __syncwarp();
  }
  if constexpr (kSplit) synchronize_cluster();  // until then others may read this CTA's sums
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
