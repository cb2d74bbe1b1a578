// SPDX-License-Identifier: Apache-2.0
// The kernel of many_columns_wgmma.cu: a tile of y is the sum over chunks of decoded weights times activations, both read by the
// tensor cores from a ring of stages in shared memory.
//
// Four or eight warps decode: each fetches packed weights straight into its registers, some chunks ahead, and writes them to a
// stage as int8; in turn they copy the activations, in the order they lie in global memory. Two warpgroups do nothing but
// multiply, 64 rows each.
#pragma once

#include <cuda_runtime.h>

#include "decode.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"

namespace pvq::cuda {

constexpr int kWgmmaGroups = 2;  // that multiply
// Warps that decode, and 16-row tiles that one decodes at a time. ptxas wants 154 registers for a product with 256 columns, so
// there can be no more than twelve warps in all.
constexpr int wgmma_decoders(int columns_per_tile) { return columns_per_tile == 256 ? 4 : 8; }
constexpr int wgmma_threads(int columns_per_tile) { return 128 * kWgmmaGroups + 32 * wgmma_decoders(columns_per_tile); }
// A block of the kernel that quantizes the activations fits beside one of 96 registers.
constexpr int wgmma_register_bound(int columns_per_tile) { return columns_per_tile == 256 ? 384 : 640; }  // threads

constexpr int kWeightBytes = kWgmmaRows * kChunkColumns;  // decoded, of a stage

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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

// Activations to stages; one thread, or a warp of which one copies. Walks from unit to unit (a chunk of a tile of y).
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
  __device__ __forceinline__ void advance(int units) {
    unit += units;
    chunk += units;
    if (chunk < work.end) return;
    while (chunk >= work.end && tile < p.schedule.tiles()) {
      chunk -= work.end - work.begin;
      tile += work.stride;
    }
    start_tile();
  }
  __device__ __forceinline__ void copy(int stage) const {
    const std::uint32_t full = work.full(stage), to = work.stage(p.schedule, stage) + kWeightBytes;
    const std::int8_t* from = columns + chunk * p.a.padded_columns * kChunkColumns;
    expect_bytes(full, bytes);
    copy_bulk(to, from, bytes, full);
  }
};

// A warp that decodes: of every chunk the 16-row tiles warp, warp + decoders, ...
template <CodebookId kId, int kN>
__device__ __forceinline__ void decode_tiles(const WgmmaArguments& p, const WgmmaWork& work, int warp, int lane) {
  constexpr int kDecoders = wgmma_decoders(kN), kTiles = kWgmmaRows / kTileRows / kDecoders, kChunkBytes = chunk_bytes(kId);
  constexpr int kPrefetch = kN == 256 || kId == CodebookId::kInt8 ? 2 : 3;
  const WgmmaSchedule& s = p.schedule;
  const int units = work.units(s), num_chunks = static_cast<int>(p.weight.num_chunks);

  // Packed weights are on their way to registers some chunks ahead.
  const std::int64_t tile_stride = std::int64_t{kDecoders} * num_chunks * kChunkBytes;
  int load_tile = work.first, loads_left = 0, load_tiles = 0;  // chunks left of the tile of y; 16-row tiles that there are
  const std::uint8_t* load_from = nullptr;
  const auto start_tile = [&] {
    loads_left = work.end - work.begin;
    load_tiles = 0;
    if (load_tile >= s.tiles()) return;
    int row_tile, column_tile;
    s.place(load_tile, row_tile, column_tile);
    const std::int64_t tile = row_tile * kWgmmaRows / kTileRows + warp;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_tiles += (tile + i * kDecoders) / 4 * kRowAlignment < p.weight.rows;
    load_from = p.weight.data + (tile * num_chunks + work.begin) * kChunkBytes;
  };
  LaneChunk<kId> buffer[kPrefetch][kTiles] = {};
  const auto load_ahead = [&](LaneChunk<kId>(&to)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      if (i < load_tiles) to[i].load(load_from + i * tile_stride, lane);
    load_from += kChunkBytes;
    if (--loads_left == 0) {
      load_tile += work.stride;
      start_tile();
    }
  };
  start_tile();
#pragma unroll
  for (int b = 0; b < kPrefetch; ++b) load_ahead(buffer[b]);

  // The warps copy the activations in turn, but for the first ones, which multiply_tiles copies.
  WgmmaCopies<kN> copies(p, work);
  copies.advance(warp);
  while (copies.unit < s.stages) copies.advance(kDecoders);

  const Tables tables{work.window + s.shared_digits, work.window + s.shared_gains};
  const int g = lane / 4, t = lane % 4;
  std::uint32_t places[2 * kSteps];  // of a lane's words in a stage
#pragma unroll
  for (int u = 0; u < 2 * kSteps; ++u) places[u] = (warp * kTileRows + g) * kChunkColumns + 4 * t + 16 * (u ^ g);
  if constexpr (table_bytes(kId) > 0) wait_barrier(work.window + kTableBarrier, 0);

  Ring ring;
  int previous = -1;
  const auto publish = [&] {  // the stage written last: late, when its writes are long done
    if (previous < 0) return;
    fence_shared_writes();
    __syncwarp();
    if (lane == 0) arrive(work.full(previous));
  };
  const auto decode_unit = [&](LaneChunk<kId>(&packed)[kTiles], int unit) {
    const bool is_empty = test_barrier(work.empty(ring.stage), ring.parity ^ 1);
    std::uint32_t a[kTiles][kSteps][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) packed[i].decode(step, tables, a[i][step]);
    publish();
    load_ahead(packed);
    if (!is_empty) wait_barrier(work.empty(ring.stage), ring.parity ^ 1);
    if (unit == copies.unit) {
      if (lane == 0) copies.copy(ring.stage);
      __syncwarp();
      copies.advance(kDecoders);
    }
    const std::uint32_t stage = work.stage(s, ring.stage);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        constexpr int kTileBytes = kDecoders * kTileRows * kChunkColumns;
        store_shared(stage + places[2 * step] + i * kTileBytes, a[i][step][0]);
        store_shared(stage + places[2 * step] + i * kTileBytes + 8 * kChunkColumns, a[i][step][1]);
        store_shared(stage + places[2 * step + 1] + i * kTileBytes, a[i][step][2]);
        store_shared(stage + places[2 * step + 1] + i * kTileBytes + 8 * kChunkColumns, a[i][step][3]);
      }
    }
    previous = ring.stage;
    ring.advance(s.stages);
  };
  for (int unit = 0; unit < units; unit += kPrefetch) {
    decode_unit(buffer[0], unit);
#pragma unroll
    for (int b = 1; b < kPrefetch; ++b)
      if (unit + b < units) decode_unit(buffer[b], unit + b);
  }
  publish();
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

// A warpgroup that multiplies.
template <int kN, bool kSplit>
__device__ __forceinline__ void multiply_tiles(const WgmmaArguments& p, const WgmmaWork& work, char* shared) {
  const WgmmaSchedule& s = p.schedule;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {  // decode_tiles copies the others
    WgmmaCopies<kN> copies(p, work);
    const int units = min(work.units(s), s.stages);
    for (; copies.unit < units; copies.advance(1)) copies.copy(copies.unit);
  }
  __syncwarp();
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) arrive(work.empty(stage));
  };
  std::int32_t acc[kN / 2];
  Ring ring;
  for (int tile = work.first; tile < s.tiles(); tile += work.stride) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
    int previous = -1;
    for (int chunk = work.begin; chunk < work.end; ++chunk) {
      const std::uint32_t stage = work.stage(s, ring.stage);
      const std::uint64_t a = swizzled_operand(stage + warpgroup * (kWeightBytes / kWgmmaGroups));
      const std::uint64_t b = swizzled_operand(stage + kWeightBytes);
      wait_barrier(work.full(ring.stage), ring.parity);
      fence_operands();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply<kN>(acc, a + 2 * step, b + 2 * step);  // 32 bytes, in units of 16
      commit_products();
      wait_products<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance(s.stages);
    }
    wait_products<0>();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) asm volatile("" : "+r"(acc[i]));
    if (previous >= 0) release(previous);

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
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <CodebookId kId, int kN, bool kSplit>
__global__ void __launch_bounds__(wgmma_register_bound(kN), 1)
    many_columns_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
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
      init_barrier(work.full(stage), 1 + wgmma_decoders(kN));
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
    decode_tiles<kId, kN>(p, work, warp - kWgmmaGroups * 4, lane);
    __syncwarp();
    if constexpr (kSplit) synchronize_cluster();  // with finish_split
  } else {
    wait_for_dependencies();
    multiply_tiles<kN, kSplit>(p, work, shared);
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
    const dim3 grid(static_cast<unsigned>(s.workers * s.splits)), block(wgmma_threads(kN));
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
