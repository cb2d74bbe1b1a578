// SPDX-License-Identifier: Apache-2.0
// A group of threads rotates and quantizes one token in shared memory (format.md §5, §6), in the order of additions that the
// format fixes. With one token to do, every instruction runs once and is fetched from far away, so loops stay rolled and code is
// shared.
#pragma once

#include <cstdint>

#include "../paley.h"
#include "butterflies.cuh"
#include "element.cuh"
#include "linear.h"
#include "reduction.cuh"

namespace pvq::cuda {

// The token as floats in shared memory. A gap after every 32 keeps power-of-two strides off one bank.
__host__ __device__ constexpr int float_slot(int i) { return i + (i >> 5); }
__host__ __device__ constexpr std::int64_t float_buffer_bytes(std::int64_t n) { return (n + n / 32 + 4) / 4 * 16; }

struct Group {                // of threads, whole warps
  int thread, size, barrier;  // barrier: the number of a named barrier
  __device__ __forceinline__ void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(size) : "memory"); }
};

// s x to the buffer.
template <DType kType>
__device__ __forceinline__ void load_token(const Group& group, const Element<kType>* x, int n, const std::uint32_t* signs,
                                           float* y) {
#pragma unroll 1
  for (int j = group.thread; j < n / 8; j += group.size) {
    const std::uint32_t bits = signs != nullptr ? __ldg(signs + j / 4) >> (8 * (j & 3)) : 0;
    float v[8];
    widen_eight<kType>(x + 8 * j, v);
    float* to = y + float_slot(8 * j);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = flip_sign(v[i], bits << (31 - i));
  }
}

// Where warp_butterflies reads sixteen columns: s x, or the buffer itself.
template <DType kType>
struct SignedInput {
  const Element<kType>* x;
  const std::uint32_t* signs;
  __device__ __forceinline__ void operator()(int first, float (&v)[16]) const {
    const std::uint32_t bits = __ldg(signs + first / 32) >> (first & 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[8];
      widen_eight<kType>(x + first + 8 * half, part);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[8 * half + i] = flip_sign(part[i], bits << (31 - 8 * half - i));
    }
  }
};
struct Buffered {
  const float* y;
  __device__ __forceinline__ void operator()(int first, float (&v)[16]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = y[float_slot(first) + i];
  }
};

constexpr int kWarpWidth = 512;  // columns of a warp: sixteen a lane

// The butterflies of the strides 1, 2, ... of a power of two `order` >= 16, below kWarpWidth, to the buffer: a warp exchanges
// between its lanes what is further apart than a lane's columns.
template <typename Input>
__device__ __forceinline__ void warp_butterflies(const Group& group, const Input& input, float* y, int n, int order) {
  const int lane = group.thread & 31, lanes = min(order, kWarpWidth) / 16;
#pragma unroll 1
  for (int base = (group.thread >> 5) * kWarpWidth; base < n; base += group.size * 16) {
    const int first = base + 16 * lane;
    float v[16] = {};
    if (first < n) input(first, v);
    butterflies(v);
    lane_butterflies(v, lane, lanes);
    if (first < n) {
#pragma unroll
      for (int i = 0; i < 16; ++i) y[float_slot(first) + i] = v[i];
    }
  }
}

// Butterflies of log2(kRadix) strides from `stride` on, a power of two; stride and kRadix are such that a column never straddles
// a gap elsewhere than at multiples of 32 from its first element.
template <int kRadix>
__device__ __forceinline__ void butterfly_pass(const Group& group, float* y, int n, int stride) {
#pragma unroll 1
  for (int j = group.thread; j < n / kRadix; j += group.size) {
    const int inner = j & (stride - 1), base = (j - inner) * kRadix + inner;
    float* column = y + float_slot(base);
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = column[float_slot(i * stride)];
    butterflies(v);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) column[float_slot(i * stride)] = v[i];
  }
}

template <int kOrder>
__device__ constexpr PaleyMatrix<kOrder> kPaley{};

// Rows [first_row, first_row + num_rows) of a dense factor as floats, [num_rows][kOrder].
template <int kOrder>
__device__ __forceinline__ void write_coefficients(const Group& group, int first_row, int num_rows, float* coefficients) {
#pragma unroll 1
  for (int i = group.thread; i < num_rows * kOrder; i += group.size)
    coefficients[i] = kPaley<kOrder>.positive[first_row + i / kOrder][i % kOrder] ? 1.0f : -1.0f;
}

// One output of a dense factor. The products with +-1 are exact, so every term is rounded once, as in a sum.
template <int kOrder>
__device__ __forceinline__ float dense_row(const float* coefficients, const float (&in)[kOrder]) {
  const float4* row = reinterpret_cast<const float4*>(coefficients);
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kOrder; c += 4) {
    const float4 h = row[c / 4];
    sum = c == 0 ? h.x * in[0] : __fmaf_rn(h.x, in[c], sum);
    sum = __fmaf_rn(h.y, in[c + 1], sum);
    sum = __fmaf_rn(h.z, in[c + 2], sum);
    sum = __fmaf_rn(h.w, in[c + 3], sum);
  }
  return sum;
}

template <int kOrder>
__device__ __forceinline__ void dense_pass(const Group& group, float* y, int n, int run, float* coefficients) {
  write_coefficients<kOrder>(group, 0, kOrder, coefficients);
  group.sync();
#pragma unroll 1
  for (int j = group.thread; j < n / kOrder; j += group.size) {
    const int outer = j / run, base = outer * run * kOrder + (j - outer * run);
    float in[kOrder];
#pragma unroll
    for (int c = 0; c < kOrder; ++c) in[c] = y[float_slot(base + c * run)];
#pragma unroll 1
    for (int r = 0; r < kOrder; ++r) y[float_slot(base + r * run)] = dense_row<kOrder>(coefficients + r * kOrder, in);
  }
}

// Dense orders that have a kernel: 12, 20, 28 and, where kMaxDense says so, the larger ones. coefficients: [order][order].
template <int kMaxDense>
__device__ __forceinline__ void dense_factor(const Group& group, float* y, int n, int run, int order, float* coefficients) {
  if (order == 12) dense_pass<12>(group, y, n, run, coefficients);
  if (order == 20) dense_pass<20>(group, y, n, run, coefficients);
  if (order == 28) dense_pass<28>(group, y, n, run, coefficients);
  if constexpr (kMaxDense > 28) {
    if (order == 36) dense_pass<36>(group, y, n, run, coefficients);
    if (order == 44) dense_pass<44>(group, y, n, run, coefficients);
    if (order == 60) dense_pass<60>(group, y, n, run, coefficients);
    if (order == 68) dense_pass<68>(group, y, n, run, coefficients);
    if (order == 76) dense_pass<76>(group, y, n, run, coefficients);
  }
}

// The butterflies of a power of two `order`, from `stride` on. Before: synchronized; after: synchronized.
__device__ __forceinline__ void power_passes(const Group& group, float* y, int n, int stride, int order) {
#pragma unroll 1
  for (; stride * 8 <= order; stride *= 8) {
    butterfly_pass<8>(group, y, n, stride);
    group.sync();
  }
  if (stride * 4 == order) butterfly_pass<4>(group, y, n, stride);
  if (stride * 2 == order) butterfly_pass<2>(group, y, n, stride);
  if (stride < order) group.sync();
}

// All butterflies of a power of two `order`, from `input` to the buffer. Before and after: synchronized.
template <typename Input>
__device__ __forceinline__ void transform_power(const Group& group, const Input& input, float* y, int n, int order) {
  warp_butterflies(group, input, y, n, order);
  group.sync();
  power_passes(group, y, n, kWarpWidth, order);
}

// Load and rotate the token at `x`; `y` is written and synchronized afterwards. kMaxDense: the largest dense order (28 or 76),
// which sets the registers a thread needs; 0 where there is no rotation.
template <DType kType, int kMaxDense>
__device__ __forceinline__ void rotate_token(const Group& group, const void* x, const Tokens& tokens, float* y,
                                             float* coefficients) {
  const int n = static_cast<int>(tokens.in_features);
  const Rotation& rotation = tokens.rotation;
  const int num_factors = kMaxDense == 0 ? 0 : rotation.num_factors,
            last = num_factors > 0 ? rotation.factors[num_factors - 1] : 1;
  const Element<kType>* elements = static_cast<const Element<kType>*>(x);
  const bool power = (last & (last - 1)) == 0, by_warps = power && last >= 16;
  if constexpr (kMaxDense > 0) {
    if (num_factors == 1 && by_warps) return transform_power(group, SignedInput<kType>{elements, rotation.signs}, y, n, last);
  }
  load_token<kType>(group, elements, n, num_factors > 0 ? rotation.signs : nullptr, y);
  group.sync();
  if constexpr (kMaxDense > 0) {
    int run = static_cast<int>(rotation.block_width);
#pragma unroll 1
    for (int f = 0; f < num_factors - (power ? 1 : 0); ++f) {
      run /= rotation.factors[f];
      dense_factor<kMaxDense>(group, y, n, run, rotation.factors[f], coefficients);
      group.sync();
    }
    if (by_warps)
      transform_power(group, Buffered{y}, y, n, last);
    else if (power)
      power_passes(group, y, n, 1, last);
  }
}

// Quantize `y`: store(plane, quad, word) once for each four columns, zeros from in_features to `padded`. Returns the token scale;
// the sums are in `reduction` after the next barrier.
template <typename Store>
__device__ __forceinline__ float quantize_token(const Group& group, const float* y, const Tokens& tokens, int padded,
                                                GroupSums& reduction, Store store) {
  const int quads = static_cast<int>(tokens.in_features) / 4, num_planes = tokens.num_planes;
  std::uint32_t largest = 0;
#pragma unroll 1
  for (int q = group.thread; q < quads; q += group.size) {
    const float* from = y + float_slot(4 * q);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(from[i]) & 0x7fffffffu);
  }
  if (group.thread < 2) reduction.sums[group.thread] = 0;
  largest = largest_of_threads(largest, group.thread, group.size, reduction.largest, [&] { group.sync(); });
  const TokenScale scale(largest, num_planes, tokens.scale_constant);
  std::int32_t sums[2] = {};
#pragma unroll 1
  for (int q = group.thread; q < padded / 4; q += group.size) {
    QuantizedQuad words{0, 0};
    if (q < quads) words = quantize_quad(y + float_slot(4 * q), scale, num_planes);
    store(0, q, words.high);
    if (num_planes == 2) store(1, q, words.low);
    sums[0] = __dp4a(static_cast<int>(words.high), 0x01010101, sums[0]);
    sums[1] = __dp4a(static_cast<int>(words.low), 0x01010101, sums[1]);
  }
  add_sums(sums, num_planes, reduction.sums);
  return scale.token_scale;
}

}  // namespace pvq::cuda
