// SPDX-License-Identifier: Apache-2.0
// AMX int8: 32 rows of weights times 32 activation rows in four accumulator tiles, 64 columns a step. A decoded panel is a
// sequence of B tiles; the activations, int8 row-major with a stride that is a multiple of 64, are A tiles where they lie.
#include "kernels.h"

#ifdef __AMX_INT8__
#include <immintrin.h>

#include <algorithm>

// Scaling in the shadow of the tiles takes vectors; a core with AMX has AVX-512 and bfloat16, and dispatch.cpp asks for all.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")

namespace pvq::cpu {
namespace {

#include "finish_loops.h"

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kStep = 64;                   // columns per tile
constexpr int kPanelStep = kStep * kLanes;  // bytes of a panel per tile
constexpr int kSumRow = 2 * kLanes;         // sums of a token: the lanes of either block
constexpr int kSumStride = kSumRow * sizeof(std::int32_t);
constexpr std::int64_t kPlaneStride = kAmxRows * kSumRow;

// Sums of one pair of blocks and up to 32 rows. `between` is called once a step, to fill the time that the tiles take.
template <typename Between>
inline void dot_tiles(const AmxPair& pair, std::int64_t steps, const std::uint8_t* a, std::int64_t stride, std::int64_t num_rows,
                      std::int32_t* sums, Between between) {
  const std::int8_t *panel0 = pair.panels[0], *panel1 = pair.panels[1];
  _tile_zero(0);
  _tile_zero(1);
  if (num_rows > 16) {
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a + k * kStep, stride);
      _tile_loadd(6, panel0 + k * kPanelStep, 64);
      _tile_loadd(5, a + 16 * stride + k * kStep, stride);
      _tile_loadd(7, panel1 + k * kPanelStep, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
      between();
    }
    _tile_stored(2, sums + 16 * kSumRow, kSumStride);
    _tile_stored(3, sums + 16 * kSumRow + kLanes, kSumStride);
  } else {
    for (std::int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a + k * kStep, stride);
      _tile_loadd(6, panel0 + k * kPanelStep, 64);
      _tile_loadd(7, panel1 + k * kPanelStep, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      between();
    }
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kLanes, kSumStride);
}

// The arguments of finish() for one block of a pair.
inline FinishArgs finish_args(const AmxPair& pair, const AmxTokens& tokens, const std::int32_t* sums, int block) {
  const std::int64_t bytes = pair.finish.dtype == DType::kFloat32 ? 4 : 2, first = block * kLanes;
  FinishArgs f = pair.finish;
  f.sums = sums + first;
  f.sum_stride = kSumRow;
  f.plane_stride = kPlaneStride;
  f.num_tokens = tokens.num_tokens;
  f.row_scale += first;
  f.row_sum += first;
  f.token_sum = tokens.token_sum;
  f.token_stride = tokens.token_stride;
  f.token_scale = tokens.token_scale;
  if (f.bias != nullptr) f.bias = static_cast<const char*>(f.bias) + first * bytes;
  f.y = static_cast<char*>(f.y) + (tokens.first_token * f.y_stride + first) * bytes;
  f.num_lanes = pair.num_lanes[block];
  return f;
}

// The commonest scaling (bfloat16, one plane, no bias, both blocks whole) of the pair before, a few tokens at a time.
class DeferredFinish {
 public:
  // vcvtne2ps2bf16 rounds and quiets as store_lanes does but takes subnormals for zero. There are none: a token scale that is not
  // 0 is at least 2^-60 / (127 * 256) (format.md §6), so row scales from 2^-40 on keep the product above 2^-126.
  static bool fits(const AmxPair& pair) {
    const FinishArgs& f = pair.finish;
    if (f.dtype != DType::kBFloat16 || f.num_planes != 1 || f.bias != nullptr) return false;
    if (pair.num_lanes[0] + pair.num_lanes[1] != kSumRow) return false;
    const __m512 smallest = _mm512_set1_ps(0x1p-39f), zero = _mm512_setzero_ps();
    for (int block = 0; block < 2; ++block) {
      const __m512 scale = _mm512_loadu_ps(f.row_scale + block * kLanes);
      if ((_mm512_cmp_ps_mask(scale, smallest, _CMP_LT_OQ) & _mm512_cmp_ps_mask(scale, zero, _CMP_NEQ_OQ)) != 0) return false;
    }
    return true;
  }

  void start(const AmxPair& pair, const AmxTokens& tokens, const std::int32_t* sums) {
    static constexpr std::int32_t kZeros[kAmxRows] = {};
    sums_ = sums;
    half_scale0_ = _mm512_mul_ps(_mm512_loadu_ps(pair.finish.row_scale), _mm512_set1_ps(0.5f));
    half_scale1_ = _mm512_mul_ps(_mm512_loadu_ps(pair.finish.row_scale + kLanes), _mm512_set1_ps(0.5f));
    token_sum_ = pair.finish.half_offset != 0 ? tokens.token_sum : kZeros;
    token_scale_ = tokens.token_scale;
    stride_ = pair.finish.y_stride;
    y_ = static_cast<std::uint16_t*>(pair.finish.y) + tokens.first_token * stride_;
    left_ = tokens.num_tokens;
  }

  inline __attribute__((always_inline)) void advance(std::int64_t count) {
    count = std::min(count, left_);
    left_ -= count;
    for (; count > 0; --count) {
      _mm_prefetch(reinterpret_cast<const char*>(y_ + 2 * kSumRow), _MM_HINT_T1);  // the row's part of the pair after next
      const __m512i offset = _mm512_set1_epi32(*token_sum_++);
      const __m512 scale = _mm512_set1_ps(*token_scale_++);
      _mm512_storeu_si512(y_, (__m512i)_mm512_cvtne2ps_pbh(scaled(sums_ + kLanes, offset, half_scale1_, scale),
                                                           scaled(sums_, offset, half_scale0_, scale)));
      sums_ += kSumRow;
      y_ += stride_;
    }
  }

  void complete() { advance(left_); }

 private:
  static inline __m512 scaled(const std::int32_t* sums, __m512i offset, __m512 half_scale, __m512 scale) {
    const Lanes16i sum = *reinterpret_cast<const Lanes16i*>(sums) * 2 + (Lanes16i)offset;
    return _mm512_mul_ps(_mm512_mul_ps((__m512) __builtin_convertvector(sum, Lanes16f), half_scale), scale);
  }

  const std::int32_t *sums_ = nullptr, *token_sum_ = nullptr;
  const float* token_scale_ = nullptr;
  std::uint16_t* y_ = nullptr;
  std::int64_t stride_ = 0, left_ = 0;  // left_: tokens not yet done
  __m512 half_scale0_{}, half_scale1_{};
};

}  // namespace

void amx_configure() {
  static const TileConfig config;  // static: GCC's intrinsic tells the optimizer of only eight of its bytes
  _tile_loadconfig(&config);
}

void amx_release() { _tile_release(); }

void amx_tiles(const AmxPair* pairs, std::int64_t num_pairs, const AmxTokens& tokens) {
  alignas(64) std::int32_t sums[2][2 * kPlaneStride];  // [this pair or the one before][plane, token, lane of either block]
  const std::int64_t steps = tokens.padded_columns / kStep, per_step = (tokens.num_tokens + steps - 1) / steps;
  DeferredFinish before;
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    const AmxPair& pair = pairs[i];
    std::int32_t* out = sums[i & 1];
    dot_tiles(pair, steps, tokens.activations, tokens.stride, tokens.num_tokens, out, [&] { before.advance(per_step); });
    if (DeferredFinish::fits(pair)) {
      before.start(pair, tokens, out);
      continue;
    }
    if (pair.finish.num_planes == 2)
      dot_tiles(pair, steps, tokens.activations + tokens.plane_bytes, tokens.stride, tokens.num_tokens, out + kPlaneStride,
                [] {});
    for (int block = 0; block < 2; ++block)
      if (pair.num_lanes[block] > 0) finish(finish_args(pair, tokens, out, block));
  }
  before.complete();
}

}  // namespace pvq::cpu
#else
namespace pvq::cpu {
void amx_configure() {}
void amx_release() {}
void amx_tiles(const AmxPair*, std::int64_t, const AmxTokens&) {}
}  // namespace pvq::cpu
#endif
