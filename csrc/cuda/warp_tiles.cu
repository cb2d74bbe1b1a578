// SPDX-License-Identifier: Apache-2.0
// The product for 9 to 64 columns (planes of tokens), sm_90a: too many to hold all of them in shared memory, too few for the
// tensor cores to be the bound.
//
// A warp owns a tile of 16 rows, or with few tiles shares it with others that take its chunks in turn, and fetches its weights
// into registers itself. One more warp brings the columns, chunk by chunk, into a ring of slots; every slot has barriers of its
// own, so that no warp waits for another one. The sums stay in registers for the whole reduction.
#include <algorithm>

#include "column_sums.cuh"
#include "decode.cuh"
#include "hopper.cuh"
#include "launch.h"
#include "linear.h"
#include "mma.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

// Warps that multiply, at most. With the smaller number, of 96 registers, a block of the kernel that quantizes the activations
// fits beside this one: 16384 registers are left, and kSharedLeft of memory.
constexpr int kFewWarps = 15, kManyWarps = 28;
constexpr int num_threads(int max_warps) { return 32 * (max_warps + 1); }
constexpr int register_bound(int max_warps) { return max_warps == kFewWarps ? 640 : 1024; }  // threads
constexpr int kSharedLeft = 24 * 1024;
// More where this spreads the blocks of quantize() better: many columns of few chunks. What does not fit then is left to
// many_columns_wgmma, which was faster (4096 x 4096, 64 columns).
constexpr int kSharedLeftToSpread = 60 * 1024, kMostSpreadChunks = 32;
constexpr int kMaxSlots = 32;

constexpr int shared_left(std::int64_t num_columns, std::int64_t num_chunks) {
  return num_columns > kMaxFewColumns && num_chunks <= kMostSpreadChunks ? kSharedLeftToSpread : kSharedLeft;
}

struct Parameters {
  Activations a;
  Weight weight;
  Output output;
  int num_tiles, rounds;  // a block has `rounds` times as many tiles as `tiles`
  int tiles, shares;      // tiles at a time, and warps that share one
  int slots, sum_stride;
  int barriers_offset, sums_offset;  // bytes
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kColumnTiles>
__device__ void bring_columns(const Parameters& p, std::uint32_t full, std::uint32_t empty, std::uint32_t ring) {
  const int num_chunks = static_cast<int>(p.weight.num_chunks);
  const std::uint32_t bytes = static_cast<std::uint32_t>(p.a.padded_columns) * kChunkColumns;
  Ring slot;
  for (int round = 0; round < p.rounds; ++round) {
    const std::int8_t* from = p.a.data;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      wait_barrier(empty + 8 * slot.stage, slot.parity ^ 1);
      expect_bytes(full + 8 * slot.stage, bytes);
      copy_bulk(ring + slot.stage * (8 * kColumnTiles * kChunkColumns), from, bytes, full + 8 * slot.stage);
      from += bytes;
      slot.advance(p.slots);
    }
  }
}

#endif

template <CodebookId kId, int kColumnTiles, int kMaxWarps>
__global__ void __launch_bounds__(register_bound(kMaxWarps), 1) warp_tiles_kernel(const __grid_constant__ Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kSlotBytes = 8 * kColumnTiles * kChunkColumns, kConsumersBarrier = 1;
  constexpr int kPrefetch = 2;  // chunks of a warp on their way to registers
  extern __shared__ __align__(64) char shared[];
  __shared__ ColumnFacts<8 * kColumnTiles> facts;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int num_chunks = static_cast<int>(p.weight.num_chunks), consumers = p.tiles * p.shares;
  const bool is_producer = warp == kMaxWarps;
  if (warp >= consumers && !is_producer) return;

  // A warp's tile of the round, and its share of the chunks.
  const int share = warp / p.tiles, local_tile = warp - share * p.tiles;
  const int first_tile = blockIdx.x * p.tiles * p.rounds, last_tile = min(first_tile + p.tiles * p.rounds, p.num_tiles);
  int load_tile = first_tile + local_tile, load_chunk = share;
  const std::int64_t tile_bytes = p.weight.num_chunks * chunk_bytes(kId);
  const std::uint8_t* load_data = p.weight.data + load_tile * tile_bytes + load_chunk * chunk_bytes(kId);
  LaneChunk<kId> buffer[kPrefetch];
  const auto load_ahead = [&](LaneChunk<kId>& to) {
    if (load_tile < last_tile) to.load(load_data, lane);
    load_chunk += p.shares;
    load_data += p.shares * chunk_bytes(kId);
    if (load_chunk >= num_chunks) {
      load_tile += p.tiles;
      load_chunk = share;
      load_data = p.weight.data + load_tile * tile_bytes + load_chunk * chunk_bytes(kId);
    }
  };
  if (!is_producer) load_ahead(buffer[0]);

  const std::uint32_t base = shared_address(shared);
  const std::uint32_t full = base + p.barriers_offset, empty = full + 8 * kMaxSlots;
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(shared + p.sums_offset);
  const int num_columns = static_cast<int>(p.a.num_columns()), num_tokens = static_cast<int>(p.a.num_tokens);
  float* row_scale = reinterpret_cast<float*>(sums + 8 * kColumnTiles * p.sum_stride);  // of a round
  const std::uint32_t table_address =
      (base + p.sums_offset + 4 * (8 * kColumnTiles * p.sum_stride + p.tiles * kTileRows) + kTableAlignment - 1) &
      ~(kTableAlignment - 1u);
  const std::uint32_t ring = table_address + table_bytes(kId);
  const int threads_here = 32 * consumers + 32;  // with the producer, whose place among them does not matter
  if (is_producer && lane == 0) {
    for (int slot = 0; slot < p.slots; ++slot) {
      init_barrier(full + 8 * slot, 1);
      init_barrier(empty + 8 * slot, 32 * p.tiles);
    }
    fence_barrier_init();
  }
  if (!is_producer) {
    char* table = shared + (table_address - base);
#pragma unroll 1
    for (int i = threadIdx.x; i < table_words(kId) / 4; i += 32 * consumers)
      copy_async_16(table + 16 * i, p.weight.table + 4 * i);
    copy_async_commit();
    write_gains<kId>(shared, threadIdx.x);
  }
  launch_dependents();
  copy_async_wait<0>();
  synchronize_threads(kConsumersBarrier + 1, threads_here);
  if (!is_producer) load_ahead(buffer[1]);  // not before the table, which would come later
  wait_for_dependencies();
  if (is_producer) {
    if (lane == 0) bring_columns<kColumnTiles>(p, full, empty, ring);
    return;
  }
  for (int i = threadIdx.x; i < num_columns; i += 32 * consumers) facts.sums[i] = __ldcg(p.a.sums + i);
  for (int i = threadIdx.x; i < num_tokens; i += 32 * consumers) facts.scales[i] = __ldcg(p.a.token_scale + i);

  const Tables tables{table_address, base};
  const int lane_row = lane & 7, matrix = lane >> 3, lane_column = 8 * (matrix >> 1) + lane_row;
  const std::uint32_t lane_columns = ring + lane_column * kChunkColumns + 16 * ((matrix & 1) ^ lane_row);
  int slot = share;
  std::uint32_t parity = 0;
  while (slot >= p.slots) {
    slot -= p.slots;
    parity ^= 1;
  }
  for (int round = 0; round < p.rounds; ++round) {
    std::int32_t tile_sums[kColumnTiles][4] = {};
    const auto multiply_chunk = [&](LaneChunk<kId>& next, bool present) {
      const LaneChunk<kId> now = next;
      load_ahead(next);
      wait_barrier(full + 8 * slot, parity);
      const std::uint32_t columns = lane_columns + slot * kSlotBytes;
      if (present) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          std::uint32_t fragment[4];
          decode(now, s, tables, fragment);
#pragma unroll
          for (int c = 0; c < kColumnTiles; c += 2) {
            std::uint32_t b[4];
            load_fragments((columns ^ (32 * s)) + c * 8 * kChunkColumns, b);
            mma_m16n8k32(tile_sums[c], fragment, b[0], b[1]);
            mma_m16n8k32(tile_sums[c + 1], fragment, b[2], b[3]);
          }
        }
      }
      arrive(empty + 8 * slot);  // every lane: no slower than one for its warp, and compute-sanitizer sees the order
      slot += p.shares;
      while (slot >= p.slots) {
        slot -= p.slots;
        parity ^= 1;
      }
    };
    const int round_tile = first_tile + round * p.tiles, tile = round_tile + local_tile;
    const bool present = tile < last_tile;
    // An odd number of chunks in a round would exchange the buffers: bring them back into order.
    int chunk = share;
    while (true) {
      if (chunk >= num_chunks) break;
      multiply_chunk(buffer[0], present);
      chunk += p.shares;
      if (chunk >= num_chunks) {
        const LaneChunk<kId> first = buffer[1];
        buffer[1] = buffer[0];
        buffer[0] = first;
        break;
      }
      multiply_chunk(buffer[1], present);
      chunk += p.shares;
    }
    const int first_row = round_tile * kTileRows;
    const int rows_here = min(min(p.tiles, last_tile - round_tile) * kTileRows, static_cast<int>(p.weight.rows) - first_row);
    synchronize_threads(kConsumersBarrier, 32 * consumers);  // the sums of the round before have been read
    for (int i = threadIdx.x; i < rows_here; i += 32 * consumers) row_scale[i] = p.weight.row_scale[first_row + i];
    if (share == 0) {
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
        store_fragment(sums, p.sum_stride, local_tile * kTileRows, 8 * c, lane, tile_sums[c]);
    }
    synchronize_threads(kConsumersBarrier, 32 * consumers);
    if (p.shares > 1) {
      if (share > 0) {
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c)
          add_fragment(sums, p.sum_stride, local_tile * kTileRows, 8 * c, num_columns, lane, tile_sums[c]);
      }
      synchronize_threads(kConsumersBarrier, 32 * consumers);
    }
    if (rows_here > 0)
      store_outputs(p.output, p.weight.codebook, sums, p.sum_stride, first_row, rows_here, num_tokens, p.a.num_planes, facts,
                    row_scale, 32 * consumers);
  }
#endif
}

// Dynamic shared memory; 0: it does not fit.
template <CodebookId kId, int kColumnTiles, int kMaxWarps>
int lay_out(Parameters& p, int most) {
  const int chunks = static_cast<int>(p.weight.num_chunks);
  p.rounds = ceil_div(most, kMaxWarps);
  p.tiles = ceil_div(most, p.rounds);
  p.shares = std::min(kMaxWarps / p.tiles, chunks);
  // A share's chunks of the next round must follow those of this one in the ring.
  while (p.rounds > 1 && chunks % p.shares != 0) --p.shares;
  p.sum_stride = static_cast<int>(column_stride(p.tiles * kTileRows));
  p.barriers_offset = kGainTableBytes;
  p.sums_offset = p.barriers_offset + 2 * 8 * kMaxSlots;
  const int sum_bytes = 4 * (8 * kColumnTiles * p.sum_stride + p.tiles * kTileRows);
  const int ring = static_cast<int>(round_up(kMaxSharedBase + p.sums_offset + sum_bytes, kTableAlignment)) + table_bytes(kId);
  constexpr int kSlotBytes = 8 * kColumnTiles * kChunkColumns;
  const int room = device_properties().max_shared_bytes - shared_left(8 * kColumnTiles, chunks) - ring;
  p.slots = std::min(room / kSlotBytes, kMaxSlots);
  return p.slots >= 2 * p.shares || p.slots >= chunks ? ring + p.slots * kSlotBytes : 0;
}

template <CodebookId kId, int kColumnTiles, int kMaxWarps>
bool run_with(Parameters& p, int most, bool only_lay_out, cudaStream_t stream) {
  const int shared_bytes = lay_out<kId, kColumnTiles, kMaxWarps>(p, most);
  if (shared_bytes == 0) return false;
  if (!only_lay_out)
    launch(warp_tiles_kernel<kId, kColumnTiles, kMaxWarps>,
           dim3(static_cast<unsigned>(ceil_div(p.num_tiles, p.tiles * p.rounds))), dim3(num_threads(kMaxWarps)),
           static_cast<std::size_t>(shared_bytes), stream, p);
  return true;
}

template <CodebookId kId, int kColumnTiles>
bool run(Parameters& p, bool only_lay_out, cudaStream_t stream) {
  p.num_tiles = static_cast<int>((p.weight.rows + kTileRows - 1) / kTileRows);
  const int most = ceil_div(p.num_tiles, device_properties().num_sms);  // of a block
  if constexpr (kColumnTiles <= 4 && kId != CodebookId::kInt8) {        // hardly any spill from 64 registers
    if (ceil_div(most, kManyWarps) < ceil_div(most, kFewWarps))
      return run_with<kId, kColumnTiles, kManyWarps>(p, most, only_lay_out, stream);
  }
  return run_with<kId, kColumnTiles, kFewWarps>(p, most, only_lay_out, stream);
}

bool run_columns(Parameters& p, std::int64_t num_columns, bool only_lay_out, cudaStream_t stream) {
  return with_codebook(p.weight.codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    if (num_columns <= 16) return run<kId, 2>(p, only_lay_out, stream);
    return num_columns <= 32 ? run<kId, 4>(p, only_lay_out, stream) : run<kId, 8>(p, only_lay_out, stream);
  });
}

}  // namespace

bool warp_tiles(const Activations& a, const Weight& weight, const Output& output, cudaStream_t stream) {
  if (a.num_columns() > kMaxWarpTileColumns) return false;
  Parameters p{};
  p.a = a;
  p.weight = weight;
  p.output = output;
  return run_columns(p, a.num_columns(), false, stream);
}

bool warp_tiles_pay(CodebookId codebook, std::int64_t rows, std::int64_t num_columns) {
  const int most = ceil_div(ceil_div(rows, kTileRows), device_properties().num_sms);  // of a block
  return num_columns <= kMaxFewColumns || codebook == CodebookId::kInt8 || most <= kFewWarps;
}

int shared_beside(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks) {
  if (!device_properties().has_wgmma || num_columns <= kMaxFewColumns) return Activations::kUnknown;
  if (num_columns > kMaxWarpTileColumns || !warp_tiles_pay(codebook, rows, num_columns)) return 0;
  Parameters p{};
  p.weight.codebook = codebook;
  p.weight.rows = rows;
  p.weight.num_chunks = num_chunks;
  if (!run_columns(p, num_columns, true, nullptr)) return 0;
  const int left = shared_left(num_columns, num_chunks);
  return left == kSharedLeftToSpread ? left : Activations::kUnknown;
}

}  // namespace pvq::cuda
