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
constexpr int kPanelTiles = 8;  // column tiles that are walked together: the activations of 2048 columns stay in the L2 cache
constexpr int kStagedColumnBytes = 144;  // 64 results of 16 bits, and 16 bytes that spread the banks

// Shared memory by address. The first kilobyte belongs to the system, then: barriers, gains, the area of the epilogue, the
// digits, aligned to their size (decode.cuh), and the stages, aligned to 1024 bytes.
constexpr int kSharedBase = 1024;
constexpr int kSharedGains = kSharedBase + 512;
constexpr int kSharedArea = kSharedBase + 1024;

// Of a tile, or of the part of one that a CTA finishes (wgmma_finish.cuh).
constexpr int staged_columns(int columns) { return columns >= 256 ? 64 : columns < 32 ? columns : 32; }
constexpr int finish_area_bytes(int columns_per_tile) {  // of a warpgroup
  return staged_columns(columns_per_tile) * kStagedColumnBytes + columns_per_tile * 8;
}
// What a CTA of a split tile leaves for the others of its cluster, in the place of its stages.
constexpr int split_sums_bytes(int columns_per_tile) { return kWgmmaRows * columns_per_tile * 4; }

// Which row tile and column tile. Column tiles run fastest within a panel: their weights are read together.
constexpr void place_tile(int tile, int row_tiles, int column_tiles, int& row_tile, int& column_tile) {
  const int panel = tile / (kPanelTiles * row_tiles), first = panel * kPanelTiles;
  const int width = column_tiles - first < kPanelTiles ? column_tiles - first : kPanelTiles;
  const int local = tile - first * row_tiles;
  row_tile = local / width;
  column_tile = first + local % width;
}

struct WgmmaSchedule {
  int columns_per_tile, splits;
  int row_tiles, column_tiles, workers;
  int stages, stage_bytes;
  int area_stride;                                 // bytes of a warpgroup in the area
  int shared_gains;                                // kSharedGains: LOP3 takes it from a register, but not as a second immediate
  int shared_digits, shared_stages, shared_bytes;  // two addresses; dynamic shared memory

  constexpr int tiles() const { return row_tiles * column_tiles; }

  constexpr void place(int tile, int& row_tile, int& column_tile) const {
    place_tile(tile, row_tiles, column_tiles, row_tile, column_tile);
  }
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
