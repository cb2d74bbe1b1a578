// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "decode.cuh"
#include "launch.h"
#include "linear.h"
#include "pack.h"
#include "pack_layout.h"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct PackParameters {
  const std::uint8_t* codes;
  std::int64_t rows, in_features, first_row, num_pairs;  // pairs of a tile and a chunk
  std::uint8_t* weight;
  const std::uint32_t* table;
  std::int64_t* invalid_row;
  Rung gains[kMaxGains];  // of pvq3 and pvq4: one ladder for all pyramids
  int num_shapes;
};

// Is the code of a group in the codebook? The conditions of format.md §4.
template <CodebookId kId>
__device__ bool is_valid(const std::uint8_t* bytes, const PackParameters& p) {
  if constexpr (kId == CodebookId::kInt8) {
    bool valid = true;
    for (int i = 0; i < kGroupSize; ++i) valid &= bytes[i] != 0x80;
    return valid;
  } else if constexpr (kId == CodebookId::kPvq2) {  // seven bits hold the 128 shapes; no magnitude needs the top bit
    const uint2 magnitudes = reinterpret_cast<const uint2*>(p.table)[bytes[0]];
    return ((magnitudes.x | magnitudes.y) & 0x80808080u) == 0;
  } else {
    const std::uint32_t code = bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8;
    const int shape = static_cast<int>(code & 0x1fffu);
    if (shape >= p.num_shapes) return false;
    const Rung gain = p.gains[code >> 13];
    const std::uint32_t digits = __funnelshift_r(p.table[shape], p.table[shape], 1);  // undoubled
    int largest = 0;
    for (int i = 0; i < kGroupSize; ++i) {
      int j = static_cast<int>(digits >> (8 * (i % 4) + 4 * (i / 4)) & 15u);
      if constexpr (kId == CodebookId::kPvq4) j = 2 * j + (bytes[3] >> i & 1);
      largest = max(largest, j);
    }
    return gain.base + gain.step * largest <= kMaxMagnitude;
  }
}

// One warp a chunk of a tile. A word belongs to two rows, g and g + 8 of the tile, which may come from two calls: it is read,
// completed and written by the one thread that owns it.
template <CodebookId kId>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParameters p) {
  wait_for_dependencies();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (pair >= p.num_pairs) return;
  const std::int64_t groups = p.in_features / kGroupSize, chunks = num_chunks(p.in_features), chunk = pair % chunks;
  const std::int64_t tile = p.first_row / kTileRows + pair / chunks;
  constexpr int kWords = lane_words(kId), kBytes = bytes_per_group(kId);
  std::uint32_t words[kWords] = {};
  for (int h = 0; h < 2; ++h) {
    const std::int64_t row = tile * kTileRows + g + 8 * h - p.first_row;
    if (row < 0 || row >= p.rows) continue;
    bool valid = true;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::int64_t group = (chunk * kSteps + s) * 4 + t;
      if (group >= groups) break;
      const std::uint8_t* from = p.codes + (row * groups + group) * kBytes;
      std::uint8_t bytes[kBytes];
#pragma unroll
      for (int i = 0; i < kBytes; ++i) bytes[i] = from[i];
      valid &= is_valid<kId>(bytes, p);
      if (h == 0)
        add_group<kId>(bytes, s, 0, words);
      else
        add_group<kId>(bytes, s, 1, words);
    }
    if (!valid) atomicMin(reinterpret_cast<long long*>(p.invalid_row), static_cast<long long>(p.first_row + row));
  }
  std::uint8_t* to = p.weight + (tile * chunks + chunk) * chunk_bytes(kId);
#pragma unroll
  for (int w = 0; w < kWords; ++w) *reinterpret_cast<std::uint32_t*>(to + lane_word_offset<kId>(w, lane)) |= words[w];
}

struct UnpackParameters {
  const std::uint8_t* weight;
  const std::uint32_t* table;
  std::int64_t rows, in_features, first_row, num_pairs;
  std::int8_t* q;
};

template <CodebookId kId>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ UnpackParameters p) {
  extern __shared__ __align__(64) char shared[];  // gains, then the table at its alignment
  constexpr int kAlignment = std::max(table_bytes(kId), 64);
  const std::uint32_t base = shared_address(shared), table = (base + kGainTableBytes + kAlignment - 1) & ~(kAlignment - 1u);
  wait_for_dependencies();
  for (int i = threadIdx.x; i < table_words(kId); i += kThreads)
    reinterpret_cast<std::uint32_t*>(shared + (table - base))[i] = p.table[i];
  write_gains<kId>(shared, threadIdx.x);
  __syncthreads();
  const Tables tables{table, base};
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const std::int64_t chunks = num_chunks(p.in_features);
  for (std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5); pair < p.num_pairs;
       pair += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t chunk = pair % chunks, tile = p.first_row / kTileRows + pair / chunks;
    LaneChunk<kId> weights;
    weights.load(p.weight + (tile * chunks + chunk) * chunk_bytes(kId), lane);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      std::uint32_t a[4];
      decode(weights, s, tables, a);
      const std::int64_t column = chunk * kChunkColumns + 32 * s + 8 * t;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int64_t row = tile * kTileRows + g + 8 * h - p.first_row;
        if (row >= 0 && row < p.rows && column < p.in_features)
          *reinterpret_cast<uint2*>(p.q + row * p.in_features + column) = {a[h], a[2 + h]};
      }
    }
  }
}

std::int64_t count_pairs(std::int64_t first_row, std::int64_t rows, std::int64_t in_features) {
  return ((first_row + rows - 1) / kTileRows - first_row / kTileRows + 1) * num_chunks(in_features);
}

template <CodebookId kId>
void run_pack(const PackParameters& p, cudaStream_t stream) {
  launch(pack_kernel<kId>, dim3(static_cast<unsigned>((p.num_pairs + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream, p);
}

template <CodebookId kId>
void run_unpack(const UnpackParameters& p, cudaStream_t stream) {
  constexpr std::int64_t kAlignment = std::max(table_bytes(kId), 64);
  constexpr std::size_t kShared = static_cast<std::size_t>(table_bytes(kId) + kGainTableBytes + kAlignment);
  const std::int64_t blocks = std::min<std::int64_t>((p.num_pairs + kWarps - 1) / kWarps, 4 * device_properties().num_sms);
  launch(unpack_kernel<kId>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kShared, stream, p);
}

}  // namespace

void pack_rows(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
               std::int64_t first_row, std::uint8_t* weight, const std::uint32_t* table, std::int64_t* invalid_row,
               cudaStream_t stream) {
  if (rows <= 0 || in_features <= 0) return;
  PackParameters p{codes,  rows,  in_features, first_row, count_pairs(first_row, rows, in_features),
                   weight, table, invalid_row, {},        0};
  if (codebook == CodebookId::kPvq3 || codebook == CodebookId::kPvq4) {
    const ServingCodebook& book = *find_codebook(codebook);
    std::copy_n(book.gains[0], kMaxGains, p.gains);
    p.num_shapes = num_shapes(book);
  }
  with_codebook(codebook, [&](auto id) { run_pack<decltype(id)::value>(p, stream); });
}

void unpack_rows(CodebookId codebook, const std::uint8_t* weight, std::int64_t first_row, std::int64_t rows,
                 std::int64_t in_features, const std::uint32_t* table, std::int8_t* q, cudaStream_t stream) {
  if (rows <= 0 || in_features <= 0) return;
  const UnpackParameters p{weight, table, rows, in_features, first_row, count_pairs(first_row, rows, in_features), q};
  with_codebook(codebook, [&](auto id) { run_unpack<decltype(id)::value>(p, stream); });
}

}  // namespace pvq::cuda
