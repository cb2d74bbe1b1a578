// SPDX-License-Identifier: Apache-2.0
// The kernel of many_columns_wgmma.cu: a tile of y is the sum over chunks of decoded weights (operand A, in registers) times
// activations (operand B, in shared memory, as they lie in global memory).
//
// One warp copies: a stage of a ring gets k_groups chunks of activations and, for each warpgroup, the packed weights of 64 rows
// and one chunk. The warpgroups decode a step of 32 columns while the products of the steps before it are in flight.
#pragma once

#include <cuda_runtime.h>

#include "decode.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"

namespace pvq::cuda {

// A warpgroup more than multiply: one of its warps copies, and all of them leave their registers to the others.
constexpr int wgmma_threads(int columns_per_tile) { return wgmma_groups(columns_per_tile) * 128 + 128; }
constexpr int kCopyRegisters = 32;
constexpr int multiply_registers(int columns_per_tile) {
  const int threads = wgmma_threads(columns_per_tile), launched = 65536 / threads / 8 * 8;
  return (threads * launched - 128 * kCopyRegisters) / (threads - 128) / 8 * 8;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses in shared memory.
constexpr int kTableBarrier = kSharedBase, kFullBarriers = kSharedBase + 16, kEmptyBarriers = kFullBarriers + 8 * kWgmmaMaxStages;
constexpr int kFlags = kEmptyBarriers + 8 * kWgmmaMaxStages;  // an int for each warpgroup
static_assert(kFlags + 16 <= kSharedGains && kSharedGains % 64 == 0 && kSharedGains + kGainTableBytes <= kSharedArea);

// Named barriers; 0 is __syncthreads.
constexpr int kRowGroupBarrier = 1, kWarpgroupBarrier = 5;

// The copying warp.
template <CodebookId kId, int kN>
struct WgmmaProducer {
  static constexpr int kCluster = wgmma_cluster(kN), kGroups = wgmma_groups(kN), kChunkBytes = chunk_bytes(kId);

  const WgmmaArguments& p;
  std::uint32_t window;  // where this CTA's shared memory starts
  int lane, rank;

  __device__ __forceinline__ int activation_bytes(int column_tile) const {  // of a chunk of the tile
    const std::int64_t left = p.a.padded_columns - static_cast<std::int64_t>(column_tile) * kN;
    return static_cast<int>(left < kN ? left : kN) * kChunkColumns;
  }

  __device__ __forceinline__ void copy_weights(int stage, int tile, int unit) const {
    const WgmmaSchedule& s = p.schedule;
    int row_tile, column_tile;
    s.place(tile, row_tile, column_tile);
    const std::uint32_t full = window + kFullBarriers + 8 * stage;
    const int group = lane / 4, row_groups = s.row_groups();
    const std::int64_t row_group = row_tile * s.tile_row_groups() + rank * row_groups + (group & (row_groups - 1));
    const std::int64_t first_chunk = unit * s.k_groups, chunk = first_chunk + (group >> s.row_shift);
    const bool mine = group < kGroups && chunk < p.weight.num_chunks && row_group * 64 < p.weight.rows;
    const std::int64_t left = p.weight.num_chunks - first_chunk;
    const int chunks = left < s.k_groups ? static_cast<int>(left) : s.k_groups;
    const int copies = __popc(__ballot_sync(0xffffffffu, mine));
    if (lane == 0) expect_bytes(full, copies * kChunkBytes + chunks * activation_bytes(column_tile));
    __syncwarp();
    if (mine) {
      const std::uint8_t* from = p.weight.data + ((row_group * 4 + lane % 4) * p.weight.num_chunks + chunk) * kChunkBytes;
      const std::uint32_t to =
          window + s.shared_stages + stage * s.stage_bytes + s.k_groups * kN * kChunkColumns + lane * kChunkBytes;
      copy_bulk(to, from, kChunkBytes, full);
    }
  }

  __device__ __forceinline__ void copy_activations(int stage, int tile, int unit) const {
    const WgmmaSchedule& s = p.schedule;
    int row_tile, column_tile;
    s.place(tile, row_tile, column_tile);
    const std::uint32_t full = window + kFullBarriers + 8 * stage;
    const std::int64_t chunk = unit * s.k_groups + lane;
    if (lane >= s.k_groups || chunk >= p.weight.num_chunks) return;
    int bytes = activation_bytes(column_tile), offset = 0;
    if constexpr (kCluster > 1) {  // every CTA fetches its part for all
      offset = rank * (kN / kCluster) * kChunkColumns;
      const int left = bytes - offset;
      bytes = left < kN / kCluster * kChunkColumns ? left : kN / kCluster * kChunkColumns;
      if (bytes <= 0) return;
    }
    const std::int8_t* from =
        p.a.data + (chunk * p.a.padded_columns + static_cast<std::int64_t>(column_tile) * kN) * kChunkColumns + offset;
    const std::uint32_t to = window + s.shared_stages + stage * s.stage_bytes + lane * kN * kChunkColumns + offset;
    if constexpr (kCluster > 1) {
      copy_bulk_multicast(to, from, bytes, full, (1 << kCluster) - 1);
    } else {
      copy_bulk(to, from, bytes, full);
    }
  }

  __device__ __forceinline__ void run(int worker) const {
    const WgmmaSchedule& s = p.schedule;
    WgmmaPiece piece;
    {  // weights do not depend on the kernel before: fill the ring with them
      WgmmaWalk ahead(worker);
      int filled = 0;
      while (filled < s.stages && ahead.next(s, piece))
        for (int unit = piece.begin; unit < piece.end && filled < s.stages; ++unit) copy_weights(filled++, piece.tile, unit);
    }
    wait_for_dependencies();
    WgmmaWalk walk(worker);
    Ring ring;
    bool first_lap = true;
    while (walk.next(s, piece)) {
      for (int unit = piece.begin; unit < piece.end; ++unit) {
        if (!first_lap) {
          wait_barrier(window + kEmptyBarriers + 8 * ring.stage, ring.parity ^ 1);
          copy_weights(ring.stage, piece.tile, unit);
        }
        copy_activations(ring.stage, piece.tile, unit);
        __syncwarp();
        ring.advance(s.stages);
        if (ring.stage == 0) first_lap = false;
      }
    }
  }
};

// The warpgroups that multiply.
template <CodebookId kId, int kN>
struct WgmmaConsumer {
  static constexpr int kCluster = wgmma_cluster(kN), kGroups = wgmma_groups(kN), kChunkBytes = chunk_bytes(kId), kSums = kN / 2;
  static constexpr int kBuffers = kN == 128 ? 2 : 4;  // steps of weights in registers: the one decoded and those being multiplied

  const WgmmaArguments& p;
  std::uint32_t window;             // where this CTA's shared memory starts, and
  char* shared;                     // the pointer to it
  int warpgroup, warp, lane, rank;  // warp: of the warpgroup

  __device__ __forceinline__ void release(int stage) const {
    const std::uint32_t empty = window + kEmptyBarriers + 8 * stage;
    __syncwarp();
    if constexpr (kCluster > 1) {
      if (lane < kCluster) arrive_at(empty, lane);
    } else {
      if (lane == 0) arrive(empty);
    }
  }

  // The k_groups warpgroups of a row group add their sums up in the first one.
  __device__ __forceinline__ void join_groups(std::int32_t (&acc)[kSums], int row_group, int k_group, int thread) const {
    constexpr int kRound = kSums < 16 ? kSums : 16;
    const int k_groups = p.schedule.k_groups;
    int4* exchange = reinterpret_cast<int4*>(shared + kSharedArea + row_group * p.schedule.area_stride) + thread;
#pragma unroll
    for (int first = 0; first < kSums; first += kRound) {
      synchronize_threads(kRowGroupBarrier + row_group, 128 * k_groups);  // what was there before has been read
      if (k_group > 0) {
#pragma unroll
        for (int q = 0; q < kRound / 4; ++q)
          exchange[(k_group - 1) * (kExchangeBytes / 16) + q * 128] =
              make_int4(acc[first + 4 * q], acc[first + 4 * q + 1], acc[first + 4 * q + 2], acc[first + 4 * q + 3]);
      }
      synchronize_threads(kRowGroupBarrier + row_group, 128 * k_groups);
      if (k_group == 0) {
        for (int k = 0; k < k_groups - 1; ++k) {
#pragma unroll
          for (int q = 0; q < kRound / 4; ++q) {
            const int4 other = exchange[k * (kExchangeBytes / 16) + q * 128];
            acc[first + 4 * q] += other.x;
            acc[first + 4 * q + 1] += other.y;
            acc[first + 4 * q + 2] += other.z;
            acc[first + 4 * q + 3] += other.w;
          }
        }
      }
    }
  }

  // Adds the sums of all workers that share a tile. True for the last to come, which then has the total.
  __device__ __forceinline__ bool join_workers(std::int32_t (&acc)[kSums], int worker, int rest_tile, int tile_row_group,
                                               int thread) const {
    const WgmmaSchedule& s = p.schedule;
    const int barrier = kWarpgroupBarrier + warpgroup;
    const int first = s.worker_of(rest_tile * s.units), last = s.worker_of((rest_tile + 1) * s.units - 1);
    const auto slot = [&](int w) {
      return reinterpret_cast<int4*>(p.partial + (w + rest_tile) * s.slot_elements() + tile_row_group * (64 * kN)) + thread;
    };
    int4* mine = slot(worker);
#pragma unroll
    for (int q = 0; q < kSums / 4; ++q)
      __stcg(mine + q * 128, make_int4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]));
    __threadfence();
    synchronize_threads(barrier, 128);
    std::int32_t* counter = p.counters + rest_tile * s.tile_row_groups() + tile_row_group;
    volatile int* flag = reinterpret_cast<volatile int*>(shared + kFlags) + warpgroup;
    if (thread == 0) {
      const int before = atomicAdd(counter, 1);
      const bool is_last = before == last - first;
      if (is_last) *counter = 0;
      *flag = is_last;
    }
    synchronize_threads(barrier, 128);
    const bool is_last = *flag != 0;
    if (!is_last) return false;
    __threadfence();
    for (int w = first; w <= last; ++w) {
      if (w == worker) continue;
      const int4* other = slot(w);
      constexpr int kAtOnce = kN == 128 ? 4 : kSums / 4 < 8 ? kSums / 4 : 8;  // as registers allow
#pragma unroll
      for (int first_load = 0; first_load < kSums / 4; first_load += kAtOnce) {
        asm volatile("" ::: "memory");
#pragma unroll
        for (int q = first_load; q < first_load + kAtOnce; ++q) {
          const int4 v = __ldcg(other + q * 128);
          acc[4 * q] += v.x;
          acc[4 * q + 1] += v.y;
          acc[4 * q + 2] += v.z;
          acc[4 * q + 3] += v.w;
        }
      }
    }
    return true;
  }

  __device__ __forceinline__ void run(int worker) const {
    const WgmmaSchedule& s = p.schedule;
    const int row_groups = s.row_groups(), row_group = warpgroup & (row_groups - 1), k_group = warpgroup >> s.row_shift;
    const int num_chunks = static_cast<int>(p.weight.num_chunks);
    const Tables tables{window + s.shared_digits, window + s.shared_gains};
    const char* packed = shared + s.shared_stages + s.k_groups * kN * kChunkColumns + (warpgroup * 4 + warp) * kChunkBytes;
    const std::uint32_t operand = window + s.shared_stages + k_group * kN * kChunkColumns;
    if constexpr (table_bytes(kId) > 0) wait_barrier(window + kTableBarrier, 0);

    std::uint32_t weights[kBuffers][4] = {};
    std::int32_t acc[kSums];
    Ring ring;
    WgmmaWalk walk(worker);
    WgmmaPiece piece;
    while (walk.next(s, piece)) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) acc[i] = 0;
      int previous = -1;
      for (int unit = piece.begin; unit < piece.end; ++unit) {
        wait_barrier(window + kFullBarriers + 8 * ring.stage, ring.parity);
        if (unit * s.k_groups + k_group < num_chunks) {
          LaneChunk<kId> chunk;
          const char* place = packed + ring.stage * s.stage_bytes;
          if constexpr (kId != CodebookId::kInt8) chunk.read(place, lane);
          const std::uint32_t b = operand + ring.stage * s.stage_bytes;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            std::uint32_t (&a)[4] = weights[step % kBuffers];
            wait_products<kBuffers - 1>();
            keep(a);
            if constexpr (kId == CodebookId::kInt8) {  // not before the wait: these are the registers being multiplied
              load_fragment(shared_address(place) + step * 512 + lane * 16, a);
            } else {
              chunk.decode(step, tables, a);
            }
            fence_operands();
            multiply<kN>(acc, a, swizzled_operand(b + 32 * step));
            commit_products();
          }
        } else {  // the last unit has fewer chunks
          wait_products<0>();
        }
        if (previous >= 0) release(previous);  // its products are over, as waited for in the last step above
        previous = ring.stage;
        ring.advance(s.stages);
      }
      wait_products<0>();
#pragma unroll
      for (int i = 0; i < kBuffers; ++i) keep(weights[i]);
#pragma unroll
      for (int i = 0; i < kSums; ++i) asm volatile("" : "+r"(acc[i]));
      release(previous);

      int thread = warp * 32 + lane;
      asm volatile("" : "+r"(thread));  // what depends on it is not kept in registers from tile to tile
      thread &= 127;
      int row_tile, column_tile;
      s.place(piece.tile, row_tile, column_tile);
      const int tile_row_group = rank * row_groups + row_group;
      const int first_row = (row_tile * s.tile_row_groups() + tile_row_group) * 64;
      if (s.k_groups > 1) join_groups(acc, row_group, k_group, thread);
      if (k_group > 0 || first_row >= p.weight.rows) continue;
      const int rest_tile = piece.tile - s.whole_rounds * s.workers;
      if (piece.end - piece.begin < s.units && !join_workers(acc, worker, rest_tile, tile_row_group, thread)) continue;
      WgmmaFinish<kN> finish(p, first_row, column_tile * kN, thread, shared + kSharedArea + row_group * s.area_stride,
                             kWarpgroupBarrier + warpgroup);
      finish.load();
      finish.store(acc);
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <CodebookId kId, int kN>
__global__ void PVQ_CLUSTER(wgmma_cluster(kN)) __launch_bounds__(wgmma_threads(kN), 1)
    many_columns_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kCluster = wgmma_cluster(kN), kGroups = wgmma_groups(kN);
  extern __shared__ char dynamic[];
  // Within a cluster an address has the number of the CTA in its upper bits.
  const std::uint32_t window = kCluster > 1 ? shared_address(dynamic) - kSharedBase : 0;
  if ((shared_address(dynamic) & 0xffffffu) != kSharedBase) __trap();  // the schedule counts on it
  char* shared = dynamic - kSharedBase;

  launch_dependents();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0, worker = blockIdx.x / kCluster;
  const bool is_producer = warp == kGroups * 4;  // the other warps of its warpgroup have nothing to do
  if (is_producer && lane == 0) {
    init_barrier(window + kTableBarrier, 1);
    for (int stage = 0; stage < p.schedule.stages; ++stage) {
      init_barrier(window + kFullBarriers + 8 * stage, 1);
      init_barrier(window + kEmptyBarriers + 8 * stage, kGroups * 4 * kCluster);
    }
    fence_barrier_init();
  }
  if constexpr (table_bytes(kId) > 0) {
    if (warp == 0) write_gains<kId>(shared + kSharedGains, lane);
  }
  __syncthreads();
  if constexpr (kCluster > 1) synchronize_cluster();

  if (warp >= kGroups * 4) {
    shrink_registers<kCopyRegisters>();
    if (is_producer) {
      if constexpr (table_bytes(kId) > 0) {
        if (lane == 0) {
          expect_bytes(window + kTableBarrier, table_bytes(kId));
          copy_bulk(window + p.schedule.shared_digits, p.weight.table, table_bytes(kId), window + kTableBarrier);
        }
        __syncwarp();
      }
      WgmmaProducer<kId, kN>{p, window, lane, rank}.run(worker);
    }
  } else {
    grow_registers<multiply_registers(kN)>();
    wait_for_dependencies();
    WgmmaConsumer<kId, kN>{p, window, shared, warp / 4, warp % 4, lane, rank}.run(worker);
  }
  __syncwarp();
  // Until then the other CTA may still signal this one's barriers.
  if constexpr (kCluster > 1) synchronize_cluster();
#endif
}

template <CodebookId kId>
void launch_many_columns_wgmma(const WgmmaArguments& p, cudaStream_t stream) {
  const WgmmaSchedule& s = p.schedule;
  const auto start = [&](auto columns) {
    constexpr int kN = decltype(columns)::value;
    const dim3 grid(static_cast<unsigned>(s.workers * wgmma_cluster(kN))), block(wgmma_threads(kN));
    launch_overlapping(starts_early(p.a, grid.x), many_columns_wgmma_kernel<kId, kN>, grid, block,
                       static_cast<std::size_t>(s.shared_bytes), stream, p);
  };
  switch (s.columns_per_tile) {
    case 16:
      return start(std::integral_constant<int, 16>{});
    case 32:
      return start(std::integral_constant<int, 32>{});
    case 64:
      return start(std::integral_constant<int, 64>{});
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
