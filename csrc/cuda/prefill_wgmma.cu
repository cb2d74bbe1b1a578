// SPDX-License-Identifier: Apache-2.0
// The product for very many columns: weights are expanded to int8 in global memory, and both operands of the multiplication come
// from shared memory. Nothing but the tensor cores works in the inner loop.
//
// A tile of y is 256 rows by 256 columns, of a cluster of two CTAs with 128 rows each; clusters take tiles in turn. One thread
// of a CTA copies: the weights of its rows, and half of the activations, for both CTAs. Two warpgroups multiply 64 rows each.
// While they finish a tile, the copies of the next one run. Meanwhile three warps expand what has not been expanded yet: pieces
// that they claim one after another, so that none waits for a CTA that does not run.
#include <algorithm>

#include "expand.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "wgmma_finish.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

constexpr int kN = 256, kCluster = 2, kGroups = 2;  // columns, CTAs, warpgroups that multiply
constexpr int kThreads = kGroups * 128 + 128;       // a warpgroup more: one of its warps copies, three expand
constexpr int kTileHeight = kCluster * kExpandedRows;
constexpr int kMaxStages = 4;
constexpr int kWeightBytes = kExpandedRows * kChunkColumns, kStageBytes = kWeightBytes + kN * kChunkColumns;
constexpr int kMaxDynamicBytes = 227 * 1024;
// Of 16 column tiles the first round needs half as many rows as of 8; the activations of more than 4096 columns would be too
// many.
constexpr int panel_shift(int chunks) { return chunks <= 32 ? 4 : 3; }
constexpr int kGroupsBefore = 4;         // of chunks, expanded by expand()
constexpr std::int64_t kPaysFrom = 896;  // columns, at least

// Shared memory by address, from kSharedBase: barriers, gains, the epilogue's areas, digits, stages.
constexpr int kFull = kSharedBase, kEmpty = kFull + 8 * kMaxStages, kTableBarrier = kEmpty + 8 * kMaxStages;
constexpr int kAreaBytes = finish_area_bytes(kN), kAreasEnd = kSharedArea + kGroups * kAreaBytes;
static_assert(kTableBarrier + 8 <= kSharedGains && kSharedGains % 64 == 0 && kSharedGains + kGainTableBytes <= kSharedArea);
constexpr int digits_address(CodebookId id) {
  return static_cast<int>(round_up(kAreasEnd, std::max(table_bytes(id), 1024)));  // aligned to their size (decode.cuh)
}
constexpr int stages_address(CodebookId id) { return static_cast<int>(round_up(digits_address(id) + table_bytes(id), 1024)); }
constexpr int num_stages(CodebookId id) {
  return std::min((kSharedBase + kMaxDynamicBytes - stages_address(id)) / kStageBytes, kMaxStages);
}
constexpr int dynamic_bytes(CodebookId id) { return stages_address(id) + num_stages(id) * kStageBytes - kSharedBase; }

struct PrefillArguments : Product {
  Expansion expansion;
  TileOrder order;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kSpareRegisters = 56, kMultiplyRegisters = 224;
// Those of all threads at the start; more would never come.
static_assert(128 * kSpareRegisters + 128 * kGroups * kMultiplyRegisters <= kThreads * (65536 / kThreads / 8 * 8));

// Until a block's group of chunks is expanded. By the thread that copies it.
__device__ __forceinline__ void wait_until_done(const Expansion& e, int block, int group) {
  const std::uint32_t* const done = e.done(block, group);
  for (;;) {
    std::uint32_t tiles;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(tiles) : "l"(done) : "memory");
    if (tiles == kBlockTiles) break;
    __nanosleep(32);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// One thread.
template <CodebookId kId>
__device__ __forceinline__ void copy_tiles(const PrefillArguments& p, std::uint32_t window, int rank, int worker, int workers) {
  const ExpansionOrder& order = p.expansion.order;
  Ring ring;
  for (int tile = worker; tile < p.order.tiles(); tile += workers) {
    int row_tile, column_tile;
    p.order.place(tile, row_tile, column_tile);
    const int block = row_tile * kCluster + rank;
    const std::uint32_t weight_bytes = block < order.blocks ? kWeightBytes : 0;
    const std::uint8_t* weights = p.expansion.data + static_cast<std::int64_t>(block) * order.chunks * kWeightBytes;
    const std::int64_t first = static_cast<std::int64_t>(column_tile) * kN, left = p.a.padded_columns - first;
    const int columns = left < kN ? static_cast<int>(left) : kN, before = rank * (kN / kCluster);
    const int mine = max(0, min(columns - before, kN / kCluster));  // columns that this CTA fetches for both
    const std::int8_t* activations = p.a.data + (first + before) * kChunkColumns;
    const int groups_before = block < order.round_blocks ? p.expansion.groups_before : 0;  // expanded by expand()
    for (int chunk = 0; chunk < order.chunks; ++chunk) {
      const int group = chunk / ExpansionOrder::kPieceChunks;
      if (chunk % ExpansionOrder::kPieceChunks == 0 && group >= groups_before && weight_bytes > 0)
        wait_until_done(p.expansion, block, group);
      const std::uint32_t full = window + kFull + 8 * ring.stage, stage = window + stages_address(kId) + ring.stage * kStageBytes;
      wait_barrier(window + kEmpty + 8 * ring.stage, ring.parity ^ 1);
      expect_bytes(full, weight_bytes + columns * kChunkColumns);
      if (mine > 0)
        copy_bulk_multicast(stage + kWeightBytes + before * kChunkColumns, activations, mine * kChunkColumns, full,
                            (1 << kCluster) - 1);
      if (weight_bytes > 0) copy_bulk(stage, weights, weight_bytes, full);
      weights += kWeightBytes;
      activations += p.a.padded_columns * kChunkColumns;
      ring.advance(num_stages(kId));
    }
  }
}

// Expands what expand() has left. A warp.
template <CodebookId kId>
__device__ __forceinline__ void expand_rest(const Weight& weight, const Expansion& e, std::uint32_t window, int lane) {
  const int pieces = e.order.pieces();
  const auto claim = [&] { return lane == 0 ? e.first() + static_cast<int>(atomicAdd(e.counters, 1u)) : 0; };
  const Tables tables{window + digits_address(kId), window + kSharedGains};
  if constexpr (table_bytes(kId) > 0) wait_barrier(window + kTableBarrier, 0);

  // The chunk that is loaded next, a chunk ahead of the one that is expanded, and the piece after its own.
  ExpandedChunk<kId> ahead{};
  int chunks_left = 0;
  std::uint32_t* done = nullptr;
  bool exists = false;
  LaneChunk<kId> packed{};
  int claimed = claim();
  const auto start_piece = [&] {
    const int i = __shfl_sync(0xffffffffu, claimed, 0);
    if (i >= pieces) return false;
    claimed = claim();
    const ExpansionOrder::Piece piece = e.order.at(i);
    const int chunk = piece.group * ExpansionOrder::kPieceChunks;
    ahead = ExpandedChunk<kId>(weight, e, piece, chunk);
    chunks_left = min(ExpansionOrder::kPieceChunks, e.order.chunks - chunk);
    done = e.done(piece.block, piece.group);
    exists = e.exists(piece);
    if (exists) packed.load(ahead.from, lane);
    return true;
  };
  bool more = start_piece();
  while (more) {
    const LaneChunk<kId> now = packed;
    std::uint8_t* const to = exists ? ahead.to : nullptr;
    std::uint32_t* const finished = chunks_left == 1 ? done : nullptr;
    if (--chunks_left > 0) {
      ahead.next();
      if (exists) packed.load(ahead.from, lane);
    } else {
      more = start_piece();
    }
    if (to != nullptr) expand_chunk(now, tables, to, lane);
    if (finished != nullptr) {
      asm volatile("fence.proxy.async.global;" ::: "memory");  // it is read by bulk copies
      __syncwarp();
      if (lane == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(finished) : "memory");
    }
  }
}

// A warpgroup.
template <CodebookId kId>
__device__ __forceinline__ void multiply_tiles(const PrefillArguments& p, std::uint32_t window, char* shared, int rank,
                                               int worker, int workers) {
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0), lane = threadIdx.x % 32;
  const int num_chunks = static_cast<int>(p.weight.num_chunks);
  const auto release = [&](int stage) {  // each warp, to both CTAs: each one's activations come from both
    __syncwarp();
    if (lane < kCluster) arrive_at(window + kEmpty + 8 * stage, lane);
  };
  const FinishArea<kN> area(shared + kSharedArea + warpgroup * kAreaBytes);
  std::int32_t acc[kN / 2];
  Ring ring;
  for (int tile = worker; tile < p.order.tiles(); tile += workers) {
    int row_tile, column_tile;
    p.order.place(tile, row_tile, column_tile);
    const int first_row = (row_tile * kCluster + rank) * kExpandedRows + warpgroup * 64;
    const bool has_rows = first_row < p.weight.rows;
    const int first_column = column_tile * kN, thread = threadIdx.x & 127, barrier = 1 + warpgroup;
    typename FinishArea<kN>::Share share;
    if (has_rows) share = FinishArea<kN>::fetch(p, first_row, first_column, thread);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[i] = 0;
    int previous = -1;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const std::uint32_t stage = window + stages_address(kId) + ring.stage * kStageBytes;
      const std::uint64_t a = plain_operand(stage + warpgroup * (kWeightBytes / kGroups));
      const std::uint64_t b = swizzled_operand(stage + kWeightBytes);
      wait_barrier(window + kFull + 8 * ring.stage, ring.parity);
      fence_operands();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply<kN>(acc, a + 16 * step, b + 2 * step);  // 32 bytes of k, in units of 16
      commit_products();
      wait_products<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance(num_stages(kId));
    }
    wait_products<0>();
    pin(acc);
    release(previous);

    if (!has_rows) continue;
    synchronize_threads(barrier, 128);  // the area has been read
    area.put(share, thread);
    synchronize_threads(barrier, 128);
    finish_tile<kN>(p, area, first_row, first_column, thread, barrier, acc);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <CodebookId kId>
__global__ void PVQ_CLUSTER(kCluster) __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArguments p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(num_stages(kId) >= 3, "fewer cost time");
  extern __shared__ char dynamic[];
  // Within a cluster an address has the number of the CTA in its upper bits.
  const std::uint32_t address = shared_address(dynamic), window = address - kSharedBase;
  if ((address & 0xffffffu) != kSharedBase) __trap();  // the addresses above count on it
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), worker = blockIdx.x / kCluster, workers = gridDim.x / kCluster;
  launch_dependents();
  if (threadIdx.x == 0) {
    init_barrier(window + kTableBarrier, 1);
    for (int stage = 0; stage < num_stages(kId); ++stage) {
      init_barrier(window + kFull + 8 * stage, 1);
      init_barrier(window + kEmpty + 8 * stage, kGroups * 4 * kCluster);
    }
    fence_barrier_init();
    if constexpr (table_bytes(kId) > 0) {
      expect_bytes(window + kTableBarrier, table_bytes(kId));
      copy_bulk(window + digits_address(kId), p.weight.table, table_bytes(kId), window + kTableBarrier);
    }
  }
  if (warp == kGroups * 4) write_gains<kId>(dynamic - kSharedBase + kSharedGains, lane);
  __syncthreads();
  synchronize_cluster();
  if (warp >= kGroups * 4) {
    shrink_registers<kSpareRegisters>();
    wait_for_dependencies();
    if (warp > kGroups * 4)
      expand_rest<kId>(p.weight, p.expansion, window, lane);
    else if (lane == 0)
      copy_tiles<kId>(p, window, rank, worker, workers);
  } else {
    grow_registers<kMultiplyRegisters>();
    wait_for_dependencies();
    multiply_tiles<kId>(p, window, dynamic - kSharedBase, rank, worker, workers);
  }
  __syncwarp();
  synchronize_cluster();  // until then the other CTA may still signal this one's barriers
#endif
}

int max_workers() { return device_properties().num_sms / kCluster; }

template <CodebookId kId>
void start(const PrefillArguments& p, cudaStream_t stream) {
  const int workers = std::min(p.order.tiles(), max_workers());
  launch(prefill_kernel<kId>, dim3(static_cast<unsigned>(workers * kCluster)), dim3(kThreads), std::size_t{dynamic_bytes(kId)},
         stream, p);
}

// The rows from `first` on that are expanded at once.
Weight part_of(const Weight& weight, std::int64_t first) {
  return rows_of(weight, first, std::min(expanded_rows(weight.rows, weight.num_chunks), weight.rows - first));
}

Expansion expansion_of(const Weight& weight, std::uint8_t* expanded, std::int64_t num_columns) {
  const int blocks = ceil_div(weight.rows, kExpandedRows), chunks = static_cast<int>(weight.num_chunks);
  const int round = max_workers() / std::min(1 << panel_shift(chunks), ceil_div(num_columns, kN));
  const ExpansionOrder order{blocks, chunks, std::min(blocks, kCluster * std::max(round, 1))};
  return {expanded, reinterpret_cast<std::uint32_t*>(expanded + expanded_data_bytes(weight.rows, chunks)), order,
          static_cast<int>(padded_rows(weight.rows) / kTileRows), std::min(kGroupsBefore, order.groups())};
}

}  // namespace

bool prefill_pays(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks) {
  if (num_columns < kPaysFrom) return false;
  // By measurements on an H100, in the cycles of wgmma_schedule.cpp: a chunk of a tile, a tile besides, all before the first one;
  // weights that a multiprocessor expands in a cycle.
  constexpr double kChunk = 1200, kTile = 2000, kStart = 6500, kExpands = 3.45;
  const int tiles = ceil_div(rows, kTileHeight) * ceil_div(num_columns, kN), rounds = ceil_div(tiles, max_workers());
  const double product = rounds * (static_cast<double>(num_chunks) * kChunk + kTile);
  const double weights = static_cast<double>(rows) * static_cast<double>(num_chunks * kChunkColumns);
  const double expanding = weights / (kExpands * device_properties().num_sms);
  return std::max(product, expanding) + kStart < many_columns_wgmma_cycles(codebook, rows, num_columns, num_chunks);
}

void expand_first(const Weight& weight, std::int64_t num_columns, std::uint8_t* expanded, cudaStream_t stream) {
  const Weight part = part_of(weight, 0);
  expand(part, expansion_of(part, expanded, num_columns), true, stream);
}

void prefill(const Activations& a, const Weight& weight, const Output& output, std::uint8_t* expanded, bool first_is_expanded,
             cudaStream_t stream) {
  for (std::int64_t first = 0; first < weight.rows; first += expanded_rows(weight.rows, weight.num_chunks)) {
    const Weight part = part_of(weight, first);
    const PrefillArguments p{{a, part, rows_of(output, first)},
                             expansion_of(part, expanded, a.num_columns()),
                             TileOrder(ceil_div(part.rows, kTileHeight), ceil_div(a.num_columns(), kN),
                                       panel_shift(static_cast<int>(part.num_chunks)))};
    if (first > 0 || !first_is_expanded) expand(part, p.expansion, false, stream);
    with_codebook(part.codebook, [&](auto id) { start<decltype(id)::value>(p, stream); });
  }
}

}  // namespace pvq::cuda
