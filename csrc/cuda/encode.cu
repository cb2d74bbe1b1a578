// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <string>
#include <type_traits>

#include "encode.h"
#include "encode_search.cuh"
#include "launch.h"

namespace pvq::cuda {
namespace {

using namespace encoding;

constexpr unsigned kWarp = 0xffffffffu;
static_assert(kLadders == kGroupSize, "thread i of a group holds weight i and tries ladder i");

constexpr bool shares_gains(const ServingCodebook& book) {
  for (int p = 1; p < book.num_pyramids; ++p)
    for (int g = 0; g < book.num_gains; ++g)
      if (book.gains[p][g].base != book.gains[0][g].base || book.gains[p][g].step != book.gains[0][g].step) return false;
  return true;
}

template <CodebookId kId>
struct Book {
  static constexpr ServingCodebook kBook = *find_codebook(kId);
  static constexpr int kBytes = kBook.bytes_per_group, kRefinement = kBook.refinement_bits;
  static constexpr int kPyramids = shares_gains(kBook) ? kBook.num_pyramids : 1;  // of one ladder
  static constexpr int kNumLadders = kBook.num_gains * kBook.num_pyramids / kPyramids;
  static_assert(kNumLadders <= kLadders, "a ladder for each thread of a group");
};

template <>
struct Book<CodebookId::kInt8> {
  static constexpr int kBytes = kGroupSize;
};

template <CodebookId kId>
Search prepare() {
  Search search{};
  if constexpr (kId != CodebookId::kInt8) {
    using B = Book<kId>;
    constexpr ServingCodebook kBook = B::kBook;
    search.num_ladders = B::kNumLadders;
    search.shape_bits = kBook.shape_bits;
    for (int i = 0; i < B::kNumLadders; ++i) {  // the CPU's order: sets of pyramids, then gains
      Ladder& ladder = search.ladders[i];
      ladder.pyramid = i / kBook.num_gains * B::kPyramids;
      ladder.gain = i % kBook.num_gains;
      const Rung rung = kBook.gains[ladder.pyramid][ladder.gain];
      ladder.base = static_cast<float>(rung.base) + 0.5f;
      ladder.step = static_cast<float>(rung.step);
      ladder.inverse_step = 1.0f / ladder.step;
      ladder.last = (kMaxMagnitude - rung.base) / rung.step;
      for (int k = 0; k < B::kPyramids; ++k) {
        ladder.pulses[k] = kBook.pyramids[ladder.pyramid + k];
        if (k > 0 && ladder.pulses[k] >= ladder.pulses[k - 1]) throw std::logic_error("pyramids of a codebook must fall");
      }
    }
    for (int p = 1; p < kBook.num_pyramids; ++p)
      search.first_shape[p] = search.first_shape[p - 1] + num_compositions(kGroupSize, kBook.pyramids[p - 1]);
    for (int parts = 1; parts <= kGroupSize; ++parts)
      for (int total = 0; total <= kMaxDigit; ++total)
        search.compositions[parts][total] = static_cast<std::uint16_t>(num_compositions(parts, total));
  }
  return search;
}

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
constexpr int kRowThreads = 64;  // rows are few: small blocks spread them over the multiprocessors

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

// Eight threads a row. Thread i has the columns i, i + 8, ... of its row to itself, in `error`.
template <CodebookId kId>
__global__ void __launch_bounds__(kRowThreads)
    feedback_kernel(const __grid_constant__ EncodeArgs p, const __grid_constant__ Search search, const float* factor,
                    float* error) {
  wait_for_dependencies();
  constexpr float kHalf = kId == CodebookId::kInt8 ? 0.0f : 0.5f;
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kGroupSize, n = p.columns;
  const int lane = static_cast<int>(threadIdx.x) % kGroupSize;
  const bool live = row < p.rows;
  const float scale = live ? p.row_scale[row] : 0.0f, inverse = inverse_scale(scale);
  const Ladder mine = search.ladders[lane];
  float* work = error + row * n;
  if (live)
    for (std::int64_t c = lane; c < n; c += kGroupSize) work[c] = p.weight[row * n + c];
  for (std::int64_t first = 0; first < n; first += kGroupSize) {
    const float weight = live ? work[first + lane] : 0.0f;
    float above[kGroupSize];  // column `lane` of U_QQ; what is below the diagonal is not used
#pragma unroll
    for (int i = 0; i < kGroupSize; ++i) above[i] = factor[(first + i) * n + first + lane];
    const float diagonal = factor[(first + lane) * n + first + lane];
    const Encoded encoded = encode_group<kId>(search, mine, multiply(weight, inverse), lane);

    // E U_QQ = w - what: forward substitution, each thread one column
    float value = subtract(weight, multiply(add(static_cast<float>(encoded.q), kHalf), scale)), e[kGroupSize];
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
    p.q[row * n + first + lane] = static_cast<std::int8_t>(encoded.q);
    if (lane < Book<kId>::kBytes) p.codes[(row * n + first) / kGroupSize * Book<kId>::kBytes + lane] = encoded.byte;
    for (std::int64_t c = first + kGroupSize + lane; c < n; c += kGroupSize) {
      float sum = work[c];
#pragma unroll
      for (int i = 0; i < kGroupSize; ++i) sum = subtract(sum, multiply(e[i], factor[(first + i) * n + c]));
      work[c] = sum;
    }
  }
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

dim3 blocks_of(std::int64_t threads, int block) {
  const std::int64_t blocks = (threads + block - 1) / block;
  if (blocks > 0x7fffffff) throw std::invalid_argument("too many weights for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

template <CodebookId kId>
using Id = std::integral_constant<CodebookId, kId>;

template <typename Function>
void with_codebook(CodebookId id, Function function) {
  switch (id) {
    case CodebookId::kPvq2:
      return function(Id<CodebookId::kPvq2>());
    case CodebookId::kPvq3:
      return function(Id<CodebookId::kPvq3>());
    case CodebookId::kPvq4:
      return function(Id<CodebookId::kPvq4>());
    case CodebookId::kInt8:
      return function(Id<CodebookId::kInt8>());
  }
  throw std::invalid_argument("unknown codebook id " + std::to_string(static_cast<int>(id)));
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

void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, float* error, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const dim3 grid = blocks_of(args.rows * kGroupSize, kRowThreads);
  with_codebook(args.codebook, [&](auto id) {
    constexpr CodebookId kId = decltype(id)::value;
    launch(feedback_kernel<kId>, grid, dim3(kRowThreads), 0, stream, args, prepare<kId>(), factor, error);
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
