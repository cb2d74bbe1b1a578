// SPDX-License-Identifier: Apache-2.0
// Who does what in many_columns_wgmma: pure arithmetic, shared by the host and the kernel.
//
// A tile is kWgmmaRows rows by columns_per_tile columns of y. Where tiles are few, the CTAs of a cluster divide the chunks of
// one, at least one each, and add their sums up at the end. Else a worker is a CTA and takes whole tiles in turn; where that
// leaves many without work in the last round, the tiles of the last two are shared evenly: each worker has one stretch of their
// chunks, tile after tile, which may begin and end within a tile. It is as long as a tile or longer, so that two workers at most,
// which are neighbours, meet in a tile (wgmma_join.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"

namespace pvq::cuda {

constexpr int kWgmmaRows = 128;  // 64 for each warpgroup that multiplies
constexpr int kWgmmaMaxStages = 8;
constexpr int kWgmmaMaxSplits = 3;
constexpr int kPanelTiles = 8;  // column tiles that are walked together: the activations of 2048 columns stay in the L2 cache
constexpr int kSnap = 1;        // chunks, see WgmmaSchedule::stretch
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
// The sums of a tile: what a CTA of a split tile leaves for the others of its cluster, in the place of its stages.
constexpr int tile_sums_bytes(int columns_per_tile) { return kWgmmaRows * columns_per_tile * 4; }

// Which row tile and column tile. Column tiles run fastest within a panel: their weights are read together.
constexpr void place_tile(int tile, int row_tiles, int column_tiles, int& row_tile, int& column_tile) {
  const int panel = tile / (kPanelTiles * row_tiles), first = panel * kPanelTiles;
  const int width = column_tiles - first < kPanelTiles ? column_tiles - first : kPanelTiles;
  const int local = tile - first * row_tiles;
  row_tile = local / width;
  column_tile = first + local % width;
}

struct WgmmaSchedule {
  int columns_per_tile, splits;  // splits: CTAs of a worker
  int row_tiles, column_tiles, num_chunks, workers;
  int whole_tiles;  // a worker has those at worker, worker + workers, ...; the others are shared
  int stages, stage_bytes;
  int area_stride;                                 // bytes of a warpgroup in the area
  int shared_gains;                                // kSharedGains: LOP3 takes it from a register, but not as a second immediate
  int shared_digits, shared_stages, shared_bytes;  // two addresses; dynamic shared memory

  constexpr int tiles() const { return row_tiles * column_tiles; }

  constexpr void place(int tile, int& row_tile, int& column_tile) const {
    place_tile(tile, row_tiles, column_tiles, row_tile, column_tile);
  }

  // Where the stretch of a worker begins, and the one before it ends: in chunks from the first shared tile. Not near the edges of
  // a tile, because every piece of one costs something.
  constexpr int stretch(int worker) const {
    const int at = (tiles() - whole_tiles) * num_chunks * worker / workers, inside = at % num_chunks;
    if (inside <= kSnap) return at - inside;
    return num_chunks - inside <= kSnap ? at + num_chunks - inside : at;
  }
};

// What a worker does, piece by piece. (Registers are short: what can be computed again is not kept.)
struct WgmmaPieces {
  int tile;
  int at = -1;  // where the stretch goes on, once it has begun

  PVQ_HOST_DEVICE WgmmaPieces(const WgmmaSchedule& s, int worker) : tile(worker - s.workers) {}

  // Goes to the next one: chunks [begin, end) of `tile`. False: there is none.
  PVQ_HOST_DEVICE bool next(const WgmmaSchedule& s, int worker, int& begin, int& end) {
    begin = 0;
    end = s.num_chunks;
    if (tile + s.workers < s.whole_tiles) {
      tile += s.workers;
      return true;
    }
    if (s.whole_tiles == s.tiles()) return false;
    if (at < 0) at = s.stretch(worker);
    const int until = s.stretch(worker + 1);
    if (at >= until) return false;
    const int shared_tile = at / s.num_chunks, start = shared_tile * s.num_chunks;
    tile = s.whole_tiles + shared_tile;
    begin = at - start;
    if (until - start < end) end = until - start;
    at = start + end;
    return true;
  }
};

// What choose_wgmma_schedule looks at.
struct WgmmaProblem {
  int table_bytes;  // digits of the codebook, a power of two or 0
  std::int64_t rows, num_columns, num_chunks;
  int max_shared_bytes;
  std::int64_t partial_elements;           // of Scratch
  int counters;                            // likewise
  int resident[kWgmmaMaxSplits + 1] = {};  // clusters of 1, 2, ... CTAs that run at a time; [0] is not used
};

// The fastest by a model of cycles (wgmma_schedule.cpp).
WgmmaSchedule choose_wgmma_schedule(const WgmmaProblem& problem);

}  // namespace pvq::cuda
