// SPDX-License-Identifier: Apache-2.0
// The product for any number of columns with mma.m16n8k32, which every architecture from sm_80 on has.
//
// A block makes 128 or 256 rows x 8 kTiles columns. The columns of a chunk go through a ring of stages in shared memory as they
// lie in the global buffer (layout.h: swizzled for ldmatrix); a warp owns 16 or 32 rows for all columns of the block, holds the
// weights of the next chunk in registers, and decodes a step once for all its columns, one step ahead of the tensor cores.
//
// Where the tiles do not fill the device, blockIdx.y splits the chunks; integer sums meet in `partial`, and the last block to
// arrive finishes the tile.
#include <algorithm>

#include "decode.cuh"
#include "finish.cuh"
#include "launch.h"
#include "linear.h"
#include "mma.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxTiles = 16;  // of eight columns in a block
constexpr int kMaxSplits = 32;
constexpr int kBlockGroup = 16;  // column blocks that run side by side: their activations stay in the second-level cache

constexpr int row_tiles_of_warp(int tiles) { return tiles >= 8 ? 2 : 1; }
constexpr int block_rows(int tiles) { return kWarps * kTileRows * row_tiles_of_warp(tiles); }

// Shared memory: gains, stages as far as they fit in front of the table, the table at its alignment, the other stages. After the
// last chunk: the sums of every warp, then scale and sum of the columns.
template <CodebookId kId, int kTiles>
struct Layout {
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kStages = kTiles == kMaxTiles ? 3 : 4, kStageBytes = kColumns * kChunkColumns;
  static constexpr int kGainBytes = round_up(kGainTableBytes, 128);
  static constexpr int kTableBytes = table_bytes(kId);
  static constexpr int kAlignment = kTableBytes > 128 ? kTableBytes : 128;
  static constexpr int kInFront =
      kTableBytes == 0 ? kStages : std::clamp((kAlignment - kMaxSharedBase - kGainBytes) / kStageBytes, 0, kStages);
  static constexpr int kTableOffset = kGainBytes + kInFront * kStageBytes;  // before alignment

  static constexpr int kPitch = kTileRows * row_tiles_of_warp(kTiles) + 4;  // words of a column of staged sums: no bank conflicts
  static constexpr int kStagedTiles = kTiles < 4 ? kTiles : 4;
  static constexpr int kWarpWords = 8 * kStagedTiles * kPitch;
  static constexpr int kFinishBytes = 4 * kWarps * kWarpWords + 8 * kColumns;
  static constexpr int kTotal = std::max(
      static_cast<int>(round_up(kMaxSharedBase + kTableOffset, kAlignment)) + kTableBytes + (kStages - kInFront) * kStageBytes,
      kFinishBytes);
  static_assert(kTotal <= 99 * 1024, "the smallest limit of shared memory of a block");
};

struct Parameters {
  Activations a;
  Weight weight;
  Output output;
  Scratch scratch;
  int row_tiles;  // in the packed weight
  int row_blocks, column_blocks, splits;
};

// A value of the output's type, widened; or narrowed into it.
__device__ __forceinline__ float read_value(const void* from, DType dtype, std::int64_t i) {
  if (dtype == DType::kBFloat16) return OutputType<__nv_bfloat16>::widen(static_cast<const __nv_bfloat16*>(from)[i]);
  if (dtype == DType::kFloat16) return OutputType<__half>::widen(static_cast<const __half*>(from)[i]);
  return static_cast<const float*>(from)[i];
}
__device__ __forceinline__ void write_value(void* to, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::kBFloat16)
    static_cast<__nv_bfloat16*>(to)[i] = OutputType<__nv_bfloat16>::narrow(value);
  else if (dtype == DType::kFloat16)
    static_cast<__half*>(to)[i] = OutputType<__half>::narrow(value);
  else
    static_cast<float*>(to)[i] = value;
}

// Blocks that share a tile leave their sums in `partial`; the last one adds the others to its own. True in the last one.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ bool join_splits(const Parameters& p, std::int32_t (&sums)[kRowTiles][kTiles][4]) {
  __shared__ bool last;
  constexpr int kQuads = kRowTiles * kTiles;
  int4* slots = reinterpret_cast<int4*>(p.scratch.partial) + static_cast<std::int64_t>(blockIdx.x) * p.splits * kQuads * kThreads;
  const auto slot = [&](int split, int quad) { return slots + (split * kQuads + quad) * kThreads + threadIdx.x; };
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      __stcg(slot(blockIdx.y, m * kTiles + j), make_int4(sums[m][j][0], sums[m][j][1], sums[m][j][2], sums[m][j][3]));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.scratch.counters + blockIdx.x, 1) == p.splits - 1;
    if (last) p.scratch.counters[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int split = 0; split < p.splits; ++split) {
    if (split == static_cast<int>(blockIdx.y)) continue;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int4 other = __ldcg(slot(split, m * kTiles + j));
        sums[m][j][0] += other.x;
        sums[m][j][1] += other.y;
        sums[m][j][2] += other.z;
        sums[m][j][3] += other.w;
      }
  }
  return true;
}

// Sums to outputs. A warp turns four tiles of columns at a time in shared memory, so that lanes are consecutive rows.
template <CodebookId kId, int kTiles>
__device__ __forceinline__ void finish(const Parameters& p, std::int32_t (&sums)[row_tiles_of_warp(kTiles)][kTiles][4],
                                       int first_row, std::int64_t first_column, char* shared) {
  using L = Layout<kId, kTiles>;
  constexpr int kRowTiles = row_tiles_of_warp(kTiles), kRows = kTileRows * kRowTiles,
                kHalfOffset = kId == CodebookId::kInt8 ? 0 : 1;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, planes = p.a.num_planes;
  std::int32_t* staged = reinterpret_cast<std::int32_t*>(shared) + warp * L::kWarpWords;
  std::int32_t* column_sums = reinterpret_cast<std::int32_t*>(shared) + kWarps * L::kWarpWords;
  float* token_scale = reinterpret_cast<float*>(column_sums + L::kColumns);
  const std::int64_t first_token = first_column >> (planes - 1);
  for (int i = threadIdx.x; i < L::kColumns; i += kThreads) {
    if (first_column + i < p.a.num_columns()) column_sums[i] = p.a.sums[first_column + i];
    if (first_token + i < p.a.num_tokens) token_scale[i] = p.a.token_scale[first_token + i];
  }
  __syncthreads();
  const int local_row = lane % kRows;
  const std::int64_t row = first_row + local_row;
  const bool inside = row < p.weight.rows;
  const float row_scale = inside ? p.weight.row_scale[row] : 0.0f;
  // x + -0.0 is x for every x
  const float bias = inside && p.output.bias != nullptr ? read_value(p.output.bias, p.output.dtype, row) : -0.0f;
#pragma unroll
  for (int j0 = 0; j0 < kTiles; j0 += L::kStagedTiles) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < L::kStagedTiles; ++j)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        std::int32_t* to = staged + (8 * j + 2 * t) * L::kPitch + kTileRows * m + g;
        to[0] = sums[m][j0 + j][0];
        to[L::kPitch] = sums[m][j0 + j][1];
        to[8] = sums[m][j0 + j][2];
        to[L::kPitch + 8] = sums[m][j0 + j][3];
      }
    __syncwarp();
    const int begin = 8 * j0 >> (planes - 1);  // token of the block
    const int most = 8 * L::kStagedTiles >> (planes - 1);
    const int count = static_cast<int>(std::min<std::int64_t>(most, p.a.num_tokens - first_token - begin));
#pragma unroll 4
    for (int i = lane / kRows; i < count; i += 32 / kRows) {
      const int token = begin + i, column = planes * i;
      const std::int32_t* sum = staged + column * L::kPitch + local_row;
      float value = plane_value(sum[0], column_sums[8 * j0 + column], kHalfOffset);
      if (planes == 2) value = join_planes(value, plane_value(sum[L::kPitch], column_sums[8 * j0 + column + 1], kHalfOffset));
      value = __fadd_rn(scale_value(value, row_scale, token_scale[token]), bias);
      if (inside) write_value(p.output.y, p.output.dtype, (first_token + token) * p.output.stride + row, value);
    }
  }
}

template <CodebookId kId, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles >= 8 ? 1 : 2) many_columns_kernel(const __grid_constant__ Parameters p) {
  using L = Layout<kId, kTiles>;
  constexpr int kRowTiles = row_tiles_of_warp(kTiles);
  extern __shared__ __align__(128) char shared[];
  launch_dependents();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  // Columns fastest, within a group of column blocks: what runs at the same time shares rows and columns.
  const unsigned group_blocks = kBlockGroup * static_cast<unsigned>(p.row_blocks);
  const unsigned group = blockIdx.x / group_blocks, in_group = blockIdx.x % group_blocks;
  const unsigned group_width = min(static_cast<unsigned>(kBlockGroup), p.column_blocks - group * kBlockGroup);
  const int row_block = static_cast<int>(in_group / group_width);
  const std::int64_t first_column = static_cast<std::int64_t>(group * kBlockGroup + in_group % group_width) * L::kColumns;
  const int num_chunks = static_cast<int>(p.weight.num_chunks), splits = p.splits, split = static_cast<int>(blockIdx.y);
  const int begin = num_chunks * split / splits, end = num_chunks * (split + 1) / splits;

  // Warps past the last tile repeat it; their outputs are past the last row.
  const int first_tile = (row_block * kWarps + warp) * kRowTiles;
  const std::uint8_t* weights[kRowTiles];
  LaneChunk<kId> ahead[kRowTiles];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    weights[m] =
        p.weight.data + (static_cast<std::int64_t>(min(first_tile + m, p.row_tiles - 1)) * num_chunks + begin) * chunk_bytes(kId);
    ahead[m].load(weights[m], lane);
  }

  const std::uint32_t base = shared_address(shared);
  const std::uint32_t table = (base + L::kTableOffset + L::kAlignment - 1) & ~(L::kAlignment - 1u);
  char* behind = shared + (table - base) + L::kTableBytes;
  const auto stage = [&](int slot) {
    return slot < L::kInFront ? shared + L::kGainBytes + slot * L::kStageBytes : behind + (slot - L::kInFront) * L::kStageBytes;
  };
  for (int i = threadIdx.x; i < table_words(kId) / 4; i += kThreads)
    copy_async_16(shared + (table - base) + 16 * i, reinterpret_cast<const char*>(p.weight.table) + 16 * i);
  copy_async_commit();
  write_gains<kId>(shared, threadIdx.x);
  wait_for_dependencies();

  const int units = static_cast<int>(std::min<std::int64_t>(L::kColumns, p.a.padded_columns - first_column)) * 8;
  const auto copy_chunk = [&](int chunk, int slot) {
    const std::int8_t* from = p.a.data + (chunk * p.a.padded_columns + first_column) * kChunkColumns;
    char* to = stage(slot);
#pragma unroll
    for (int i0 = 0; i0 < L::kColumns * 8; i0 += kThreads) {
      const int i = i0 + static_cast<int>(threadIdx.x);
      if (i < units) copy_async_16(to + 16 * i, from + 16 * i);
    }
  };
  for (int s = 0; s < L::kStages - 1; ++s) {
    if (begin + s < end) copy_chunk(begin + s, s);
    copy_async_commit();
  }

  const Tables tables{table, base};
  // ldmatrix: matrix i of a step is unit i & 1 of the columns of tile i >> 1; a lane names the unit of column lane & 7.
  const std::uint32_t lane_offset = ((lane >> 4) * 8 + (lane & 7)) * 128 + (((lane >> 3 & 1) ^ (lane & 7)) * 16);
  std::int32_t sums[kRowTiles][kTiles][4] = {};
  int slot = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    copy_async_wait<L::kStages - 2>();
    __syncthreads();  // the chunk is there for all, and all are done with the stage that is filled next
    const int fill = slot == 0 ? L::kStages - 1 : slot - 1;
    if (chunk + L::kStages - 1 < end) copy_chunk(chunk + L::kStages - 1, fill);
    copy_async_commit();

    LaneChunk<kId> now[kRowTiles];
    std::uint32_t fragments[2][kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      now[m] = ahead[m];
      weights[m] += chunk_bytes(kId);
      if (chunk + 1 < end) ahead[m].load(weights[m], lane);
      decode(now[m], 0, tables, fragments[0][m]);
    }
    const std::uint32_t columns = base + static_cast<std::uint32_t>(stage(slot) - shared);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s + 1 < kSteps)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) decode(now[m], s + 1, tables, fragments[(s + 1) & 1][m]);
      const std::uint32_t address = columns + (lane_offset ^ (s << 5));
      if constexpr (kTiles == 1) {
        std::uint32_t b[2];
        load_fragments(address, b);
        mma_m16n8k32(sums[0][0], fragments[s & 1][0], b[0], b[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          std::uint32_t b[4];
          load_fragments(address + j * 1024, b);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_m16n8k32(sums[m][j], fragments[s & 1][m], b[0], b[1]);
            mma_m16n8k32(sums[m][j + 1], fragments[s & 1][m], b[2], b[3]);
          }
        }
      }
    }
    slot = slot == L::kStages - 1 ? 0 : slot + 1;
  }

  if (splits > 1 && !join_splits<kRowTiles, kTiles>(p, sums)) return;
  __syncthreads();  // shared memory is free
  finish<kId, kTiles>(p, sums, first_tile * kTileRows, first_column, shared);
}

struct Shape {
  int tiles, splits;
};

constexpr std::int64_t blocks_up(std::int64_t count, int size) { return (count + size - 1) / size; }

// Columns of a block and splits of the chunks that should take the fewest clocks. The model, in clocks of a multiprocessor with
// its resident blocks: a chunk is bound by the tensor cores (128 a tile of columns), by shared memory (decoding and fragments)
// or, with few columns, by the stream of weights; a block has a prologue and an epilogue, and splits write and read their sums.
Shape choose_shape(std::int64_t rows, std::int64_t columns, int chunks, const Scratch& scratch) {
  const int num_sms = device_properties().num_sms;
  int tiles = kMaxTiles;
  while (tiles > 1 && 4 * tiles >= columns) tiles /= 2;
  Shape best{tiles, 1};
  std::int64_t best_clocks = INT64_MAX;
  for (int candidate = tiles; candidate >= std::max(1, tiles / 4); candidate /= 2) {
    const std::int64_t blocks = blocks_up(rows, block_rows(candidate)) * blocks_up(columns, 8 * candidate);
    const std::int64_t slots = num_sms * (candidate >= 8 ? 1 : 2), elements = std::int64_t{block_rows(candidate)} * 8 * candidate;
    const int chunk_clocks = candidate == 16 ? 2048 : candidate == 8 ? 1280 : 1600;
    for (int splits = 1; splits <= std::min(kMaxSplits, chunks); ++splits) {
      if (splits > 1 && (blocks > kNumCounters || blocks * splits * elements > scratch.partial_elements)) break;
      const std::int64_t waves = (blocks * splits + slots - 1) / slots;
      if (splits > 1 && waves > 4) break;
      const std::int64_t clocks =
          waves * (blocks_up(chunks, splits) * chunk_clocks + 3000 + (splits > 1 ? 3000 + splits * elements / 8 : 0));
      if (clocks < best_clocks) {
        best = {candidate, splits};
        best_clocks = clocks;
      }
    }
  }
  return best;
}

template <CodebookId kId, int kTiles>
void run(Parameters& p, cudaStream_t stream) {
  p.row_blocks = static_cast<int>(blocks_up(p.weight.rows, block_rows(kTiles)));
  p.column_blocks = static_cast<int>(blocks_up(p.a.num_columns(), 8 * kTiles));
  launch(many_columns_kernel<kId, kTiles>,
         dim3(static_cast<unsigned>(p.row_blocks) * static_cast<unsigned>(p.column_blocks), static_cast<unsigned>(p.splits)),
         dim3(kThreads), Layout<kId, kTiles>::kTotal, stream, p);
}

template <CodebookId kId>
void run_tiles(Parameters& p, int tiles, cudaStream_t stream) {
  switch (tiles) {
    case 1:
      return run<kId, 1>(p, stream);
    case 2:
      return run<kId, 2>(p, stream);
    case 4:
      return run<kId, 4>(p, stream);
    case 8:
      return run<kId, 8>(p, stream);
    default:
      return run<kId, kMaxTiles>(p, stream);
  }
}

}  // namespace

void many_columns(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream) {
  if (weight.rows == 0 || a.num_tokens == 0) return;
  const Shape shape = choose_shape(weight.rows, a.num_columns(), static_cast<int>(weight.num_chunks), scratch);
  Parameters p{a, weight, output, scratch, static_cast<int>(padded_rows(weight.rows) / kTileRows), 0, 0, shape.splits};
  with_codebook(weight.codebook, [&](auto id) { run_tiles<decltype(id)::value>(p, shape.tiles, stream); });
}

}  // namespace pvq::cuda
