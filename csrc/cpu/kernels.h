// SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU path, one table of them per instruction set. Every table computes the same integers.
//
// Packed weights (made once at load by pack.cpp): rows in blocks of 16, one lane each, so that sums need no horizontal add, any
// multiple of 8 columns works without a tail, and a decoded block is a B tile of AMX as it stands. Per block and group of eight:
//
//   pvq4  64 B   16 x uint16 code | signs of weights 0-3 (bit 4 * lane + i) | signs of 4-7 | refinement of 0-3 | of 4-7
//   pvq3  48 B   16 x uint16 code | signs 0-3 | signs 4-7       (code: gain index in bits 0-2, shape above, unlike the file)
//   pvq2  32 B   16 x uint8 code  | signs 0-3 | signs 4-7
//   int8 128 B   the panel itself
//
// Panel: int8 [in_features / 4][16 lanes][4]: what decode() writes and dot() reads for int8.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codebook.h"
#include "../projection.h"

namespace pvq::cpu {

constexpr int kLanes = 16;                                              // rows per block
constexpr int kNumCodebooks = 4;                                        // CodebookId values
constexpr int kMaxDotRows = 8;                                          // activation rows that one pass over a block serves
constexpr std::int64_t kBlockBytes[kNumCodebooks] = {32, 48, 64, 128};  // per group, by CodebookId

struct DotArgs {
  const std::uint8_t* block;        // packed block, num_groups * kBlockBytes
  int num_groups;                   // in_features / 8
  const std::uint8_t* activations;  // [num_rows, stride]: int8 plus `activation_offset`
  std::int64_t stride;              // bytes
  int num_rows;                     // 1 .. kMaxDotRows
  std::int32_t* sums;               // out [num_rows, kLanes]: sum over columns of q * (a + activation_offset)
};

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct FinishArgs {                                   // format.md §7 for one block of 16 rows
  const std::int32_t* sums;                           // of plane 0, token 0; [num_tokens, sum_stride]
  std::int64_t sum_stride, plane_stride, num_tokens;  // plane_stride: elements from a token's plane 0 to its plane 1
  int num_planes, activation_offset, half_offset;     // half_offset: h
  const float* row_scale;                             // [kLanes]
  const std::int32_t* row_sum;                        // [kLanes]
  const std::int32_t* token_sum;                      // [num_planes, token_stride]: sum of a
  std::int64_t token_stride;
  const float* token_scale;  // [num_tokens]
  const void* bias;          // [num_lanes] of dtype, or null
  DType dtype;
  void* y;                // first output of this block in token 0
  std::int64_t y_stride;  // elements
  int num_lanes;          // 1 .. kLanes
};

struct CpuKernels {
  const char* name;
  int activation_offset;  // 128 where the multiplier takes unsigned activations (vpdpbusd), else 0
  void (*dot[kNumCodebooks])(const DotArgs&);
  void (*decode[kNumCodebooks])(const std::uint8_t* block, int num_groups, std::int8_t* panel);  // null for int8
  // y = s x: widened to float32 and multiplied by the signs (null: none).
  void (*load)(const void* x, DType dtype, const float* signs, std::int64_t n, float* y);
  // y = (H_f1 x ... x H_fk) y without normalisation, format.md §5 steps 2 and 3; y and scratch [width].
  void (*rotate)(float* y, float* scratch, std::int64_t width, const struct RotationFactor* factors, int num_factors);
  // Largest bit pattern of |y_i|; a value of 0x7f800000 or more means that y is not finite.
  std::uint32_t (*max_magnitude)(const float* y, std::int64_t n);
  // a_i = rint(y_i * inverse_scale) + offset; returns sum a_i without the offset.
  std::int32_t (*quantize_a8)(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* a);
  void (*quantize_a16)(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* hi, std::uint8_t* lo,
                       std::int32_t* sum_hi, std::int32_t* sum_lo);
  // The nearest point of S(D, K) to every group of D: p replaces y, s goes to scale [n / D]. Returns A, the largest s |p_i|;
  // infinity for a token that is not finite.
  float (*project)(float* y, std::int64_t n, int group_size, int num_pulses, float* scale);
  // a_i = rint(p_i * (s * inverse_scale)) + offset; returns sum a_i without the offset.
  std::int32_t (*quantize_pulses)(const float* pulses, std::int64_t n, int group_size, const float* scale, float inverse_scale,
                                  int offset, std::uint8_t* a);
  void (*finish)(const FinishArgs&);
};

struct RotationFactor {
  int order;
  const float* matrix;  // [order, order] of +-1; null for a power of two (butterflies)
};

// Digit words by shape index, padded to a multiple of 8192 so that no code can read past the end; and, for pvq2, all 256 codes'
// magnitudes as two words of four bytes (weights 0-3, 4-7).
const std::uint32_t* digit_table(CodebookId id);
const std::uint32_t* pvq2_magnitudes();  // [2][256]

const CpuKernels* portable_kernels();
const CpuKernels* avx2_kernels();         // null if not built for this machine's architecture
const CpuKernels* avx512_vnni_kernels();  // likewise

// AMX: pairs of neighbouring blocks times up to kAmxRows tokens.
constexpr std::int64_t kAmxColumns = 64;  // columns of a tile
constexpr std::int64_t kAmxRows = 32;     // activation rows of a step

struct AmxPair {
  const std::int8_t* panels[2];  // [padded_columns / 4][16][4] each; the first again where there is no second block
  FinishArgs finish;             // of the first block; amx_tiles sets what depends on the tokens, y is of token 0
  int num_lanes[2];              // 0: no second block
};

struct AmxTokens {
  const std::uint8_t* activations;   // int8 [num_planes][.., stride], rows readable up to a multiple of 16
  std::int64_t stride, plane_bytes;  // stride: a multiple of 64 bytes; plane_bytes: from a plane to the next
  std::int64_t padded_columns;       // a multiple of kAmxColumns
  std::int64_t first_token, num_tokens;
  const std::int32_t* token_sum;  // of first_token; [num_planes, token_stride]
  std::int64_t token_stride;
  const float* token_scale;  // of first_token
};

void amx_configure();
void amx_release();
void amx_tiles(const AmxPair* pairs, std::int64_t num_pairs, const AmxTokens& tokens);

// What this process uses: the best the machine has, capped by PVQ_CPU_ISA = portable | avx2 | avx512 | amx.
const CpuKernels& active_kernels();
bool amx_active();
const char* active_isa();

}  // namespace pvq::cpu
