// SPDX-License-Identifier: Apache-2.0
// Error feedback and coordinate descent: cpu/feedback_loops.h with eight threads a row. Thread i tries gain i with the search of
// ../metric_search.h; then all fold the eight results in the CPU's order.
#include "../metric_search.h"
#include "encode.h"
#include "encode_book.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

using namespace encoding;

struct ScalarLanes {
  using Float = float;
  using Int = int;
  using Mask = bool;
  static PVQ_HOST_DEVICE float to_float(int v) { return static_cast<float>(v); }
  static PVQ_HOST_DEVICE int to_int(float v) { return static_cast<int>(v); }
  static PVQ_HOST_DEVICE bool any(bool mask) { return mask; }
};

// What each of the eight threads of a group knows of its codeword.
struct Found {
  float cost;
  float x[kGroupSize];  // q + h/2
  std::uint32_t code;   // int8: not used
};

// All threads of the block call this together: the metric of one group for all of them.
__device__ __forceinline__ void load_metric(const float* values, metric::Metric& shared) {
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  static_assert(kRowThreads == kGroupSize * kGroupSize, "one entry of u and of M a thread");
  shared.u[i / kGroupSize][i % kGroupSize] = values[i];
  shared.m[i / kGroupSize][i % kGroupSize] = values[kRowThreads + i];
  if (i < kGroupSize) {
    shared.inverse_diagonal[i] = 1.0f / values[i * (kGroupSize + 1)];
    shared.inverse_m[i] = 1.0f / values[kRowThreads + i * (kGroupSize + 1)];
  }
  __syncthreads();
}

// All threads of a warp call this together.
template <CodebookId kId>
__device__ __forceinline__ Found search_group(const Search& search, const metric::Metric& metric,
                                              const float (&target)[kGroupSize], int lane) {
  Found found;
  if constexpr (kId == CodebookId::kInt8) {
    metric::nearest_plane_int8<ScalarLanes>(metric, target, found.x, found.cost);
    found.code = 0;
  } else {
    using B = Book<kId>;
    constexpr int kRefinement = B::kRefinement;
    float cost = infinity();
    int pyramid = 0;
    std::uint32_t low = 0, high = 0, signs = 0;  // j of coordinates 0-3 and 4-7, a byte each
    if (lane < B::kNumLadders) {
      const Ladder& ladder = search.ladders[lane];
      const metric::Rungs<ScalarLanes> rungs{ladder.base, ladder.step, ladder.inverse_step, ladder.last};
      metric::Point<ScalarLanes> free;
      metric::nearest_plane<ScalarLanes, kRefinement>(metric, rungs, target, free);
#pragma unroll 1
      for (int k = 0; k < B::kPyramids; ++k) {
        metric::Point<ScalarLanes> point = free;
        const bool possible = metric::to_pyramid<ScalarLanes, kRefinement>(metric, rungs, ladder.pulses[k], point);
        metric::improve<ScalarLanes, kRefinement>(metric, rungs, possible, point);
        if (!(possible && point.cost < cost)) continue;
        cost = point.cost;
        pyramid = k;
        low = high = signs = 0;
#pragma unroll
        for (int i = 0; i < kGroupSize; ++i) {
          const bool negative = point.x[i] < 0.0f;
          const float size = negative ? -point.x[i] : point.x[i];
          const auto j = static_cast<std::uint32_t>((size - rungs.base) * rungs.inverse_step + 0.5f);
          (i < 4 ? low : high) |= j << (8 * (i & 3));
          signs |= static_cast<std::uint32_t>(negative) << i;
        }
      }
    }
    __syncwarp();
    Choice best{infinity(), 0, 0, false};
#pragma unroll
    for (int ladder = 0; ladder < B::kNumLadders; ++ladder) {
      const float other = __shfl_sync(kWarp, cost, ladder, kGroupSize);
      const int k = __shfl_sync(kWarp, pyramid, ladder, kGroupSize);
      if (other < best.cost) best = {other, ladder, k, true};
    }
    low = __shfl_sync(kWarp, low, best.ladder, kGroupSize);
    high = __shfl_sync(kWarp, high, best.ladder, kGroupSize);
    signs = __shfl_sync(kWarp, signs, best.ladder, kGroupSize);
    const Ladder& ladder = search.ladders[best.ladder];
    if (!best.found) {  // no finite cost: a codeword all the same, the CPU's
      low = signs = 0;
      high = static_cast<std::uint32_t>(ladder.pulses[0] << kRefinement) << 24;
    }
    found.cost = best.cost;
    found.code = code_word<kRefinement>(search, best, low, high, signs);
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {
      const int j = static_cast<int>((i < 4 ? low : high) >> (8 * (i & 3))) & 255;
      found.x[i] = static_cast<float>(signed_level(ladder, j, (signs >> i & 1) != 0)) + 0.5f;
    }
  }
  return found;
}

template <CodebookId kId>
__device__ __forceinline__ void store_code(const EncodeArgs& p, const Found& found, std::int64_t row, std::int64_t first,
                                           int lane) {
  constexpr float kHalf = kId == CodebookId::kInt8 ? 0.0f : 0.5f;
  constexpr int kBytes = Book<kId>::kBytes;
  float own = found.x[0];
#pragma unroll
  for (int i = 1; i < kGroupSize; ++i) own = i == lane ? found.x[i] : own;
  const auto q = static_cast<std::int8_t>(own - kHalf);
  p.q[row * p.columns + first + lane] = q;
  if (lane < kBytes)
    p.codes[(row * p.columns + first) / kGroupSize * kBytes + lane] =
        kId == CodebookId::kInt8 ? static_cast<std::uint8_t>(q) : static_cast<std::uint8_t>(found.code >> (8 * (lane & 3)));
}

// Thread i has the columns i, i + 8, ... of its row to itself, in `error`.
template <CodebookId kId>
__global__ void __launch_bounds__(kRowThreads)
    feedback_kernel(const __grid_constant__ EncodeArgs p, const __grid_constant__ Search search, const float* factor,
                    const float* metrics, float* error) {
  __shared__ metric::Metric metric;
  wait_for_dependencies();
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kGroupSize, n = p.columns;
  const int lane = static_cast<int>(threadIdx.x) % kGroupSize;
  const bool live = row < p.rows;
  const float scale = live ? p.row_scale[row] : 0.0f, inverse = inverse_scale(scale);
  float* work = error + row * n;
  if (live)
    for (std::int64_t c = lane; c < n; c += kGroupSize) work[c] = p.weight[row * n + c];
  for (std::int64_t first = 0; first < n; first += kGroupSize) {
    load_metric(metrics + first / kGroupSize * metric::kMetricFloats, metric);
    const float weight = live ? work[first + lane] : 0.0f;
    float above[kGroupSize];  // column `lane` of U_QQ; what is below the diagonal is not used
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) above[i] = factor[(first + i) * n + first + lane];
    const float diagonal = factor[(first + lane) * n + first + lane];
    float target[kGroupSize];
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) target[i] = __shfl_sync(kWarp, multiply(weight, inverse), i, kGroupSize);
    const Found found = search_group<kId>(search, metric, target, lane);

    // E U_QQ = w - what: forward substitution, each thread one column
    float x = found.x[0];
#pragma unroll
    for (int i = 1; i < kGroupSize; ++i) x = i == lane ? found.x[i] : x;
    float value = subtract(weight, multiply(x, scale)), e[kGroupSize];
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {
      e[i] = __shfl_sync(kWarp, divide(value, diagonal), i, kGroupSize);
      if (i < lane) value = subtract(value, multiply(e[i], above[i]));
    }
    if (!live) continue;
    float own = e[0];
#pragma unroll
    for (int i = 1; i < kGroupSize; ++i) own = i == lane ? e[i] : own;
    work[first + lane] = own;
    store_code<kId>(p, found, row, first, lane);
    for (std::int64_t c = first + kGroupSize + lane; c < n; c += kGroupSize) {
      float sum = work[c];
#pragma unroll
      for (int i = 0; i < kGroupSize; ++i) sum = subtract(sum, multiply(e[i], factor[(first + i) * n + c]));
      work[c] = sum;
    }
  }
}

// Thread i has the columns i, i + 8, ... of its row of the gradient to itself.
template <CodebookId kId>
__global__ void __launch_bounds__(kRowThreads)
    descent_kernel(const __grid_constant__ EncodeArgs p, const __grid_constant__ Search search, float* gradient,
                   const float* hessian, const float* metrics) {
  __shared__ metric::Metric metric;
  wait_for_dependencies();
  constexpr float kHalf = kId == CodebookId::kInt8 ? 0.0f : 0.5f;
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kGroupSize, n = p.columns;
  const int lane = static_cast<int>(threadIdx.x) % kGroupSize;
  const bool live = row < p.rows;
  const float scale = live ? p.row_scale[row] : 0.0f, inverse = inverse_scale(scale);
  for (std::int64_t first = 0; first < n; first += kGroupSize) {
    load_metric(metrics + first / kGroupSize * metric::kMetricFloats, metric);
    const float weight = live ? p.weight[row * n + first + lane] : 0.0f, slope = live ? gradient[row * n + first + lane] : 0.0f;
    const float level = live ? static_cast<float>(p.q[row * n + first + lane]) + kHalf : kHalf;
    float w[kGroupSize], old[kGroupSize], e[kGroupSize], others[kGroupSize], middle[kGroupSize], target[kGroupSize];
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {
      w[i] = __shfl_sync(kWarp, weight, i, kGroupSize);
      old[i] = __shfl_sync(kWarp, level, i, kGroupSize);
      others[i] = __shfl_sync(kWarp, slope, i, kGroupSize);
      e[i] = subtract(w[i], multiply(old[i], scale));
    }
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {  // what the other groups' errors ask of this one
      float own = multiply(e[0], metric.m[0][i]);
#pragma unroll
      for (int k = 1; k < kGroupSize; ++k) own = add(own, multiply(e[k], metric.m[k][i]));
      others[i] = subtract(others[i], own);
    }
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {  // M^-1 = u^T u
      middle[i] = multiply(others[i], metric.u[i][i]);
#pragma unroll
      for (int k = i + 1; k < kGroupSize; ++k) middle[i] = add(middle[i], multiply(others[k], metric.u[i][k]));
    }
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {
      float sum = multiply(middle[0], metric.u[0][i]);
#pragma unroll
      for (int k = 1; k <= i; ++k) sum = add(sum, multiply(middle[k], metric.u[k][i]));
      target[i] = multiply(add(w[i], sum), inverse);
    }
    const Found found = search_group<kId>(search, metric, target, lane);
    float old_cost = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) {
      float sum = multiply(subtract(target[0], old[0]), metric.m[0][i]);
#pragma unroll
      for (int k = 1; k < kGroupSize; ++k) sum = add(sum, multiply(subtract(target[k], old[k]), metric.m[k][i]));
      old_cost = add(old_cost, multiply(sum, subtract(target[i], old[i])));
    }
    if (!live || !(found.cost < multiply(old_cost, metric::kWorthAChange))) continue;
    store_code<kId>(p, found, row, first, lane);
    float step[kGroupSize];
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) step[i] = multiply(subtract(found.x[i], old[i]), scale);
    for (std::int64_t c = lane; c < n; c += kGroupSize) {
      float sum = gradient[row * n + c];
#pragma unroll
      for (int i = 0; i < kGroupSize; ++i) sum = subtract(sum, multiply(step[i], hessian[(first + i) * n + c]));
      gradient[row * n + c] = sum;
    }
  }
}

}  // namespace

void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, const float* metrics, float* error,
                               cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const dim3 grid = blocks_of(args.rows * kGroupSize, kRowThreads);
  with_codebook(args.codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    launch(feedback_kernel<kId>, grid, dim3(kRowThreads), 0, stream, args, prepare<kId>(), factor, metrics, error);
  });
}

void descend_rows(const EncodeArgs& args, float* gradient, const float* hessian, const float* metrics, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const dim3 grid = blocks_of(args.rows * kGroupSize, kRowThreads);
  with_codebook(args.codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    launch(descent_kernel<kId>, grid, dim3(kRowThreads), 0, stream, args, prepare<kId>(), gradient, hessian, metrics);
  });
}

}  // namespace pvq::cuda
