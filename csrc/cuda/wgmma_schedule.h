// SPDX-License-Identifier: Apache-2.0
// Who does what in many_columns_wgmma: pure arithmetic, shared by the host and the kernel.
//
// A tile is kWgmmaRows rows by columns_per_tile columns of y. Without splits a CTA takes the tiles worker, worker + workers, ...;
// with splits the CTAs of a cluster divide the chunks of one tile, at least one each, and add their sums up at the end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"

namespace pvq::cuda {

constexpr int kWgmmaRows = 128;  // 64 for each warpgroup that multiplies
constexpr int kWgmmaMaxStages = 8;
constexpr int kWgmmaMaxSplits = 3;
constexpr int kStagedColumnBytes = 144;  // 64 results of 16 bits, and 16 bytes that spread the banks

// Shared memory by address. The first kilobyte belongs to the system, then: barriers, gains, the area of the epilogue, the
// digits, aligned to their size (decode.cuh), and the stages, aligned to 1024 bytes.
constexpr int kSharedBase = 1024;
constexpr int kSharedGains = kSharedBase + 512;
constexpr int kSharedArea = kSharedBase + 1024;

// The area of a warpgroup (wgmma_finish.cuh): two buffers of results, what is known of columns, and of rows.
constexpr int kStagedColumns = 32;  // of a buffer
constexpr int finish_area_bytes(int columns_per_tile) {
  return 2 * kStagedColumns * kStagedColumnBytes + columns_per_tile * 8 + 64 * 8;
}
// The CTAs of a split tile finish consecutive parts of its columns each: first_part(rank) up to the next CTA's.
constexpr int kSplitParts = 8;
constexpr int first_part(int rank, int splits) { return kSplitParts * rank / splits; }
constexpr int most_parts(int splits) { return (kSplitParts + splits - 1) / splits; }
// Sums of all CTAs for a CTA's parts, in the place of its stages.
constexpr int split_sums_bytes(int columns_per_tile, int splits) {
  return most_parts(splits) * splits * kWgmmaRows * (columns_per_tile / kSplitParts) * 4;
}

// The tiles of y. Column tiles run fastest within a panel: their weights are read together, and its activations stay in the L2
// cache.
constexpr int kPanelShift = 3;
struct TileOrder {
  int row_tiles, column_tiles, panel_shift;  // 2^panel_shift column tiles are a panel
  // Divisors' reciprocals, 2^32 / d rounded up: n / d by one multiplication is exact while n d < 2^32, and at most one too large
  // after that. A division would cost hundreds of cycles.
  std::uint32_t per_panel = 0, per_width = 0;  // of a panel's tiles; of the width of the last panel, 0: it is 1

  TileOrder() = default;
  constexpr TileOrder(int row_tiles, int column_tiles, int panel_shift = kPanelShift)
      : row_tiles(row_tiles), column_tiles(column_tiles), panel_shift(panel_shift) {
    const int last = ((column_tiles - 1) & ((1 << panel_shift) - 1)) + 1;
    per_panel = reciprocal(row_tiles << panel_shift);
    if (last > 1) per_width = reciprocal(last);
  }
  static constexpr std::uint32_t reciprocal(int d) {
    return static_cast<std::uint32_t>(((std::uint64_t{1} << 32) + static_cast<std::uint64_t>(d) - 1) /
                                      static_cast<std::uint64_t>(d));
  }
  PVQ_HOST_DEVICE static int multiply_high(int a, std::uint32_t b) {
    return static_cast<int>(static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) * b >> 32);
  }

  PVQ_HOST_DEVICE int tiles() const { return row_tiles * column_tiles; }
  PVQ_HOST_DEVICE void place(int tile, int& row_tile, int& column_tile) const {
    int panel = multiply_high(tile, per_panel);
    if ((panel * row_tiles) << panel_shift > tile) --panel;
    const int first = panel << panel_shift, local = tile - first * row_tiles;
    const bool full = column_tiles - first >= 1 << panel_shift;
    const int width = full ? 1 << panel_shift : column_tiles - first;
    row_tile = full ? local >> panel_shift : per_width == 0 ? local : multiply_high(local, per_width);
    column_tile = first + local - row_tile * width;
  }
};

struct WgmmaSchedule {
  int columns_per_tile, splits;
  TileOrder order;
  int workers;
  int stages, stage_bytes;
  int area_stride;                                 // bytes of a warpgroup in the area
  int shared_gains;                                // kSharedGains: LOP3 takes it from a register, but not as a second immediate
  int shared_digits, shared_stages, shared_bytes;  // two addresses; dynamic shared memory
};

// What choose_wgmma_schedule looks at.
struct WgmmaProblem {
  int table_bytes;  // digits of the codebook, a power of two or 0
  std::int64_t rows, num_columns, num_chunks;
  int max_shared_bytes;
  int resident[kWgmmaMaxSplits + 1] = {};  // clusters of 1, 2, ... CTAs that run at a time; [0] is not used
};

// The fastest by a model of cycles (wgmma_schedule.cpp), and these.
struct WgmmaChoice {
  WgmmaSchedule schedule;
  double cycles;
};
WgmmaChoice choose_wgmma_schedule(const WgmmaProblem& problem);

}  // namespace pvq::cuda
