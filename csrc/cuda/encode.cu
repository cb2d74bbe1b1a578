// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "encode.h"
#include "encode_book.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

using namespace encoding;

// What one of the eight threads of a group knows of its codeword.
struct Encoded {
  int q;              // of the thread's weight
  std::uint8_t byte;  // the thread's of the code, in the first B threads
  float cost;         // of the group; 0 for int8
};

// All threads of a warp call this together. target: the thread's weight in int8 units; mine: ladder of the thread.
template <CodebookId kId>
__device__ __forceinline__ Encoded encode_group(const Search& search, const Ladder& mine, float target, int lane) {
  if constexpr (kId == CodebookId::kInt8) {
    const int q = round_to_int8(target);
    return {q, static_cast<std::uint8_t>(q), 0.0f};
  } else {
    using B = Book<kId>;
    const bool negative = target < 0.0f;
    const std::uint32_t signs = __ballot_sync(kWarp, negative) >> (threadIdx.x & 24) & 255;
    const float magnitude = negative ? -target : target;
    float a[kGroupSize];
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) a[i] = __shfl_sync(kWarp, magnitude, i, kGroupSize);
    LadderResult<B::kPyramids> result{};
    if (lane < B::kNumLadders) result = search_ladder<B::kRefinement, B::kPyramids>(mine, a);
    __syncwarp();

    Choice best{infinity(), 0, 0, false};
#pragma unroll
    for (int ladder = 0; ladder < B::kNumLadders; ++ladder) {
      const float free_cost = __shfl_sync(kWarp, result.free_cost, ladder, kGroupSize);
      float cost[B::kPyramids], threshold[B::kPyramids];
#pragma unroll
      for (int k = 0; k < B::kPyramids; ++k) {
        cost[k] = __shfl_sync(kWarp, result.cost[k], ladder, kGroupSize);
        threshold[k] = __shfl_sync(kWarp, result.threshold[k], ladder, kGroupSize);
      }
      fold_ladder<B::kPyramids>(best, ladder, free_cost, cost, threshold);
    }
    std::uint32_t low = result.low[0], high = result.high[0];
#pragma unroll
    for (int k = 1; k < B::kPyramids; ++k) {
      low = k == best.k ? result.low[k] : low;
      high = k == best.k ? result.high[k] : high;
    }
    low = __shfl_sync(kWarp, low, best.ladder, kGroupSize);
    high = __shfl_sync(kWarp, high, best.ladder, kGroupSize);
    if (!best.found) low = high = 0;
    const std::uint32_t code = code_word<B::kRefinement>(search, best, low, high, signs);
    const int j = static_cast<int>((lane < 4 ? low : high) >> (8 * (lane & 3))) & 255;
    const int q = signed_level(search.ladders[best.ladder], j, negative);
    return {q, static_cast<std::uint8_t>(code >> (8 * (lane & 3))), best.cost};
  }
}

constexpr int kEncodeThreads = 256;

template <CodebookId kId>
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(const __grid_constant__ EncodeArgs p, const __grid_constant__ Search search) {
  wait_for_dependencies();
  const std::int64_t element = static_cast<std::int64_t>(blockIdx.x) * kEncodeThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kGroupSize;
  const bool live = element < p.rows * p.columns;
  const float inverse = live ? inverse_scale(p.row_scale[element / p.columns]) : 0.0f;
  const float target = live ? multiply(p.weight[element], inverse) : 0.0f;
  const Ladder mine = search.ladders[lane];
  const Encoded encoded = encode_group<kId>(search, mine, target, lane);
  if (!live) return;
  p.q[element] = static_cast<std::int8_t>(encoded.q);
  if (lane < Book<kId>::kBytes) p.codes[element / kGroupSize * Book<kId>::kBytes + lane] = encoded.byte;
}

template <CodebookId kId>
__global__ void __launch_bounds__(kRowThreads)
    error_kernel(const __grid_constant__ Search search, const float* weight, const float* row_scale, std::int64_t rows,
                 std::int64_t columns, std::int64_t stride, float* error) {
  wait_for_dependencies();
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kGroupSize;
  const int lane = static_cast<int>(threadIdx.x) % kGroupSize;
  const bool live = row < rows;
  const float scale = live ? row_scale[row] : 0.0f, inverse = inverse_scale(scale);
  const Ladder mine = search.ladders[lane];
  float sum = 0.0f;
  for (std::int64_t first = 0; first < columns; first += kGroupSize * stride) {
    const float target = live ? multiply(weight[row * columns + first + lane], inverse) : 0.0f;
    sum = add(sum, encode_group<kId>(search, mine, target, lane).cost);
  }
  if (live && lane == 0) error[row] = multiply(sum, multiply(scale, scale));
}

}  // namespace

void encode_rows(const EncodeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const dim3 grid = blocks_of(args.rows * args.columns, kEncodeThreads);
  with_codebook(args.codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    launch(encode_kernel<kId>, grid, dim3(kEncodeThreads), 0, stream, args, prepare<kId>());
  });
}

void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error, cudaStream_t stream) {
  if (codebook == CodebookId::kInt8) throw std::invalid_argument("encoding_error is for the pyramid codebooks");
  if (rows == 0) return;
  if (stride < 1) throw std::invalid_argument("stride must be at least 1");
  const dim3 grid = blocks_of(rows * kGroupSize, kRowThreads);
  with_codebook(codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    if constexpr (kId != CodebookId::kInt8)
      launch(error_kernel<kId>, grid, dim3(kRowThreads), 0, stream, prepare<kId>(), weight, row_scale, rows, columns, stride,
             error);
  });
}

}  // namespace pvq::cuda
