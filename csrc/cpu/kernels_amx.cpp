// SPDX-License-Identifier: Apache-2.0
// AMX int8: 32 rows of weights times 32 activation rows in four accumulator tiles, 64 columns a step. A decoded panel is a
// sequence of B tiles; the activations, int8 row-major with a stride that is a multiple of 64, are A tiles where they lie.
#include "kernels.h"

#ifdef __AMX_INT8__
#include <immintrin.h>

namespace pvq::cpu {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kStep = 64;                  // columns per tile
constexpr int kPanelStep = kStep * kLanes;  // bytes of a panel per tile
constexpr int kSumStride = 2 * kLanes * sizeof(std::int32_t);

}  // namespace

void amx_configure() {
  static const TileConfig config;  // static: GCC's intrinsic tells the optimizer of only eight of its bytes
  _tile_loadconfig(&config);
}

void amx_release() { _tile_release(); }

void amx_dot(const std::int8_t* panel0, const std::int8_t* panel1, std::int64_t padded_columns, const std::uint8_t* activations,
             std::int64_t stride, std::int64_t num_rows, std::int32_t* sums) {
  const std::int64_t steps = padded_columns / kStep;
  std::int64_t row = 0;
  for (; row + 16 < num_rows; row += 32) {
    const std::uint8_t* a = activations + row * stride;
    _tile_zero(0);
    _tile_zero(1);
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
    }
    std::int32_t* out = sums + row * 2 * kLanes;
    _tile_stored(0, out, kSumStride);
    _tile_stored(1, out + kLanes, kSumStride);
    _tile_stored(2, out + 16 * 2 * kLanes, kSumStride);
    _tile_stored(3, out + 16 * 2 * kLanes + kLanes, kSumStride);
  }
  if (row < num_rows) {
    const std::uint8_t* a = activations + row * stride;
    _tile_zero(0);
    _tile_zero(1);
    for (std::int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a + k * kStep, stride);
      _tile_loadd(6, panel0 + k * kPanelStep, 64);
      _tile_loadd(7, panel1 + k * kPanelStep, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    }
    std::int32_t* out = sums + row * 2 * kLanes;
    _tile_stored(0, out, kSumStride);
    _tile_stored(1, out + kLanes, kSumStride);
  }
}

}  // namespace pvq::cpu
#else
namespace pvq::cpu {
void amx_configure() {}
void amx_release() {}
void amx_dot(const std::int8_t*, const std::int8_t*, std::int64_t, const std::uint8_t*, std::int64_t, std::int64_t,
             std::int32_t*) {}
}  // namespace pvq::cpu
#endif
