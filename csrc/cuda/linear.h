// SPDX-License-Identifier: Apache-2.0
// y = x W^T with a packed W on a GPU: the host side. Every pointer is a device address, every launch goes to `stream`, nothing is
// allocated and nothing waits. Errors of CUDA throw std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "../codebook.h"
#include "../projection.h"
#include "layout.h"

namespace pvq::cuda {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kMaxFactors = 4;

struct Rotation {  // format.md §5; num_factors 0: none
  int num_factors = 0;
  int factors[kMaxFactors] = {};  // dense orders first, a power of two only last
  std::int64_t block_width = 1;
  const std::uint32_t* signs = nullptr;  // [in_features / 32 up], bit set: -1
};

// Of the dense factors; 0 if there are none.
inline int largest_dense_order(const Rotation& rotation) {
  int largest = 0;
  for (int f = 0; f < rotation.num_factors; ++f) {
    const int order = rotation.factors[f];
    if ((order & (order - 1)) != 0 && order > largest) largest = order;
  }
  return largest;
}

// One in blocks of a power of two columns that a warp holds.
inline bool rotates_in_warps(const Rotation& rotation) {
  const int width = rotation.factors[0];
  return rotation.num_factors == 1 && (width & (width - 1)) == 0 && width >= 8 && width <= 256;
}

struct Tokens {   // the input of one call
  const void* x;  // [num_tokens, in_features]
  DType dtype;
  std::int64_t num_tokens, in_features;
  int num_planes;        // a8 and pvq: 1, a16: 2
  float scale_constant;  // c of format.md §6
  Rotation rotation;
  Projection projection;  // of pvq
};

struct Activations {   // quantized (layout.h)
  std::int8_t* data;   // [num_chunks][padded_columns][128]
  std::int32_t* sums;  // [num_tokens * num_planes] sum of a over a column
  float* token_scale;  // [num_tokens]
  std::int64_t num_tokens, num_chunks, padded_columns;
  int num_planes;
  bool made_quickly;  // by quantize()
  // Shared memory that a block of the product leaves on a multiprocessor: blocks of quantize() are spread so that they fit there.
  // 0: it takes all. kUnknown: they are not spread.
  static constexpr int kUnknown = -1;
  int shared_beside = kUnknown;
  constexpr std::int64_t num_columns() const { return num_tokens * num_planes; }
};

struct Weight {  // one segment: consecutive output rows of one codebook
  CodebookId codebook;
  const std::uint8_t* data;    // layout.h
  const float* row_scale;      // [padded_rows], 0 in padding
  const std::uint32_t* table;  // device_table of the codebook; null for int8
  std::int64_t rows, num_chunks;
};

// Rows from `first` on, a multiple of kRowAlignment.
inline Weight rows_of(const Weight& weight, std::int64_t first, std::int64_t rows) {
  Weight part = weight;
  part.data += weight_bytes(weight.codebook, first, weight.num_chunks * kChunkColumns);
  part.row_scale += first;
  part.rows = rows;
  return part;
}

struct Output {
  void* y;           // first output of the segment in token 0
  const void* bias;  // of the segment, [rows] of dtype, or null
  DType dtype;
  std::int64_t stride;  // elements from one token to the next: out_features of the layer
};

// Of the rows from `first` on.
inline Output rows_of(const Output& output, std::int64_t first) {
  const std::int64_t bytes = first * (output.dtype == DType::kFloat32 ? 4 : 2);
  Output part = output;
  part.y = static_cast<char*>(output.y) + bytes;
  if (output.bias != nullptr) part.bias = static_cast<const char*>(output.bias) + bytes;
  return part;
}

// Where splits of a reduction meet. `partial` needs no initial value; `counters` are zero before and after every launch.
struct Scratch {
  std::int32_t* partial;
  std::int64_t partial_elements;
  std::int32_t* counters;  // [kNumCounters]
};
constexpr int kNumCounters = 4096;

constexpr int kMaxFewColumns = 32;

// Words of the table a kernel copies to shared memory: by shape twice its digits (pvq3, pvq4: pack_digits rotated left by one
// bit), or for pvq2 the magnitudes of all 256 codes as pairs of words (weights 0-3, 4-7). Empty for int8.
std::vector<std::uint32_t> device_table(CodebookId id);

// Rotate and quantize tokens (format.md §5, §6). waits_last: the kernel in front is one that needs no tokens, has itself waited
// for those before it, and may still run while the tokens are being quantized; what comes next finds both done.
void rotate_quantize(const Tokens& tokens, const Activations& out, bool waits_last, cudaStream_t stream);
// Its versions for tokens that need no rotation or one in small blocks (rotates_in_warps), and for few tokens; the latter false
// if there is none for these.
void quantize(const Tokens& tokens, const Activations& out, bool waits_last, cudaStream_t stream);
bool rotate_in_clusters(const Tokens& tokens, const Activations& out, cudaStream_t stream);

// Rotate, project onto tokens.projection and quantize (format.md §5, §6).
void project_tokens(const Tokens& tokens, const Activations& out, cudaStream_t stream);

// Quantize and multiply in one launch: one token (both planes of it) without rotation, one segment. False for anything else.
bool quantize_and_multiply(const Tokens& tokens, const Weight& weight, const Output& output, const Scratch& scratch,
                           cudaStream_t stream);

// Whether a product should start while its activations are being made. Not where the rotation of wide tokens would keep
// some of the product's blocks waiting for long, with all their work before them.
bool starts_early(const Activations& a, std::int64_t blocks);

// Products of quantized activations. few_columns: at most kMaxFewColumns; false if the shape does not fit.
bool few_columns(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream);
// warp_tiles, sm_90a: at most kMaxWarpTileColumns; false likewise.
constexpr int kMaxWarpTileColumns = 64;
bool warp_tiles(const Activations& a, const Weight& weight, const Output& output, cudaStream_t stream);
bool warp_tiles_pay(CodebookId codebook, std::int64_t rows, std::int64_t num_columns);  // beside many_columns_wgmma
// Activations::shared_beside for it and the kernels for more columns, for one segment.
int shared_beside(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks);
void many_columns(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch, cudaStream_t stream);
void many_columns_wgmma(const Activations& a, const Weight& weight, const Output& output, cudaStream_t stream);  // sm_90a
// Rows of its first launch; if there are more, a second one takes them.
std::int64_t many_columns_wgmma_first_rows(CodebookId codebook, std::int64_t rows, std::int64_t num_columns,
                                           std::int64_t num_chunks);
// What it takes by its model, in cycles of an H100.
double many_columns_wgmma_cycles(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks);

// The product for very many columns, sm_90a: expands the weight to int8 once, in scratch memory of expanded_bytes() (expand.h).
bool prefill_pays(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks);
// Its beginning, which needs no activations: it can run beside the kernel that makes them (rotate_quantize, waits_last).
void expand_first(const Weight& weight, std::int64_t num_columns, std::uint8_t* expanded, cudaStream_t stream);
void prefill(const Activations& a, const Weight& weight, const Output& output, std::uint8_t* expanded, bool first_is_expanded,
             cudaStream_t stream);

}  // namespace pvq::cuda
