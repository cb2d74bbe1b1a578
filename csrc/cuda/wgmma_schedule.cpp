// SPDX-License-Identifier: Apache-2.0
#include "wgmma_schedule.h"

#include <stdexcept>

namespace pvq::cuda {
namespace {

constexpr int kColumns[] = {128, 256};

// Cycles of a CTA, by which measurements on an H100 rank: a chunk of 128 x 128 weights, and what a tile costs besides, more where
// CTAs add their sums up. prefill_pays() compares them with its own.
double chunk_cycles(int columns) { return columns == 256 ? 1240 : 1000; }
double tile_cycles(int columns, int splits) { return splits > 1 ? 3700 + 22.0 * columns : 16.0 * columns; }

// Shared memory, with as many stages as there is room for.
void lay_out(const WgmmaProblem& problem, WgmmaSchedule& s) {
  const int n = s.columns_per_tile;
  s.stage_bytes = n * kChunkColumns;
  s.area_stride = finish_area_bytes(n);
  s.shared_gains = kSharedGains;
  s.shared_digits = static_cast<int>(round_up(kSharedArea + 2 * s.area_stride, std::max(problem.table_bytes, 1024)));
  s.shared_stages = static_cast<int>(round_up(s.shared_digits + problem.table_bytes, 1024));
  s.stages = std::min((kSharedBase + problem.max_shared_bytes - s.shared_stages) / s.stage_bytes, kWgmmaMaxStages);
  s.shared_bytes = s.shared_stages + s.stages * s.stage_bytes - kSharedBase;
}

}  // namespace

WgmmaChoice choose_wgmma_schedule(const WgmmaProblem& problem) {
  WgmmaChoice best{{}, -1};
  for (int n : kColumns) {
    for (int splits = 1; splits <= kWgmmaMaxSplits; ++splits) {
      if (splits > problem.num_chunks) break;
      WgmmaSchedule s{};
      s.columns_per_tile = n;
      s.splits = splits;
      lay_out(problem, s);
      if (s.stages < 2 || problem.resident[splits] < 1) continue;
      if (splits > 1 && s.stages * s.stage_bytes < split_sums_bytes(n, splits)) continue;
      s.order = TileOrder(ceil_div(problem.rows, kWgmmaRows), ceil_div(problem.num_columns, n));
      const int rounds = ceil_div(s.order.tiles(), problem.resident[splits]);
      s.workers = splits > 1 ? s.order.tiles() : std::min(s.order.tiles(), problem.resident[splits]);
      const double cycles = rounds * (ceil_div(problem.num_chunks, splits) * chunk_cycles(n) + tile_cycles(n, splits));
      if (best.cycles < 0 || cycles < best.cycles) best = {s, cycles};
    }
  }
  if (best.cycles < 0) throw std::runtime_error("many_columns_wgmma: no tile fits the shared memory of this GPU");
  return best;
}

}  // namespace pvq::cuda
