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
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// From exact sums to y: 64 rows by kN columns of a warpgroup, all of whose threads come here.
template <int kN>
struct WgmmaFinish {
  static constexpr int kStaged = staged_columns(kN);
  static_assert(kN % kStaged == 0, "results are staged in whole slices");

  struct __align__(8) Column {
    std::int32_t offset;  // h sum a
    float token_scale;
  };

  const Product& p;
  int first_row, first_column, row;  // row: of this lane, and row + 8
  int thread, pair;                  // lane = 4 group + pair
  int num_columns, barrier;
  char* staging;    // kStaged columns of results, then
  Column* columns;  // kN
  float scale[2], bias[2];

  __device__ __forceinline__ WgmmaFinish(const Product& p, int first_row, int first_column, int thread, char* area, int barrier)
      : p(p),
        first_row(first_row),
        first_column(first_column),
        row(first_row + thread / 32 * 16 + thread % 32 / 4),
        thread(thread),
        pair(thread % 4),
        num_columns(static_cast<int>(p.a.num_columns())),
        barrier(barrier),
        staging(area),
        columns(reinterpret_cast<Column*>(area + kStaged * kStagedColumnBytes)) {}

  // What the results need besides the sums; before store(), and not while another tile's results are in the area.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = p.weight.row_scale[row + 8 * h];
      // -0 changes nothing, not even -0.
      bias[h] = p.output.bias != nullptr && row + 8 * h < p.weight.rows ? load_bias(row + 8 * h) : -0.0f;
    }
    const int half_offset = p.weight.codebook == CodebookId::kInt8 ? 0 : 1;
    synchronize_threads(barrier, 128);  // the area has been read
#pragma unroll
    for (int c = thread; c < kN; c += 128) {
      const int column = first_column + c;
      Column info{0, 0.0f};
      if (column < num_columns) {
        info.offset = half_offset * p.a.sums[column];
        info.token_scale = p.a.token_scale[p.a.num_planes == 2 ? column / 2 : column];
      }
      columns[c] = info;
    }
    synchronize_threads(barrier, 128);
  }

  __device__ __forceinline__ float load_bias(int r) const {
    if (p.output.dtype == DType::kFloat32) return static_cast<const float*>(p.output.bias)[r];
    if (p.output.dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(p.output.bias)[r]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(p.output.bias)[r]);
  }

  __device__ __forceinline__ float finished(float value, int h, float token_scale) const {
    return __fadd_rn(scale_value(value, scale[h], token_scale), bias[h]);
  }

  // Of block j (eight columns), rows h: the columns 2 pair and 2 pair + 1, or the token they are the planes of (v[0]).
  template <int kPlanes>
  __device__ __forceinline__ void values(const std::int32_t (&acc)[kN / 2], int j, int h, float (&v)[2]) const {
    const int4 both = *reinterpret_cast<const int4*>(columns + 8 * j + 2 * pair);
    const float scale0 = __int_as_float(both.y), scale1 = __int_as_float(both.w);
    const float first = plane_value(acc[4 * j + 2 * h], both.x, 1), second = plane_value(acc[4 * j + 2 * h + 1], both.z, 1);
    if constexpr (kPlanes == 2) {
      v[0] = v[1] = finished(join_planes(first, second), h, scale0);
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

  // Eight rows of a token fill a sector: straight from the registers.
  template <int kPlanes>
  __device__ __forceinline__ void store_floats(const std::int32_t (&acc)[kN / 2]) const {
    const std::int64_t stride = p.output.stride;
    float* y = static_cast<float*>(p.output.y) + (first_column + 2 * pair) / kPlanes * stride + row;
    const bool rows[2] = {row < p.weight.rows, row + 8 < p.weight.rows};
#pragma unroll
    for (int j = 0; j < kN / 8; ++j, y += 8 / kPlanes * stride) {
      const int column = first_column + 8 * j + 2 * pair;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[2];
        values<kPlanes>(acc, j, h, v);
        if (rows[h] && column < num_columns) y[8 * h] = v[0];
        if (kPlanes == 1 && rows[h] && column + 1 < num_columns) y[stride + 8 * h] = v[1];
      }
    }
  }

  // 16-bit results: through shared memory, where they are turned over to [token][64 rows].
  template <int kPlanes, DType kType>
  __device__ __forceinline__ void store_halves(const std::int32_t (&acc)[kN / 2]) const {
    const int i = thread % 8, matrix = thread % 32 / 8;
    // Where this lane's column of a matrix goes: of two planes, the tokens of two blocks alternate.
    const int token = kPlanes == 2 ? 4 * (i & 1) + i / 2 : 8 * (matrix / 2) + i;
    const std::uint32_t to = shared_address(staging) + thread / 32 * 32 + matrix % 2 * 16 + token * kStagedColumnBytes;
#pragma unroll
    for (int slice = 0; slice < kN; slice += kStaged) {
      if (first_column + slice >= num_columns) break;
      if (slice > 0) synchronize_threads(barrier, 128);  // the results before have been read
#pragma unroll
      for (int j = slice / 8; j < (slice + kStaged) / 8; j += 2) {
        float v[2][2][2];  // [block][h][column]
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) values<kPlanes>(acc, j + b, h, v[b][h]);
        const std::uint32_t block = to + (8 * j - slice) / kPlanes * kStagedColumnBytes;
        if constexpr (kPlanes == 2) {
          store_transposed(block, packed<kType>(v[0][0][0], v[1][0][0]), packed<kType>(v[0][1][0], v[1][1][0]));
        } else {
          store_transposed(block, packed<kType>(v[0][0][0], v[0][0][1]), packed<kType>(v[0][1][0], v[0][1][1]),
                           packed<kType>(v[1][0][0], v[1][0][1]), packed<kType>(v[1][1][0], v[1][1][1]));
        }
      }
      synchronize_threads(barrier, 128);
      write_out<kPlanes>(slice);
    }
  }

  template <int kPlanes>
  __device__ __forceinline__ void write_out(int slice) const {
    const int left = num_columns - first_column - slice, tokens = (left < kStaged ? left : kStaged) / kPlanes;
    const int rows = p.weight.rows - first_row < 64 ? static_cast<int>(p.weight.rows - first_row) : 64;
    std::uint16_t* y = static_cast<std::uint16_t*>(p.output.y) + (first_column + slice) / kPlanes * p.output.stride + first_row;
    const std::uint64_t alignment = reinterpret_cast<std::uint64_t>(p.output.y) | static_cast<std::uint64_t>(p.output.stride) * 2;
    if (alignment % 16 == 0 && rows == 64) {
      for (int token = thread / 8; token < tokens; token += 16)
        *reinterpret_cast<uint4*>(y + token * p.output.stride + thread % 8 * 8) =
            *reinterpret_cast<const uint4*>(staging + token * kStagedColumnBytes + thread % 8 * 16);
    } else if (thread % 64 < rows) {
      for (int token = thread / 64; token < tokens; token += 2)
        y[token * p.output.stride + thread % 64] =
            *reinterpret_cast<const std::uint16_t*>(staging + token * kStagedColumnBytes + thread % 64 * 2);
    }
  }

  template <int kPlanes>
  __device__ __forceinline__ void store_planes(const std::int32_t (&acc)[kN / 2]) const {
    if (p.output.dtype == DType::kFloat32)
      store_floats<kPlanes>(acc);
    else if (p.output.dtype == DType::kFloat16)
      store_halves<kPlanes, DType::kFloat16>(acc);
    else
      store_halves<kPlanes, DType::kBFloat16>(acc);
  }

  __device__ __forceinline__ void store(const std::int32_t (&acc)[kN / 2]) const {
    p.a.num_planes == 2 ? store_planes<2>(acc) : store_planes<1>(acc);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
