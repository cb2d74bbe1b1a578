// SPDX-License-Identifier: Apache-2.0
// The epilogue of many_columns_wgmma.cuh and prefill_wgmma.cu.
#pragma once

#include "decode.cuh"
#include "finish.cuh"
#include "hopper.cuh"
#include "linear.h"
#include "wgmma_schedule.h"

namespace pvq::cuda {

struct Product {
  Activations a;
  Weight weight;
  Output output;
};

struct WgmmaArguments : Product {
  WgmmaSchedule schedule;
  // Of two launches for one weight: the second one starts when all CTAs of the first have waited for the activations, so it finds
  // them, and ends after the first.
  bool followed = false, follows = false;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a tile's results need besides the sums, in shared memory: of a warpgroup's 64 rows and of all columns of the tile. And
// where its results are turned over, twice.
template <int kColumns>
struct FinishArea {
  static constexpr int kStagingBytes = kStagedColumns * kStagedColumnBytes;

  struct __align__(8) Column {
    std::int32_t offset;  // h sum a
    float token_scale;
  };
  struct __align__(8) Row {
    float scale, bias;
  };

  char* staging;    // [2][kStagingBytes]
  Column* columns;  // [kColumns]
  Row* rows;        // [64]

  __device__ __forceinline__ explicit FinishArea(char* area)
      : staging(area),
        columns(reinterpret_cast<Column*>(area + 2 * kStagingBytes)),
        rows(reinterpret_cast<Row*>(columns + kColumns)) {}

  // A row, or a column, of the tile.
  __device__ __forceinline__ static Row fetch_row(const Product& p, int row) {
    // -0 changes nothing, not even -0.
    const bool biased = p.output.bias != nullptr && row < p.weight.rows;
    return {p.weight.row_scale[row], biased ? load_bias(p.output, row) : -0.0f};
  }
  __device__ __forceinline__ static Column fetch_column(const Product& p, int column) {
    if (column >= p.a.num_columns()) return {0, 0.0f};
    const int half_offset = p.weight.codebook == CodebookId::kInt8 ? 0 : 1;
    // Past the first-level cache: a launch that follows another has not waited for those before it (WgmmaArguments).
    return {half_offset * __ldcg(p.a.sums + column), __ldcg(p.a.token_scale + (p.a.num_planes == 2 ? column / 2 : column))};
  }

  // By a warp; it and those that read synchronize before and after.
  __device__ __forceinline__ void load(const Product& p, int first_row, int first_column, int lane) const {
    if (first_row >= p.weight.rows) return;
    for (int r = lane; r < 64; r += 32) rows[r] = fetch_row(p, first_row + r);
    for (int c = lane; c < kColumns; c += 32) columns[c] = fetch_column(p, first_column + c);
  }

  // The same in two halves, by a warpgroup: to registers, on the way while something else is done, and from there.
  struct Share {
    Row row;
    Column columns[kColumns / 128];
  };
  __device__ __forceinline__ static Share fetch(const Product& p, int first_row, int first_column, int thread) {
    Share share{};
    if (thread < 64) share.row = fetch_row(p, first_row + thread);
#pragma unroll
    for (int i = 0; i < kColumns / 128; ++i) share.columns[i] = fetch_column(p, first_column + 128 * i + thread);
    return share;
  }
  __device__ __forceinline__ void put(const Share& share, int thread) const {
    if (thread < 64) rows[thread] = share.row;
#pragma unroll
    for (int i = 0; i < kColumns / 128; ++i) columns[128 * i + thread] = share.columns[i];
  }

  __device__ __forceinline__ static float load_bias(const Output& output, int r) {
    if (output.dtype == DType::kFloat32) return static_cast<const float*>(output.bias)[r];
    if (output.dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(output.bias)[r]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(output.bias)[r]);
  }
};

// From exact sums to y, by a warpgroup whose threads all come here: 64 rows, in slices of kSlice columns, from column `offset` of
// a tile of kColumns on.
template <int kSlice, int kColumns>
struct WgmmaFinish {
  using Area = FinishArea<kColumns>;
  static constexpr int kBlocks = kSlice / 8, kSums = kSlice / 2;  // of eight columns; of a thread
  static_assert(kSlice % 16 == 0 && kSlice <= kStagedColumns);

  using Sums = std::int32_t[kSums];
  using Columns = int4[kBlocks];  // two of this lane's each: 2 pair, 2 pair + 1

  const Product& p;
  const Area& area;
  int first_row, first_column, offset;  // first_column: of the tile
  int thread, pair;                     // lane = 4 group + pair
  int num_columns, barrier;             // from `offset` on
  typename Area::Row row[2];            // of this lane: rows `group` of its warp, and + 8

  // Once the area is filled. What comes next in it, after a synchronization of the warpgroup.
  __device__ __forceinline__ WgmmaFinish(const Product& p, const Area& area, int first_row, int first_column, int offset,
                                         int thread, int barrier)
      : p(p),
        area(area),
        first_row(first_row),
        first_column(first_column),
        offset(offset),
        thread(thread),
        pair(thread % 4),
        num_columns(static_cast<int>(p.a.num_columns()) - first_column - offset),
        barrier(barrier),
        row{area.rows[row_of_lane()], area.rows[row_of_lane() + 8]} {}

  __device__ __forceinline__ int row_of_lane() const { return thread / 32 * 16 + thread % 32 / 4; }

  __device__ __forceinline__ void load(int slice, Columns& columns) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
      columns[j] = *reinterpret_cast<const int4*>(area.columns + offset + slice * kSlice + 8 * j + 2 * pair);
  }

  __device__ __forceinline__ float finished(float value, int h, float token_scale) const {
    return __fadd_rn(scale_value(value, row[h].scale, token_scale), row[h].bias);
  }

  // Of block j, rows h: both columns, or the token they are the planes of (v[0]).
  template <int kPlanes>
  __device__ __forceinline__ void values(const Sums& sums, const Columns& columns, int j, int h, float (&v)[2]) const {
    const float scale0 = __int_as_float(columns[j].y), scale1 = __int_as_float(columns[j].w);
    const float first = plane_value(sums[4 * j + 2 * h], columns[j].x, 1);
    const float second = plane_value(sums[4 * j + 2 * h + 1], columns[j].z, 1);
    if constexpr (kPlanes == 2) {
      v[0] = finished(join_planes(first, second), h, scale0);
    } else {
      v[0] = finished(first, h, scale0);
      v[1] = finished(second, h, scale1);
    }
  }

  template <DType kType>
  __device__ __forceinline__ static std::uint32_t packed(float low, float high) {
    if constexpr (kType == DType::kFloat16) {
      const __half2 halves = __floats2half2_rn(low, high);
      return *reinterpret_cast<const std::uint32_t*>(&halves);
    } else {
      const __nv_bfloat162 halves = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const std::uint32_t*>(&halves);
    }
  }

  // A row of the first token here.
  template <typename T, int kPlanes>
  __device__ __forceinline__ T* output(int r) const {
    return static_cast<T*>(p.output.y) + (first_column + offset) / kPlanes * p.output.stride + first_row + r;
  }

  // Straight from the registers: float32, of which eight rows of a token fill a sector, and 16-bit results that are not whole
  // tiles, or not aligned.
  template <int kPlanes, typename T, int kUnroll, typename LoadSums>
  __device__ __forceinline__ void store_each(int slices, const LoadSums& load_sums) const {
    const std::int64_t stride = p.output.stride;
    const int r = row_of_lane();
    T* y = output<T, kPlanes>(r) + 2 * pair / kPlanes * stride;
    const bool rows[2] = {first_row + r < p.weight.rows, first_row + r + 8 < p.weight.rows};
#pragma unroll(kUnroll)
    for (int slice = 0; slice < slices; ++slice) {
      Sums sums;
      Columns columns;
      load_sums(slice, sums);
      load(slice, columns);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j, y += 8 / kPlanes * stride) {
        const int column = slice * kSlice + 8 * j + 2 * pair;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v[2];
          values<kPlanes>(sums, columns, j, h, v);
          if (rows[h] && column < num_columns) y[8 * h] = OutputType<T>::narrow(v[0]);
          if (kPlanes == 1 && rows[h] && column + 1 < num_columns) y[stride + 8 * h] = OutputType<T>::narrow(v[1]);
        }
      }
    }
  }

  // 16-bit results: through shared memory, where they are turned over to [token][64 rows]. While a slice is on its way, the next
  // one is computed.
  template <int kPlanes, DType kType, int kUnroll, typename LoadSums>
  __device__ __forceinline__ void store_halves(int slices, const LoadSums& load_sums) const {
    constexpr int kTokens = kSlice / kPlanes, kWrites = (kTokens + 15) / 16;  // the warpgroup writes 16 tokens at a time
    const int i = thread % 8, matrix = thread % 32 / 8, token = thread / 8;
    // Where this lane's column of a matrix goes: of two planes, the tokens of two blocks alternate.
    const int column = kPlanes == 2 ? 4 * (i & 1) + i / 2 : 8 * (matrix / 2) + i;
    const std::uint32_t staging = shared_address(area.staging);
    const std::uint32_t to = staging + thread / 32 * 32 + matrix % 2 * 16 + column * kStagedColumnBytes;
    const std::uint32_t from = staging + token * kStagedColumnBytes + i * 16;
    const std::int64_t stride = p.output.stride;
    std::uint16_t* y = output<std::uint16_t, kPlanes>(i * 8) + token * stride;
    int left = num_columns / kPlanes - token;  // tokens
    int4 results[kWrites];                     // of the slice before
    const auto write = [&] {
#pragma unroll
      for (int w = 0; w < kWrites; ++w)
        if ((kTokens >= 16 || token < kTokens) && 16 * w < left) store_global(y + 16 * w * stride, results[w]);
      y += kTokens * stride;
      left -= kTokens;
    };
    Sums sums;
    Columns columns;
    load_sums(0, sums);
    load(0, columns);
#pragma unroll(kUnroll)
    for (int slice = 0; slice < slices; ++slice) {
      const std::uint32_t buffer = slice % 2 * Area::kStagingBytes;
      std::uint32_t matrices[kBlocks / 2][4];
#pragma unroll
      for (int j = 0; j < kBlocks; j += 2) {
        float v[2][2][2];  // [block][h][column]
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) values<kPlanes>(sums, columns, j + b, h, v[b][h]);
#pragma unroll
        for (int m = 0; m < 4 / kPlanes; ++m)
          matrices[j / 2][m] =
              kPlanes == 2 ? packed<kType>(v[0][m][0], v[1][m][0]) : packed<kType>(v[m / 2][m % 2][0], v[m / 2][m % 2][1]);
      }
      const bool more = slice + 1 < slices && (slice + 1) * kSlice < num_columns;
      if (more) {
        load_sums(slice + 1, sums);
        load(slice + 1, columns);
      }
      if (slice > 0) write();
#pragma unroll
      for (int j = 0; j < kBlocks; j += 2) {
        const std::uint32_t block = to + buffer + 8 * j / kPlanes * kStagedColumnBytes;
        const auto& m = matrices[j / 2];
        if constexpr (kPlanes == 2)
          store_transposed(block, m[0], m[1]);
        else
          store_transposed(block, m[0], m[1], m[2], m[3]);
      }
      synchronize_threads(barrier, 128);  // and the buffer of the slice before has been read
#pragma unroll
      for (int w = 0; w < kWrites; ++w) results[w] = shared_quad(from + buffer + 16 * w * kStagedColumnBytes);
      if (!more) break;
    }
    write();
  }

  template <int kPlanes, int kUnroll, typename LoadSums>
  __device__ __forceinline__ void store_planes(int slices, const LoadSums& load_sums) const {
    const std::uint64_t alignment = reinterpret_cast<std::uint64_t>(p.output.y) | static_cast<std::uint64_t>(p.output.stride) * 2;
    const bool whole = alignment % 16 == 0 && p.weight.rows - first_row >= 64;
    if (p.output.dtype == DType::kFloat32)
      store_each<kPlanes, float, kUnroll>(slices, load_sums);
    else if (p.output.dtype == DType::kFloat16)
      whole ? store_halves<kPlanes, DType::kFloat16, kUnroll>(slices, load_sums)
            : store_each<kPlanes, __half, kUnroll>(slices, load_sums);
    else
      whole ? store_halves<kPlanes, DType::kBFloat16, kUnroll>(slices, load_sums)
            : store_each<kPlanes, __nv_bfloat16, kUnroll>(slices, load_sums);
  }

  // load_sums(slice, sums) fills sums as multiply() does d. It is called in order, for all slices that have columns and perhaps
  // for others.
  template <int kUnroll, typename LoadSums>
  __device__ __forceinline__ void store(int slices, const LoadSums& load_sums) const {
    p.a.num_planes == 2 ? store_planes<2, kUnroll>(slices, load_sums) : store_planes<1, kUnroll>(slices, load_sums);
  }
};

// A tile whose sums are in registers, as multiply() leaves them.
template <int kN>
__device__ __forceinline__ void finish_tile(const Product& p, const FinishArea<kN>& area, int first_row, int first_column,
                                            int thread, int barrier, const std::int32_t (&acc)[kN / 2]) {
  using Finish = WgmmaFinish<kStagedColumns, kN>;
  Finish(p, area, first_row, first_column, 0, thread, barrier)
      .template store<kN / kStagedColumns>(kN / kStagedColumns, [&](int slice, typename Finish::Sums& sums) {
#pragma unroll
        for (int i = 0; i < Finish::kSums; ++i) sums[i] = acc[slice * Finish::kSums + i];
      });
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
