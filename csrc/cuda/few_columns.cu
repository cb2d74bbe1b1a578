// SPDX-License-Identifier: Apache-2.0
// The product for at most 32 columns (planes of tokens), bound by the bytes of the weight and by decoding them.
//
// One block a multiprocessor holds all the columns in shared memory and owns consecutive tiles of 16 rows. Each of its warps
// takes consecutive chunks of these tiles, on its own: no barrier between the first chunk and the last, since integer sums may be
// added in any order. What does not need the activations is done before they exist, that is before the kernel that makes them has
// ended (programmatic dependence): the first chunks are on their way to registers, and the very first is decoded. A single token
// that needs no rotation is quantized here, by every block for itself; with more tokens, or a rotation, a kernel in front of this
// one, which overlaps with its prologue, is faster.
#include <algorithm>

#include "few_columns.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

constexpr int kPrefetch = 2;  // chunks of a warp on their way to registers
constexpr int kMaxSplits = 8;
constexpr int kManyChunks = 32;

// Either way 16384 registers are left, for a block of the kernel that quantizes the activations.
constexpr bool wants_registers(CodebookId id, int column_tiles) { return column_tiles > 2 || id == CodebookId::kInt8; }
constexpr int num_threads(CodebookId id, int column_tiles) { return wants_registers(id, column_tiles) ? 512 : 768; }
// As many threads as would share all registers: 96 or 64 for each.
constexpr int register_bound(CodebookId id, int column_tiles) { return wants_registers(id, column_tiles) ? 640 : 1024; }

// How a warp walks through the chunks of its block, [tile][chunk]: it takes consecutive ones, so that it has few sums to add;
// every kWarps-th, so that a block reads one stretch of memory; or consecutive ones where blocks share tiles.
enum class Walk { kConsecutive, kInTurn, kShared };

// kFused: quantize one token that needs no rotation here instead of reading quantized columns.
template <CodebookId kId, int kColumnTiles, bool kFused, Walk kWalk>
__global__ void __launch_bounds__(register_bound(kId, kColumnTiles), 1) few_columns_kernel(const __grid_constant__ FewColumns p) {
  constexpr int kThreads = num_threads(kId, kColumnTiles), kWarps = kThreads / 32;
  extern __shared__ __align__(64) char shared[];
  __shared__ FewColumnsFacts facts;
  __shared__ std::uint32_t warp_largest[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int all_chunks = static_cast<int>(p.weight.num_chunks);
  const int first_chunk = blockIdx.y * p.chunks_per_split, num_chunks = min(p.chunks_per_split, all_chunks - first_chunk);
  const int first_tile = blockIdx.x * p.tiles_per_block, num_tiles = min(p.tiles_per_block, p.num_tiles - first_tile);

  constexpr bool kInTurn = kWalk == Walk::kInTurn;
  constexpr int kStride = kInTurn ? kWarps : 1;
  const int items = num_tiles * num_chunks, first_item = kInTurn ? warp : items * warp / kWarps;
  const int own_items = kInTurn ? (items - warp + kWarps - 1) / kWarps : items * (warp + 1) / kWarps - first_item;
  int tile = first_item / num_chunks, chunk = first_item - tile * num_chunks;
  // Chunks of the tile still to be multiplied, and of later tiles.
  int tile_items = (num_chunks - chunk + kStride - 1) / kStride;  // of the warp, were it to do the whole tile
  int left = min(tile_items, own_items), later = own_items - left;
  // What the lane reads next, kPrefetch chunks ahead.
  const std::uint8_t* ahead =
      p.weight.data + (static_cast<std::int64_t>(first_tile + tile) * all_chunks + first_chunk + chunk) * chunk_bytes(kId) +
      16 * lane;
  [[maybe_unused]] int chunk_ahead = chunk;
  LaneChunk<kId> buffer[kPrefetch];
  // A branch in any case: loads under a predicate ptxas moves down, in the prologue behind the wait for the activations.
  const auto refill = [&](LaneChunk<kId>& to, bool present) {
    if (!present) {
      __nanosleep(0);
      return;
    }
    to.load(ahead - 16 * lane, lane);
    ahead += kStride * chunk_bytes(kId);
    if constexpr (kWalk == Walk::kShared) {
      if (++chunk_ahead == num_chunks) {
        chunk_ahead = 0;
        ahead += (all_chunks - num_chunks) * chunk_bytes(kId);
      }
    }
  };
  // The second chunk after the table: before it, the table would come later, and the tokens to the kernel that quantizes. (Where
  // the token is quantized here, both chunks first are faster.)
  refill(buffer[0], own_items > 0);
  if constexpr (kFused) refill(buffer[1], own_items > 1);

  const std::uint32_t base = shared_address(shared);
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(shared + kGainTableBytes);  // [columns][sum_stride]
  const int num_rows = num_tiles * kTileRows, num_sums = p.num_columns * p.sum_stride;
  float* row_scale = reinterpret_cast<float*>(sums + num_sums);
  const std::uint32_t table_address =
      (base + kGainTableBytes + 4 * (num_sums + p.tiles_per_block * kTileRows) + kTableAlignment - 1) & ~(kTableAlignment - 1u);
  char* table = shared + (table_address - base);
  char* activations = table + table_bytes(kId);
#pragma unroll 1
  for (int i = threadIdx.x; i < table_words(kId) / 4; i += kThreads) copy_async_16(table + 16 * i, p.weight.table + 4 * i);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_rows / 4; i += kThreads)
    copy_async_16(row_scale + 4 * i, p.weight.row_scale + first_tile * kTileRows + 4 * i);
  copy_async_commit();
  write_gains<kId>(shared, threadIdx.x);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_sums; i += kThreads) sums[i] = 0;
  launch_dependents();

  if constexpr (kFused) {  // the token comes while the first chunk is decoded
    wait_for_dependencies();
    copy_token(p, activations + p.token_offset, kThreads);
    copy_async_commit();
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
  __syncthreads();
  if constexpr (!kFused) refill(buffer[1], own_items > 1);
  const Tables tables{table_address, base};
  std::int32_t tile_sums[kColumnTiles][4] = {};
  std::uint32_t first_fragments[kSteps][4];
  constexpr bool kDecodeFirst = kId != CodebookId::kInt8;
  if constexpr (kDecodeFirst) {
    if (own_items > 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) decode(buffer[0], s, tables, first_fragments[s]);
    }
    refill(buffer[0], own_items > kPrefetch);
  }
  if constexpr (kFused) {
    copy_async_wait<0>();
    __syncthreads();
    quantize_token<kThreads>(p, first_chunk, num_chunks, activations, facts, warp_largest);
  } else {
    wait_for_dependencies();
    copy_columns(p, first_chunk, num_chunks, activations, kThreads);
    copy_async_commit();
    if (threadIdx.x < p.num_columns) facts.sums[threadIdx.x] = __ldcg(p.a.sums + threadIdx.x);
    if (threadIdx.x < p.a.num_tokens) facts.scales[threadIdx.x] = __ldcg(p.a.token_scale + threadIdx.x);
    copy_async_wait<0>();
  }
  __syncthreads();

  // Rows of ldmatrix: with one column tile the low and high halves of two steps, else those of a step for two column tiles.
  // Columns past the last repeat it: their sums go nowhere.
  const int row = lane & 7, matrix = lane >> 3;
  const int lane_column = min(kColumnTiles == 1 ? row : 8 * (matrix >> 1) + row, p.stored_columns - 1);
  const std::uint32_t lane_columns =
      shared_address(activations) +
      static_cast<std::uint32_t>(lane_column * kChunkColumns +
                                 16 * ((kColumnTiles == 1 ? matrix : matrix & 1) ^ (lane_column & 7)));
  const std::uint32_t chunk_stride = p.stored_columns * kChunkColumns;
  std::uint32_t columns_now = lane_columns + chunk * chunk_stride;
  std::uint32_t halves[4];  // one column tile: of this step and the next
  const auto multiply = [&](int s, const std::uint32_t (&fragment)[4]) {
    if constexpr (kColumnTiles == 1) {
      if (s % 2 == 0) load_fragments(columns_now ^ (32 * s), halves);
      mma_m16n8k32(tile_sums[0], fragment, halves[s % 2 * 2], halves[s % 2 * 2 + 1]);
    } else {
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        std::uint32_t b[4];
        load_fragments((columns_now ^ (32 * s)) + c * 8 * kChunkColumns, b);
        mma_m16n8k32(tile_sums[c], fragment, b[0], b[1]);
        mma_m16n8k32(tile_sums[c + 1], fragment, b[2], b[3]);
      }
    }
  };
  const auto add_tile_sums = [&] {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      add_fragment(sums, p.sum_stride, tile * kTileRows, 8 * c, p.num_columns, lane, tile_sums[c]);
#pragma unroll
      for (int i = 0; i < 4; ++i) tile_sums[c][i] = 0;
    }
  };
  const auto next_chunk = [&] {
    columns_now += kStride * chunk_stride;
    if (--left > 0) return;
    add_tile_sums();
    ++tile;
    if constexpr (kInTurn) {
      for (chunk += tile_items * kStride - num_chunks; chunk >= num_chunks; chunk -= num_chunks) ++tile;
      columns_now = lane_columns + chunk * chunk_stride;
      tile_items = (num_chunks - chunk + kStride - 1) / kStride;
    } else {
      columns_now = lane_columns;
      tile_items = num_chunks;
    }
    left = min(tile_items, later);
    later -= left;
  };
  if constexpr (kDecodeFirst) {
    if (left > 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) multiply(s, first_fragments[s]);
      next_chunk();
    }
  }
  while (left > 0) {
#pragma unroll
    for (int b = 0; b < kPrefetch; ++b) {
      LaneChunk<kId>& next = buffer[(b + (kDecodeFirst ? 1 : 0)) % kPrefetch];
      const LaneChunk<kId> now = next;
      refill(next, left > kPrefetch - later);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t fragment[4];
        decode(now, s, tables, fragment);
        multiply(s, fragment);
      }
      next_chunk();
      if (left <= 0) break;
    }
  }
  __syncthreads();
  if (gridDim.y > 1 && !join_splits<kThreads>(p, sums, num_sums)) return;
  const int first_row = first_tile * kTileRows, rows_here = min(num_rows, static_cast<int>(p.weight.rows) - first_row);
  const int num_planes = kFused ? p.tokens.num_planes : p.a.num_planes,
            num_tokens = static_cast<int>(kFused ? p.tokens.num_tokens : p.a.num_tokens);
  store_outputs(p.output, p.weight.codebook, sums, p.sum_stride, first_row, rows_here, num_tokens, num_planes, facts, row_scale,
                kThreads);
}

// Blocks, splits and shared memory; false if nothing fits.
template <CodebookId kId, int kColumnTiles, bool kFused, bool kInTurn>
bool run(FewColumns& p, cudaStream_t stream) {
  const DeviceProperties& device = device_properties();
  const std::int64_t tiles = (p.weight.rows + kTileRows - 1) / kTileRows, chunks = p.weight.num_chunks, columns = p.num_columns;
  const std::int64_t token_bytes = kFused ? p.tokens.in_features * (p.tokens.dtype == DType::kFloat32 ? 4 : 2) : 0;
  const std::int64_t first_splits =
      std::clamp<std::int64_t>(device.num_sms / tiles, 1, std::min<std::int64_t>(kMaxSplits, chunks));
  for (std::int64_t chunks_here = (chunks + first_splits - 1) / first_splits; chunks_here > 0; --chunks_here) {
    const std::int64_t splits = (chunks + chunks_here - 1) / chunks_here;
    if (splits > kMaxSplits) break;
    // More splits than the rows ask for are slower than warp_tiles.cu.
    if (kColumnTiles > 1 && splits > first_splits && device.has_wgmma) return false;
    // As many blocks as give everyone the same number of tiles: what is left of the device is for the kernel before this one.
    for (std::int64_t tiles_here = (tiles * splits + device.num_sms - 1) / device.num_sms;; tiles_here = (tiles_here + 1) / 2) {
      const std::int64_t blocks = (tiles + tiles_here - 1) / tiles_here;
      const std::int64_t sum_stride = column_stride(tiles_here * kTileRows);
      const std::int64_t sum_bytes = 4 * (columns * sum_stride + tiles_here * kTileRows);
      const std::int64_t read_past = kColumnTiles == 4 ? 32 - p.stored_columns : 0;  // columns of the last chunk
      const std::int64_t total = round_up(kMaxSharedBase + kGainTableBytes + sum_bytes, kTableAlignment) + table_bytes(kId) +
                                 (chunks_here * p.stored_columns + read_past) * kChunkColumns + token_bytes;
      const bool fits = total + kMaxSharedBase <= device.max_shared_bytes;
      if (!fits && sum_bytes > 24 * 1024 && tiles_here > 1) continue;
      if (!fits) break;
      if (splits > 1 && (blocks * splits * columns * sum_stride > p.scratch.partial_elements || blocks > kNumCounters))
        return false;
      p.num_tiles = static_cast<int>(tiles);
      p.tiles_per_block = static_cast<int>(tiles_here);
      p.chunks_per_split = static_cast<int>(chunks_here);
      p.sum_stride = static_cast<int>(sum_stride);
      p.token_offset = static_cast<int>(chunks_here * p.stored_columns * kChunkColumns);
      const bool overlap = kFused || starts_early(p.a, blocks * splits);
      constexpr Walk kWhole = kInTurn ? Walk::kInTurn : Walk::kConsecutive;
      const auto kernel = splits > 1 ? few_columns_kernel<kId, kColumnTiles, kFused, Walk::kShared>
                                     : few_columns_kernel<kId, kColumnTiles, kFused, kWhole>;
      launch_overlapping(overlap, kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)),
                         dim3(num_threads(kId, kColumnTiles)), static_cast<std::size_t>(total), stream, p);
      return true;
    }
  }
  return false;
}

template <CodebookId kId, bool kFused>
bool run_columns(FewColumns& p, cudaStream_t stream) {
  // Chunks of a warp: only where they are many does memory count for more than adding the sums of every tile.
  const std::int64_t tiles = (p.weight.rows + kTileRows - 1) / kTileRows, num_sms = device_properties().num_sms,
                     chunks = (tiles + num_sms - 1) / num_sms * p.weight.num_chunks / (num_threads(kId, 1) / 32);
  if (p.num_columns <= 2 && chunks > kManyChunks) return run<kId, 1, kFused, true>(p, stream);
  if (kFused || p.num_columns <= 8) return run<kId, 1, kFused, false>(p, stream);
  if constexpr (!kFused) {
    if (p.num_columns <= 16) return run<kId, 2, kFused, false>(p, stream);
    if (p.num_columns <= 32) return run<kId, 4, kFused, false>(p, stream);
  }
  return false;
}

template <bool kFused>
bool run_codebook(FewColumns& p, std::int64_t num_columns, cudaStream_t stream) {
  p.num_columns = static_cast<int>(num_columns);
  p.stored_columns = num_columns <= 2 ? p.num_columns : num_columns <= 4 ? 4 : static_cast<int>(round_up(num_columns, 8));
  return with_codebook(p.weight.codebook, [&](auto id) { return run_columns<decltype(id)::value, kFused>(p, stream); });
}

}  // namespace

bool quantize_and_multiply(const Tokens& tokens, const Weight& weight, const Output& output, const Scratch& scratch,
                           cudaStream_t stream) {
  if (tokens.num_tokens != 1 || tokens.rotation.num_factors != 0) return false;
  FewColumns p{};
  p.tokens = tokens;
  p.weight = weight;
  p.output = output;
  p.scratch = scratch;
  return run_codebook<true>(p, tokens.num_planes, stream);
}

bool few_columns(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream) {
  FewColumns p{};
  p.a = a;
  p.weight = weight;
  p.output = output;
  p.scratch = scratch;
  return run_codebook<false>(p, a.num_columns(), stream);
}

}  // namespace pvq::cuda
