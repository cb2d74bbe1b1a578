// SPDX-License-Identifier: Apache-2.0
// Who does what in many_columns_wgmma: pure arithmetic, shared by the host, the kernel and tests.
//
// A tile is some rows by columns_per_tile columns of y; the kernel walks its reduction in units of k_groups chunks. A worker is a
// CTA (two in a cluster for 256 columns). Whole tiles go round robin: worker w has the tiles w, w + workers, ... of whole_rounds
// rounds. The units of the rest_tiles left, one after another, are cut into rest_workers equal ranges; a tile that the end of a
// range cuts is summed in scratch memory. rest_workers == rest_tiles cuts none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"

namespace pvq::cuda {

constexpr int wgmma_cluster(int columns_per_tile) { return columns_per_tile == 256 ? 2 : 1; }
// Warpgroups that multiply: as many as their accumulators leave room for; decoding wants many.
constexpr int wgmma_groups(int columns_per_tile) { return columns_per_tile == 256 ? 2 : 4; }

constexpr int kWgmmaMaxStages = 12;
constexpr int kPanelTiles = 8;  // column tiles that are walked together: the activations of 2048 columns stay in the L2 cache
constexpr int kStagedColumnBytes = 144;  // 64 results of 16 bits, and 16 bytes that spread the banks
constexpr int kExchangeBytes = 8192;     // 16 sums of a warpgroup's threads

// Shared memory by address. The first kilobyte belongs to the system, then: barriers, gains, the area of the epilogue, the
// digits, aligned to their size (decode.cuh), and the stages, aligned to 1024 bytes.
constexpr int kSharedBase = 1024;
constexpr int kSharedGains = kSharedBase + 512;
constexpr int kSharedArea = kSharedBase + 1024;

constexpr int staged_columns(int columns_per_tile) {
  return columns_per_tile >= 256 ? 64 : columns_per_tile < 32 ? columns_per_tile : 32;
}

// Which row tile and column tile. Column tiles run fastest within a panel: their weights are read together.
constexpr void place_tile(int tile, int row_tiles, int column_tiles, int& row_tile, int& column_tile) {
  const int panel = tile / (kPanelTiles * row_tiles), first = panel * kPanelTiles;
  const int width = column_tiles - first < kPanelTiles ? column_tiles - first : kPanelTiles;
  const int local = tile - first * row_tiles;
  row_tile = local / width;
  column_tile = first + local % width;
}

struct WgmmaSchedule {
  int columns_per_tile, k_groups;  // k_groups: 1, 2, 4 warpgroups share rows and divide the chunks of a unit
  int row_shift;                   // 1 << row_shift groups of 64 rows in a CTA
  int row_tiles, column_tiles, units;
  int workers, whole_rounds, rest_tiles, rest_workers;
  int stages, stage_bytes;
  int area_stride;                                 // bytes of a row group in the area
  int shared_gains;                                // kSharedGains: LOP3 takes it from a register, but not as a second immediate
  int shared_digits, shared_stages, shared_bytes;  // two addresses; dynamic shared memory

  constexpr int row_groups() const { return 1 << row_shift; }
  constexpr int tile_row_groups() const { return wgmma_cluster(columns_per_tile) << row_shift; }
  constexpr int rest_units() const { return rest_tiles * units; }

  constexpr void place(int tile, int& row_tile, int& column_tile) const {
    place_tile(tile, row_tiles, column_tiles, row_tile, column_tile);
  }

  // First unit of a worker's range in the rest, and the worker whose range has a unit. (Below 2^31: there are fewer rest tiles
  // than multiprocessors, and at most 512 units in a tile.)
  constexpr int range_begin(int worker) const { return rest_units() * worker / rest_workers; }
  constexpr int worker_of(int unit) const { return ((unit + 1) * rest_workers - 1) / rest_units(); }

  // Sums of (worker, rest tile) meet in slot worker + rest_tile: no two pairs that occur share one.
  constexpr int num_slots() const { return rest_workers + rest_tiles - 1; }
  constexpr std::int64_t slot_elements() const { return std::int64_t{64} * tile_row_groups() * columns_per_tile; }
};

struct WgmmaPiece {  // units [begin, end) of a tile
  int tile, begin, end;
};

// The pieces of a worker, one after another. Little state: it stays in registers while a tile is multiplied.
class WgmmaWalk {
 public:
  constexpr explicit WgmmaWalk(int worker) : worker_(worker) {}
  constexpr bool next(const WgmmaSchedule& s, WgmmaPiece& piece) {
    const int cut = index_++ - s.whole_rounds;
    if (cut < 0) {
      piece = {(cut + s.whole_rounds) * s.workers + worker_, 0, s.units};
      return true;
    }
    if (worker_ >= s.rest_workers) return false;
    // A range is no longer than a tile: it is in one tile, or in two.
    const int begin = s.range_begin(worker_), end = s.range_begin(worker_ + 1);
    const int tile = begin / s.units + cut, first = tile * s.units;
    if (first >= end) return false;
    piece = {s.whole_rounds * s.workers + tile, cut == 0 ? begin - first : 0, end - first < s.units ? end - first : s.units};
    return true;
  }

 private:
  int worker_, index_ = 0;
};

// What choose_wgmma_schedule looks at.
struct WgmmaProblem {
  CodebookId codebook;
  int table_bytes;  // digits of the codebook, a power of two or 0
  std::int64_t rows, num_columns, num_chunks;
  int num_sms, max_shared_bytes;
  std::int64_t partial_elements;  // room for sums that meet, and
  int num_counters;
  int columns_per_tile = 0, k_groups = 0;  // the only ones to consider, for tests; 0: all
};

// The fastest by a model of cycles (wgmma_schedule.cpp).
WgmmaSchedule choose_wgmma_schedule(const WgmmaProblem& problem);

}  // namespace pvq::cuda
