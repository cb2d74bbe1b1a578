// SPDX-License-Identifier: Apache-2.0
// The product for very many columns: weights are expanded to int8 in global memory, and both operands of the multiplication come
// from shared memory. Nothing but the tensor cores works in the inner loop.
//
// A tile of y is 256 rows by 256 columns, of a cluster of two CTAs with 128 rows each; clusters take tiles in turn. One thread
// of a CTA copies: the weights of its rows, and half of the activations, for both CTAs. Two warpgroups multiply 64 rows each.
// While they finish a tile, the copies of the next one run.
#include <algorithm>

#include "expand.h"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"

namespace pvq::cuda {
namespace {

constexpr int kN = 256, kCluster = 2, kGroups = 2;  // columns, CTAs, warpgroups that multiply
constexpr int kThreads = kGroups * 128 + 128;       // a warpgroup more: one of its warps copies
constexpr int kTileHeight = kCluster * kExpandedRows;
constexpr int kStages = 4;
constexpr int kWeightBytes = kExpandedRows * kChunkColumns, kHalfBytes = kN / kCluster * kChunkColumns;
constexpr int kStageBytes = kWeightBytes + kCluster * kHalfBytes;

// Shared memory by address, from kSharedBase: barriers, the epilogue's areas, stages.
constexpr int kFull = kSharedBase, kEmpty = kFull + 8 * kStages;
constexpr int kAreaBytes = finish_area_bytes(kN);
constexpr int kShared = (kSharedArea + kGroups * kAreaBytes + 1023) / 1024 * 1024;
constexpr int kDynamicBytes = kShared + kStages * kStageBytes - kSharedBase;
static_assert(kEmpty + 8 * kStages <= kSharedArea && kDynamicBytes <= 227 * 1024);

struct PrefillArguments : Product {
  const std::uint8_t* expanded;
  int row_tiles, column_tiles;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kCopyRegisters = 32;
constexpr int kMultiplyRegisters = 232;

// One thread.
__device__ __forceinline__ void copy_tiles(const PrefillArguments& p, std::uint32_t window, int rank, int worker, int workers) {
  Ring ring;
  for (int tile = worker; tile < p.row_tiles * p.column_tiles; tile += workers) {
    int row_tile, column_tile;
    place_tile(tile, p.row_tiles, p.column_tiles, row_tile, column_tile);
    const std::int64_t block = static_cast<std::int64_t>(row_tile) * kCluster + rank;
    const std::uint32_t weight_bytes = block * kExpandedRows < p.weight.rows ? kWeightBytes : 0;
    const std::uint8_t* weights = p.expanded + block * p.weight.num_chunks * kWeightBytes;
    const std::int64_t first = static_cast<std::int64_t>(column_tile) * kN, left = p.a.padded_columns - first;
    const int columns = left < kN ? static_cast<int>(left) : kN, before = rank * (kN / kCluster);
    const int mine = max(0, min(columns - before, kN / kCluster));  // columns that this CTA fetches for both
    const std::int8_t* activations = p.a.data + (first + before) * kChunkColumns;
    for (int chunk = 0; chunk < p.weight.num_chunks; ++chunk) {
      const std::uint32_t full = window + kFull + 8 * ring.stage, stage = window + kShared + ring.stage * kStageBytes;
      wait_barrier(window + kEmpty + 8 * ring.stage, ring.parity ^ 1);
      expect_bytes(full, weight_bytes + columns * kChunkColumns);
      if (mine > 0)
        copy_bulk_multicast(stage + kWeightBytes + before * kChunkColumns, activations, mine * kChunkColumns, full,
                            (1 << kCluster) - 1);
      if (weight_bytes > 0) copy_bulk(stage, weights, weight_bytes, full);
      weights += kWeightBytes;
      activations += p.a.padded_columns * kChunkColumns;
      ring.advance(kStages);
    }
  }
}

// A warpgroup.
__device__ __forceinline__ void multiply_tiles(const PrefillArguments& p, std::uint32_t window, char* shared, int rank,
                                               int worker, int workers) {
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0), lane = threadIdx.x % 32;
  const int num_chunks = static_cast<int>(p.weight.num_chunks);
  const auto release = [&](int stage) {  // each warp, to both CTAs: each one's activations come from both
    __syncwarp();
    if (lane < kCluster) arrive_at(window + kEmpty + 8 * stage, lane);
  };
  std::int32_t acc[kN / 2];
  Ring ring;
  for (int tile = worker; tile < p.row_tiles * p.column_tiles; tile += workers) {
    int row_tile, column_tile;
    place_tile(tile, p.row_tiles, p.column_tiles, row_tile, column_tile);
    const int first_row = (row_tile * kCluster + rank) * kExpandedRows + warpgroup * 64;
    const bool has_rows = first_row < p.weight.rows;
    WgmmaFinish<kN> finish(p, first_row, column_tile * kN, threadIdx.x & 127, shared + kSharedArea + warpgroup * kAreaBytes,
                           1 + warpgroup);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
    int previous = -1;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const std::uint32_t stage = window + kShared + ring.stage * kStageBytes;
      const std::uint64_t a = swizzled_operand(stage + warpgroup * (kWeightBytes / kGroups));
      const std::uint64_t b = swizzled_operand(stage + kWeightBytes);
      wait_barrier(window + kFull + 8 * ring.stage, ring.parity);
      fence_operands();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply<kN>(acc, a + 2 * step, b + 2 * step);  // 32 bytes, in units of 16
      commit_products();
      if (chunk == 0 && has_rows) finish.load();  // its latency hides behind the products
      wait_products<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance(kStages);
    }
    wait_products<0>();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) asm volatile("" : "+r"(acc[i]));
    release(previous);

    if (has_rows) finish.store(acc);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ void PVQ_CLUSTER(kCluster) __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ char dynamic[];
  // Within a cluster an address has the number of the CTA in its upper bits.
  const std::uint32_t address = shared_address(dynamic), window = address - kSharedBase;
  if ((address & 0xffffffu) != kSharedBase) __trap();  // the addresses above count on it
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), worker = blockIdx.x / kCluster, workers = gridDim.x / kCluster;
  launch_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(window + kFull + 8 * stage, 1);
      init_barrier(window + kEmpty + 8 * stage, kGroups * 4 * kCluster);
    }
    fence_barrier_init();
  }
  __syncthreads();
  synchronize_cluster();
  if (warp >= kGroups * 4) {
    shrink_registers<kCopyRegisters>();
    wait_for_dependencies();
    if (warp == kGroups * 4 && lane == 0) copy_tiles(p, window, rank, worker, workers);
  } else {
    grow_registers<kMultiplyRegisters>();
    wait_for_dependencies();
    multiply_tiles(p, window, dynamic - kSharedBase, rank, worker, workers);
  }
  __syncwarp();
  synchronize_cluster();  // until then the other CTA may still signal this one's barriers
#endif
}

void start(const Product& product, const std::uint8_t* expanded, cudaStream_t stream) {
  PrefillArguments p{product, expanded, 0, 0};
  p.row_tiles = static_cast<int>((product.weight.rows + kTileHeight - 1) / kTileHeight);
  p.column_tiles = static_cast<int>((product.a.num_columns() + kN - 1) / kN);
  const int workers = std::min(p.row_tiles * p.column_tiles, device_properties().num_sms / kCluster);
  launch(prefill_kernel, dim3(static_cast<unsigned>(workers * kCluster)), dim3(kThreads), std::size_t{kDynamicBytes}, stream, p);
}

// The rows from `first` on that are expanded at once.
Weight part_of(const Weight& weight, std::int64_t first) {
  Weight part = weight;
  part.data += weight_bytes(weight.codebook, first, weight.num_chunks * kChunkColumns);
  part.row_scale += first;
  part.rows = std::min(expanded_rows(weight.rows, weight.num_chunks), weight.rows - first);
  return part;
}

}  // namespace

bool prefill_pays(std::int64_t rows, std::int64_t num_columns) {
  // In columns of the whole weight at full speed: many_columns_wgmma takes kSlower of them for each, expanding kExpanding.
  constexpr double kSlower = 1.2, kExpanding = 340;
  const std::int64_t workers = device_properties().num_sms / kCluster;
  const std::int64_t tiles = (rows + kTileHeight - 1) / kTileHeight * ((num_columns + kN - 1) / kN);
  const double slots = static_cast<double>(round_up(tiles, workers)) * kTileHeight * kN;
  return slots / static_cast<double>(rows) + kExpanding < kSlower * static_cast<double>(num_columns);
}

void expand_first(const Weight& weight, std::uint8_t* expanded, cudaStream_t stream) {
  expand(part_of(weight, 0), expanded, true, stream);
}

void prefill(const Activations& a, const Weight& weight, const Output& output, std::uint8_t* expanded, bool first_is_expanded,
             cudaStream_t stream) {
  const std::int64_t element_bytes = output.dtype == DType::kFloat32 ? 4 : 2;
  for (std::int64_t first = 0; first < weight.rows; first += expanded_rows(weight.rows, weight.num_chunks)) {
    Product part{a, part_of(weight, first), output};
    part.output.y = static_cast<char*>(output.y) + first * element_bytes;
    if (output.bias != nullptr) part.output.bias = static_cast<const char*>(output.bias) + first * element_bytes;
    if (first > 0 || !first_is_expanded) expand(part.weight, expanded, false, stream);
    start(part, expanded, stream);
  }
}

}  // namespace pvq::cuda
