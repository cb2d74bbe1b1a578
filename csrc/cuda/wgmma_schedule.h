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
constexpr int kWgmmaAhead = 4;  // chunks that a warp has begun to fetch beyond the one that it multiplies, at most

// Chunks of a tile that a CTA multiplies: [begin, end), and for the rows of the warpgroup whose number is its rank the middle's.
// Two CTAs each finish the rows of one warpgroup: their middle is multiplied while the other CTA's sums are on their way.
constexpr int kMiddleChunks = 2;
constexpr int middle_chunks(int splits) { return splits == 2 ? kMiddleChunks : 0; }
struct WgmmaShare {
  int begin, end, middle, middle_begin;
  PVQ_HOST_DEVICE WgmmaShare(int rank, int splits, int num_chunks)
      : middle(middle_chunks(splits)), middle_begin((num_chunks - middle) / 2) {
    const int divided = num_chunks - middle;
    begin = divided * rank / splits + rank * middle;
    end = divided * (rank + 1) / splits + rank * middle;
  }
  PVQ_HOST_DEVICE int chunks(bool has_middle) const { return end - begin + (has_middle ? middle : 0); }
};
// Where the other's sums come to.
constexpr int pair_sums_bytes(int columns_per_tile) { return kWgmmaRows / 2 * columns_per_tile * 4; }
// Three: each finishes consecutive parts of the columns, first_part(rank) up to the next CTA's. The sums of all three for them
// take the place of its stages.
constexpr int kSplitParts = 8;
constexpr int first_part(int rank) { return kSplitParts * rank / 3; }
constexpr int kMostParts = (kSplitParts + 2) / 3;
constexpr int three_sums_bytes(int columns_per_tile) {
  return kMostParts * 3 * kWgmmaRows * (columns_per_tile / kSplitParts) * 4;
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
  int area_stride;   // bytes of a warpgroup in the area
  int shared_gains;  // kSharedGains: LOP3 takes it from a register, but not as a second immediate
  int shared_digits, shared_sums, shared_stages, shared_bytes;  // three addresses; dynamic shared memory
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

// Where the last round of tiles leaves most of the device idle, its rows may be a launch of their own, whose clusters divide the
// chunks.
struct WgmmaLaunches {
  std::int64_t rows;        // of the first one
  WgmmaChoice first, rest;  // rest: if there are more rows
  double cycles;            // of both
};
WgmmaLaunches choose_wgmma_launches(const WgmmaProblem& problem);

}  // namespace pvq::cuda
