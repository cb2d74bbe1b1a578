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

#include "column_sums.cuh"
#include "decode.cuh"
#include "launch.h"
#include "linear.h"
#include "mma.cuh"
#include "quantize.cuh"
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

struct Parameters {
  Tokens tokens;  // fused: what to quantize
  Activations a;  // else: quantized columns
  Weight weight;
  Output output;
  Scratch scratch;
  int num_tiles, tiles_per_block, chunks_per_split;
  int num_columns, stored_columns;  // stored: of a chunk in shared memory, 1, 2, 4 or a multiple of 8
  int sum_stride;                   // words from one column's sums to the next one's
  int token_offset;                 // fused: of the token in shared memory, in bytes from its quantized columns
};

using Facts = ColumnFacts<kMaxFewColumns>;

// A warp's chunks of its block, [tile][chunk of the split]: every kStride-th.
template <int kStride>
struct Walk {
  const std::uint8_t* chunk_data;
  int chunk, left;
  template <CodebookId kId>
  __device__ __forceinline__ void load(LaneChunk<kId>& to, int lane, int num_chunks, int skipped_bytes) {
    if (left <= 0) return;
    to.load(chunk_data, lane);
    --left;
    chunk += kStride;
    chunk_data += kStride * chunk_bytes(kId);
    while (chunk >= num_chunks) {
      chunk -= num_chunks;
      chunk_data += skipped_bytes;
    }
  }
};

// Columns of the split's chunks to shared memory, as they lie in global memory (layout.h): [chunk][stored_columns][128].
__device__ __forceinline__ void copy_columns(const Parameters& p, int first_chunk, int num_chunks, char* to, int num_threads) {
  const int padded = static_cast<int>(p.a.padded_columns), units = p.stored_columns * 8;
  const std::int8_t* from = p.a.data + static_cast<std::int64_t>(first_chunk) * padded * kChunkColumns;
  const int skipped = (padded - p.stored_columns) * 8, shift = __ffs(units) - 1;  // units: a power of two where some are skipped
#pragma unroll 1
  for (int i = threadIdx.x; i < num_chunks * units; i += num_threads)
    copy_async_16(to + 16 * i, from + 16 * static_cast<std::int64_t>(i + (skipped == 0 ? 0 : (i >> shift) * skipped)));
}

// The token to shared memory, as it is in global memory.
__device__ __forceinline__ void copy_token(const Parameters& p, char* to, int num_threads) {
  const int units = static_cast<int>(p.tokens.in_features) / (p.tokens.dtype == DType::kFloat32 ? 4 : 8);
#pragma unroll 1
  for (int i = threadIdx.x; i < units; i += num_threads)
    copy_async_16(to + 16 * i, static_cast<const char*>(p.tokens.x) + 16 * static_cast<std::int64_t>(i));
}

// Quantize the token; the split's chunks go to shared memory as copy_columns would put them.
template <int kThreads>
__device__ __forceinline__ void quantize_token(const Parameters& p, int first_chunk, int num_chunks, char* activations,
                                               Facts& facts, std::uint32_t* warp_largest) {
  const int num_planes = p.tokens.num_planes, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int groups = static_cast<int>(p.tokens.in_features) / 8, padded_groups = static_cast<int>(p.weight.num_chunks) * 16;
  const DType dtype = p.tokens.dtype;
  const char* token = activations + p.token_offset;
  const auto read = [token, dtype](int group, float (&v)[8]) {
    if (dtype == DType::kBFloat16)
      widen_eight<DType::kBFloat16>(reinterpret_cast<const std::uint16_t*>(token) + 8 * group, v);
    else if (dtype == DType::kFloat16)
      widen_eight<DType::kFloat16>(reinterpret_cast<const std::uint16_t*>(token) + 8 * group, v);
    else
      widen_eight<DType::kFloat32>(reinterpret_cast<const float*>(token) + 8 * group, v);
  };
  std::uint32_t largest = largest_magnitude<false, kThreads>(groups, RotatedColumns{}, read);
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) warp_largest[warp] = largest;
  if (threadIdx.x < 2) facts.sums[threadIdx.x] = 0;
  __syncthreads();
  largest = __reduce_max_sync(0xffffffffu, lane < kThreads / 32 ? warp_largest[lane] : 0u);
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
  quantize_columns<false, kThreads>(groups, padded_groups, RotatedColumns{}, read, scale, num_planes, sums,
                                    [&](int plane, int group, std::uint32_t low, std::uint32_t high) {
                                      const int chunk = (group >> 4) - first_chunk;
                                      if (chunk < 0 || chunk >= num_chunks) return;
                                      const int unit = (group >> 1 & 6) ^ plane;
                                      char* to =
                                          activations + (chunk * p.stored_columns + plane) * kChunkColumns + 4 * (group & 3);
                                      *reinterpret_cast<std::uint32_t*>(to + 16 * unit) = low;
                                      *reinterpret_cast<std::uint32_t*>(to + 16 * (unit ^ 1)) = high;
                                    });
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    const std::int32_t sum = __reduce_add_sync(0xffffffffu, sums[plane]);
    if (lane == 0 && plane < num_planes) atomicAdd(&facts.sums[plane], sum);
  }
  if (threadIdx.x == 0) facts.scales[0] = scale.token_scale;
}

// Blocks that share rows leave their sums in `partial`; the last of them adds all up. True in the last one.
template <int kThreads>
__device__ __forceinline__ bool join_splits(const Parameters& p, std::int32_t* sums, int count) {
  __shared__ bool last;
  const int splits = gridDim.y;
  std::int32_t* slot = p.scratch.partial + static_cast<std::int64_t>(blockIdx.x) * splits * count;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) __stcg(slot + blockIdx.y * count + i, sums[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.scratch.counters + blockIdx.x, 1) == splits - 1;
    if (last) p.scratch.counters[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    std::int32_t sum = 0;
    for (int s = 0; s < splits; ++s) sum += __ldcg(slot + s * count + i);
    sums[i] = sum;
  }
  __syncthreads();
  return true;
}

// kFused: quantize one token that needs no rotation here instead of reading quantized columns. kInTurn: the warps take chunks in
// turn, so that a block reads one stretch of memory, instead of consecutive ones, so that a warp has few sums to add.
template <CodebookId kId, int kColumnTiles, bool kFused, bool kInTurn>
__global__ void __launch_bounds__(register_bound(kId, kColumnTiles), 1) few_columns_kernel(const __grid_constant__ Parameters p) {
  constexpr int kThreads = num_threads(kId, kColumnTiles), kWarps = kThreads / 32;
  extern __shared__ __align__(64) char shared[];
  __shared__ Facts facts;
  __shared__ std::uint32_t warp_largest[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int all_chunks = static_cast<int>(p.weight.num_chunks);
  const int first_chunk = blockIdx.y * p.chunks_per_split, num_chunks = min(p.chunks_per_split, all_chunks - first_chunk);
  const int first_tile = blockIdx.x * p.tiles_per_block, num_tiles = min(p.tiles_per_block, p.num_tiles - first_tile);

  constexpr int kStride = kInTurn ? kWarps : 1;
  const int items = num_tiles * num_chunks, first_item = kInTurn ? warp : items * warp / kWarps;
  int tile = first_item / num_chunks, chunk = first_item - tile * num_chunks,
      left = kInTurn ? (items - warp + kWarps - 1) / kWarps : items * (warp + 1) / kWarps - first_item;
  const int skipped_bytes = (all_chunks - num_chunks) * chunk_bytes(kId);
  Walk<kStride> ahead{
      p.weight.data + (static_cast<std::int64_t>(first_tile + tile) * all_chunks + first_chunk + chunk) * chunk_bytes(kId), chunk,
      left};
  LaneChunk<kId> buffer[kPrefetch];
#pragma unroll
  for (int b = 0; b < kPrefetch; ++b) ahead.load(buffer[b], lane, num_chunks, skipped_bytes);

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
  const Tables tables{table_address, base};
  std::int32_t tile_sums[kColumnTiles][4] = {};
  std::uint32_t first_fragments[kSteps][4];
  constexpr bool kDecodeFirst = kId != CodebookId::kInt8;
  if constexpr (kDecodeFirst) {
    if (left > 0) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) decode(buffer[0], s, tables, first_fragments[s]);
    }
    ahead.load(buffer[0], lane, num_chunks, skipped_bytes);
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
  const auto add_sums = [&] {
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      add_fragment(sums, p.sum_stride, tile * kTileRows, 8 * c, p.num_columns, lane, tile_sums[c]);
#pragma unroll
      for (int i = 0; i < 4; ++i) tile_sums[c][i] = 0;
    }
  };
  const auto next_chunk = [&] {
    --left;
    chunk += kStride;
    columns_now += kStride * chunk_stride;
    if (chunk < num_chunks && left > 0) return;
    add_sums();
    while (chunk >= num_chunks) {
      chunk -= num_chunks;
      ++tile;
    }
    columns_now = lane_columns + chunk * chunk_stride;
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
      if (left <= 0) break;
      LaneChunk<kId>& next = buffer[(b + (kDecodeFirst ? 1 : 0)) % kPrefetch];
      const LaneChunk<kId> now = next;
      ahead.load(next, lane, num_chunks, skipped_bytes);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t fragment[4];
        decode(now, s, tables, fragment);
        multiply(s, fragment);
      }
      next_chunk();
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
bool run(Parameters& p, cudaStream_t stream) {
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
      launch_overlapping(overlap, few_columns_kernel<kId, kColumnTiles, kFused, kInTurn>,
                         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), dim3(num_threads(kId, kColumnTiles)),
                         static_cast<std::size_t>(total), stream, p);
      return true;
    }
  }
  return false;
}

template <CodebookId kId, bool kFused>
bool run_columns(Parameters& p, cudaStream_t stream) {
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
bool run_codebook(Parameters& p, std::int64_t num_columns, cudaStream_t stream) {
  p.num_columns = static_cast<int>(num_columns);
  p.stored_columns = num_columns <= 2 ? p.num_columns : num_columns <= 4 ? 4 : static_cast<int>(round_up(num_columns, 8));
  return with_codebook(p.weight.codebook, [&](auto id) { return run_columns<decltype(id)::value, kFused>(p, stream); });
}

}  // namespace

bool quantize_and_multiply(const Tokens& tokens, const Weight& weight, const Output& output, const Scratch& scratch,
                           cudaStream_t stream) {
  if (tokens.num_tokens != 1 || tokens.rotation.num_factors != 0) return false;
  Parameters p{};
  p.tokens = tokens;
  p.weight = weight;
  p.output = output;
  p.scratch = scratch;
  return run_codebook<true>(p, tokens.num_planes, stream);
}

bool few_columns(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream) {
  Parameters p{};
  p.a = a;
  p.weight = weight;
  p.output = output;
  p.scratch = scratch;
  return run_codebook<false>(p, a.num_columns(), stream);
}

}  // namespace pvq::cuda
