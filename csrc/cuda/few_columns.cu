// SPDX-License-Identifier: Apache-2.0
// The product for at most 16 columns (planes of tokens), bound by the bytes of the weight and by decoding them.
//
// One block a multiprocessor holds all the columns in shared memory and owns consecutive tiles of 16 rows. Its warps take the
// chunks of these tiles in turn, each on its own: no barrier between the first chunk and the last, since integer sums may be
// added in any order. What does not need the activations is done before they exist, that is before the kernel that makes them has
// ended (programmatic dependence): the first chunks are on their way, and the very first is decoded.
#include <algorithm>

#include "decode.cuh"
#include "finish.cuh"
#include "launch.h"
#include "linear.h"
#include "mma.cuh"
#include "rotate.cuh"

namespace pvq::cuda {
namespace {

// 768 threads of 64 registers leave room on the multiprocessor for a block of the kernel that quantizes the activations.
constexpr int kThreads = 768, kWarps = kThreads / 32;
constexpr int kPrefetch = 2;  // chunks of a warp on their way
constexpr int kMaxSplits = 8;

struct Parameters {
  Tokens tokens;  // fused: what to quantize
  Activations a;  // else: quantized columns
  Weight weight;
  Output output;
  Scratch scratch;
  int num_tiles, tiles_per_block, chunks_per_split;
  int activations_offset, floats_offset;  // bytes from the table
};

// A warp's place in the tiles and chunks of its block.
struct Cursor {
  int tile, chunk;
  __device__ __forceinline__ explicit Cursor(int warp, int num_chunks) : tile(0), chunk(warp) { settle(num_chunks); }
  __device__ __forceinline__ void settle(int num_chunks) {
    while (chunk >= num_chunks) {
      chunk -= num_chunks;
      ++tile;
    }
  }
  __device__ __forceinline__ void advance(int num_chunks) {
    chunk += kWarps;
    settle(num_chunks);
  }
};

// Columns in shared memory: [chunk][step][kColumns][32 bytes in the order of the weight's columns], so that both halves of a
// lane's fragment B are one read and eight columns meet no bank conflict.
template <int kColumns>
__device__ __forceinline__ void copy_columns(const Activations& a, int first_chunk, int num_chunks, char* activations) {
  const int columns = a.num_columns();
#pragma unroll 1
  for (int i = threadIdx.x; i < num_chunks * kColumns * 8; i += kThreads) {
    const int unit = i & 7, column = (i >> 3) % kColumns, chunk = (i >> 3) / kColumns;
    if (column >= columns) continue;
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(
        a.data + ((first_chunk + chunk) * a.padded_columns + column) * kChunkColumns + 16 * (unit ^ (column & 7))));
    std::uint32_t* to =
        reinterpret_cast<std::uint32_t*>(activations + ((chunk * kSteps + unit / 2) * kColumns + column) * 32) + (unit & 1);
    to[0] = words.x;
    to[2] = words.y;
    to[4] = words.z;
    to[6] = words.w;
  }
}

struct TokenFacts {  // of all columns and tokens, in shared memory
  std::int32_t sums[kMaxFewColumns];
  float scales[kMaxFewColumns];
};

template <typename T>
__device__ __forceinline__ void store_outputs(const Parameters& p, const std::int32_t* sums, int columns_stride, int first_row,
                                              int num_rows, int num_tokens, int num_planes, const TokenFacts& facts,
                                              const float* row_scale) {
  const int half_offset = p.weight.codebook == CodebookId::kInt8 ? 0 : 1;
#pragma unroll 1
  for (int token = 0; token < num_tokens; ++token) {
    T* y = static_cast<T*>(p.output.y) + token * p.output.stride + first_row;
    const T* bias = p.output.bias == nullptr ? nullptr : static_cast<const T*>(p.output.bias) + first_row;
    const int column = token * num_planes;
#pragma unroll 1
    for (int row = threadIdx.x; row < num_rows; row += kThreads) {
      float value = plane_value(sums[row * columns_stride + column], facts.sums[column], half_offset);
      if (num_planes == 2)
        value = join_planes(value, plane_value(sums[row * columns_stride + column + 1], facts.sums[column + 1], half_offset));
      y[row] = finish_value<T>(value, row_scale[row], facts.scales[token], bias, row);
    }
  }
}

// Blocks that share rows leave their sums in `partial`; the last of them adds all up. True in the last one.
__device__ __forceinline__ bool join_splits(const Parameters& p, std::int32_t* sums, int first, int count, int columns) {
  __shared__ bool last;
  const int splits = gridDim.y;
  const std::int64_t stride = static_cast<std::int64_t>(p.num_tiles) * kTileRows * columns;
  std::int32_t* slot = p.scratch.partial + first;
  for (int i = threadIdx.x; i < count; i += kThreads) __stcg(slot + blockIdx.y * stride + i, sums[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.scratch.counters + blockIdx.x, 1) == splits - 1;
    if (last) p.scratch.counters[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    std::int32_t sum = 0;
    for (int s = 0; s < splits; ++s) sum += __ldcg(slot + s * stride + i);
    sums[i] = sum;
  }
  __syncthreads();
  return true;
}

template <DType kType, int kColumns>
__device__ __noinline__ float quantize_typed(const Parameters& p, float* y, int first_chunk, int num_chunks, GroupSums& reduction,
                                             char* activations) {
  const Group group{static_cast<int>(threadIdx.x), kThreads, 1};
  const int first_quad = first_chunk * (kChunkColumns / 4), num_quads = num_chunks * (kChunkColumns / 4);
  rotate_token<kType, 0>(group, p.tokens.x, p.tokens, y, nullptr);
  return quantize_token(group, y, p.tokens, static_cast<int>(p.weight.num_chunks) * kChunkColumns, reduction,
                        [&](int plane, int quad, std::uint32_t word) {
                          const int local = quad - first_quad;
                          if (local >= 0 && local < num_quads)
                            reinterpret_cast<std::uint32_t*>(activations)[((local >> 3) * kColumns + plane) * 8 + (local & 7)] =
                                word;
                        });
}

template <int kColumns>
__device__ __forceinline__ float quantize_here(const Parameters& p, float* y, int first_chunk, int num_chunks,
                                               GroupSums& reduction, char* activations) {
  if (p.tokens.dtype == DType::kBFloat16)
    return quantize_typed<DType::kBFloat16, kColumns>(p, y, first_chunk, num_chunks, reduction, activations);
  if (p.tokens.dtype == DType::kFloat16)
    return quantize_typed<DType::kFloat16, kColumns>(p, y, first_chunk, num_chunks, reduction, activations);
  return quantize_typed<DType::kFloat32, kColumns>(p, y, first_chunk, num_chunks, reduction, activations);
}

// kFused: quantize one token that needs no rotation here instead of reading quantized columns.
template <CodebookId kId, int kColumns, bool kFused>
__global__ void __launch_bounds__(1024, 1)  // of 1024 threads: at most 64 registers
    few_columns_kernel(const __grid_constant__ Parameters p) {
  constexpr int kColumnTiles = (kColumns + 7) / 8;
  extern __shared__ __align__(64) char shared[];
  __shared__ TokenFacts facts;
  __shared__ GroupSums reduction;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int all_chunks = static_cast<int>(p.weight.num_chunks);
  const int first_chunk = blockIdx.y * p.chunks_per_split, num_chunks = min(p.chunks_per_split, all_chunks - first_chunk);
  const int first_tile = blockIdx.x * p.tiles_per_block, num_tiles = min(p.tiles_per_block, p.num_tiles - first_tile);

  Cursor ahead(warp, num_chunks);
  const std::uint8_t* weights =
      p.weight.data + (static_cast<std::int64_t>(first_tile) * all_chunks + first_chunk) * chunk_bytes(kId);
  LaneChunk<kId> buffer[kPrefetch];
  const auto load_ahead = [&](LaneChunk<kId>& chunk) {
    if (ahead.tile < num_tiles)
      chunk.load(weights + (static_cast<std::int64_t>(ahead.tile) * all_chunks + ahead.chunk) * chunk_bytes(kId), lane);
    ahead.advance(num_chunks);
  };
#pragma unroll
  for (int b = 0; b < kPrefetch; ++b) load_ahead(buffer[b]);

  const std::uint32_t base = shared_address(shared);
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(shared + kGainTableBytes);
  const int num_rows = num_tiles * kTileRows, num_sums = num_rows * kColumns;
  float* row_scale = reinterpret_cast<float*>(sums + num_sums);
  const std::uint32_t table_address =
      (base + kGainTableBytes + 4 * (num_sums + num_rows) + kTableAlignment - 1) & ~(kTableAlignment - 1u);
  char* table = shared + (table_address - base);
  char* activations = table + p.activations_offset;
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

  copy_async_wait<0>();
  __syncthreads();
  const Tables tables{table_address, base};
  const int g = lane >> 2, t = lane & 3;
  const char* lane_columns =
      activations + min(g, kColumns - 1) * 32 + 8 * t;  // columns past the last repeat it: their sums go nowhere
  const int num_tokens = kFused ? 1 : static_cast<int>(p.a.num_tokens),
            num_planes = kFused ? p.tokens.num_planes : p.a.num_planes;
  std::int32_t tile_sums[kColumnTiles][4] = {};
  Cursor now(warp, num_chunks);
  std::uint32_t first_fragments[kSteps][4];
  constexpr bool kDecodeFirst = !kFused && kId != CodebookId::kInt8;
  if constexpr (kDecodeFirst) {
    if (now.tile < num_tiles) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) buffer[0].decode(s, tables, first_fragments[s]);
    }
    load_ahead(buffer[0]);
  }
  wait_for_dependencies();
  if constexpr (kFused) {
    float* y = reinterpret_cast<float*>(table + p.floats_offset);
    const float token_scale = quantize_here<kColumns>(p, y, first_chunk, num_chunks, reduction, activations);
    if (threadIdx.x == 0) facts.scales[0] = token_scale;
  } else {
    if (threadIdx.x < p.a.num_columns()) facts.sums[threadIdx.x] = __ldcg(p.a.sums + threadIdx.x);
    if (threadIdx.x < num_tokens) facts.scales[threadIdx.x] = __ldcg(p.a.token_scale + threadIdx.x);
    copy_columns<kColumns>(p.a, first_chunk, num_chunks, activations);
  }
  __syncthreads();

  const auto multiply = [&](int s, const std::uint32_t (&fragment)[4]) {
    const char* columns = lane_columns + (now.chunk * kSteps + s) * (kColumns * 32);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      const uint2 column = *reinterpret_cast<const uint2*>(columns + c * (8 * 32));
      mma_m16n8k32(tile_sums[c], fragment, column.x, column.y);
    }
  };
  const auto next_chunk = [&] {
    const int tile = now.tile;
    now.advance(num_chunks);
    if (now.tile == tile) return;
    std::int32_t* to = sums + (tile * kTileRows + g) * kColumns + 2 * t;
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {
      if (2 * t < kColumns) {
        atomicAdd(to + 8 * c, tile_sums[c][0]);
        atomicAdd(to + 8 * c + 8 * kColumns, tile_sums[c][2]);
        if constexpr (kColumns > 1) {
          atomicAdd(to + 8 * c + 1, tile_sums[c][1]);
          atomicAdd(to + 8 * c + 8 * kColumns + 1, tile_sums[c][3]);
        }
      }
      tile_sums[c][0] = tile_sums[c][1] = tile_sums[c][2] = tile_sums[c][3] = 0;
    }
  };
  if constexpr (kDecodeFirst) {
    if (now.tile < num_tiles) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) multiply(s, first_fragments[s]);
      next_chunk();
    }
  }
  while (now.tile < num_tiles) {
#pragma unroll
    for (int b = 0; b < kPrefetch; ++b) {
      if (now.tile >= num_tiles) break;
      LaneChunk<kId>& next = buffer[(b + (kDecodeFirst ? 1 : 0)) % kPrefetch];
      const LaneChunk<kId> chunk = next;
      load_ahead(next);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t fragment[4];
        chunk.decode(s, tables, fragment);
        multiply(s, fragment);
      }
      next_chunk();
    }
  }
  __syncthreads();
  if constexpr (kFused) {
    if (threadIdx.x < 2) facts.sums[threadIdx.x] = reduction.sums[threadIdx.x];
    __syncthreads();
  }
  const int first_row = first_tile * kTileRows;
  if (gridDim.y > 1 && !join_splits(p, sums, first_row * kColumns, num_sums, kColumns)) return;
  const int rows_here = min(num_rows, static_cast<int>(p.weight.rows) - first_row);
  if (p.output.dtype == DType::kBFloat16)
    store_outputs<__nv_bfloat16>(p, sums, kColumns, first_row, rows_here, num_tokens, num_planes, facts, row_scale);
  else if (p.output.dtype == DType::kFloat16)
    store_outputs<__half>(p, sums, kColumns, first_row, rows_here, num_tokens, num_planes, facts, row_scale);
  else
    store_outputs<float>(p, sums, kColumns, first_row, rows_here, num_tokens, num_planes, facts, row_scale);
}

// Blocks, splits and shared memory; false if nothing fits.
template <CodebookId kId, int kColumns, bool kFused>
bool run(Parameters& p, cudaStream_t stream) {
  const DeviceProperties& device = device_properties();
  const std::int64_t tiles = (p.weight.rows + kTileRows - 1) / kTileRows, chunks = p.weight.num_chunks;
  const std::int64_t float_bytes = kFused ? float_buffer_bytes(p.tokens.in_features) : 0;
  const std::int64_t first_splits =
      std::clamp<std::int64_t>(device.num_sms / tiles, 1, std::min<std::int64_t>(kMaxSplits, chunks));
  for (std::int64_t splits = first_splits; splits <= std::min<std::int64_t>(kMaxSplits, chunks); ++splits) {
    const std::int64_t chunks_here = (chunks + splits - 1) / splits;
    if ((chunks + chunks_here - 1) / chunks_here != splits) continue;
    // As many blocks as give everyone the same number of tiles: what is left of the device is for the kernel before this one.
    for (std::int64_t tiles_here = (tiles * splits + device.num_sms - 1) / device.num_sms;; tiles_here = (tiles_here + 1) / 2) {
      const std::int64_t blocks = (tiles + tiles_here - 1) / tiles_here, sum_bytes = tiles_here * kTileRows * (kColumns + 1) * 4;
      const std::int64_t table = round_up(kMaxSharedBase + kGainTableBytes + sum_bytes, kTableAlignment);
      const std::int64_t floats = table_bytes(kId) + chunks_here * kChunkColumns * kColumns, total = table + floats + float_bytes;
      const bool fits = total + kMaxSharedBase <= device.max_shared_bytes;
      if (!fits && sum_bytes > 24 * 1024 && tiles_here > 1) continue;
      if (!fits) break;
      if (splits > 1 && (splits * tiles * kTileRows * kColumns > p.scratch.partial_elements || blocks > kNumCounters))
        return false;
      p.num_tiles = static_cast<int>(tiles);
      p.tiles_per_block = static_cast<int>(tiles_here);
      p.chunks_per_split = static_cast<int>(chunks_here);
      p.activations_offset = table_bytes(kId);
      p.floats_offset = static_cast<int>(floats);
      const bool overlap = kFused || starts_early(p.a, blocks * splits);
      launch_overlapping(overlap, few_columns_kernel<kId, kColumns, kFused>,
                         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits)), dim3(kThreads),
                         static_cast<std::size_t>(total), stream, p);
      return true;
    }
  }
  return false;
}

template <CodebookId kId, bool kFused>
bool run_columns(Parameters& p, std::int64_t columns, cudaStream_t stream) {
  if (columns == 1) return run<kId, 1, kFused>(p, stream);
  if (columns == 2) return run<kId, 2, kFused>(p, stream);
  if constexpr (!kFused) {
    if (columns <= 4) return run<kId, 4, kFused>(p, stream);
    if (columns <= 8) return run<kId, 8, kFused>(p, stream);
    if (columns <= 16) return run<kId, 16, kFused>(p, stream);
  }
  return false;
}

template <bool kFused>
bool run_codebook(Parameters& p, std::int64_t columns, cudaStream_t stream) {
  switch (p.weight.codebook) {
    case CodebookId::kPvq2:
      return run_columns<CodebookId::kPvq2, kFused>(p, columns, stream);
    case CodebookId::kPvq3:
      return run_columns<CodebookId::kPvq3, kFused>(p, columns, stream);
    case CodebookId::kPvq4:
      return run_columns<CodebookId::kPvq4, kFused>(p, columns, stream);
    case CodebookId::kInt8:
      return run_columns<CodebookId::kInt8, kFused>(p, columns, stream);
  }
  return false;
}

}  // namespace

bool one_token(const Tokens& tokens, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream) {
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
