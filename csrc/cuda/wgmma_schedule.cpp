// SPDX-License-Identifier: Apache-2.0
#include "wgmma_schedule.h"

#include <stdexcept>

namespace pvq::cuda {
namespace {

constexpr int kColumns[] = {128, 256};

// Cycles of a CTA, by which measurements on an H100 rank: a chunk of 128 x 128 weights, and what a tile costs besides, more where
// CTAs add their sums up. prefill_pays() compares them with its own.
double chunk_cycles(int columns) { return columns == 256 ? 1240 : 1000; }
double tile_cycles(int columns, int splits) {
  return splits == 3 ? 3700 + 22.0 * columns : (splits == 2 ? 21.0 : 16.0) * columns;
}
constexpr double kStartCycles = 5500;   // of a CTA, but for the first ones, which start while activations are made
constexpr double kLaunchCycles = 8000;  // of a second launch

// Shared memory, with as many stages as there is room for.
void lay_out(const WgmmaProblem& problem, WgmmaSchedule& s) {
  const int n = s.columns_per_tile;
  s.stage_bytes = n * kChunkColumns;
  s.area_stride = finish_area_bytes(n);
  s.shared_gains = kSharedGains;
  s.shared_digits = static_cast<int>(round_up(kSharedArea + 2 * s.area_stride, std::max(problem.table_bytes, 1024)));
  s.shared_stages = static_cast<int>(round_up(s.shared_digits + problem.table_bytes, 1024));
  s.shared_sums = s.shared_stages;
  if (s.splits == 2) s.shared_stages += pair_sums_bytes(n);
  s.stages = std::min((kSharedBase + problem.max_shared_bytes - s.shared_stages) / s.stage_bytes, kWgmmaMaxStages);
  s.shared_bytes = s.shared_stages + s.stages * s.stage_bytes - kSharedBase;
}

// Of clusters of at most so many CTAs.
WgmmaChoice choose(const WgmmaProblem& problem, int most_splits) {
  WgmmaChoice best{{}, -1};
  for (int n : kColumns) {
    for (int splits = 1; splits <= most_splits; ++splits) {
      if (splits + middle_chunks(splits) > problem.num_chunks) continue;
      WgmmaSchedule s{};
      s.columns_per_tile = n;
      s.splits = splits;
      lay_out(problem, s);
      if (s.stages < 2 || problem.resident[splits] < 1) continue;
      if (splits == 3 && s.stages * s.stage_bytes < three_sums_bytes(n)) continue;
      s.order = TileOrder(ceil_div(problem.rows, kWgmmaRows), ceil_div(problem.num_columns, n));
      const int rounds = ceil_div(s.order.tiles(), problem.resident[splits]);
      // Weights are fetched ahead into the next tile, but not beyond it.
      const bool tile_each = splits > 1 || problem.num_chunks <= kWgmmaAhead;
      s.workers = tile_each ? s.order.tiles() : std::min(s.order.tiles(), problem.resident[splits]);
      const double cycles = rounds * (ceil_div(problem.num_chunks, splits) * chunk_cycles(n) + tile_cycles(n, splits)) +
                            (tile_each ? (rounds - 1) * kStartCycles : 0);
      if (best.cycles < 0 || cycles < best.cycles) best = {s, cycles};
    }
  }
  return best;
}

}  // namespace

WgmmaChoice choose_wgmma_schedule(const WgmmaProblem& problem) {
  const WgmmaChoice best = choose(problem, kWgmmaMaxSplits);
  if (best.cycles < 0) throw std::runtime_error("many_columns_wgmma: no tile fits the shared memory of this GPU");
  return best;
}

WgmmaLaunches choose_wgmma_launches(const WgmmaProblem& problem) {
  const WgmmaChoice all = choose_wgmma_schedule(problem), undivided = choose(problem, 1);
  if (undivided.cycles < 0) return {problem.rows, all, {}, all.cycles};
  const WgmmaSchedule& s = undivided.schedule;
  const int whole_rounds = s.order.tiles() / s.workers * s.workers;
  const std::int64_t first_rows = std::int64_t{whole_rounds / s.order.column_tiles} * kWgmmaRows;
  if (first_rows == 0 || first_rows >= problem.rows) return {problem.rows, all, {}, all.cycles};
  WgmmaProblem part = problem;
  part.rows = first_rows;
  const WgmmaChoice first = choose_wgmma_schedule(part);
  part.rows = problem.rows - first_rows;
  const WgmmaChoice rest = choose_wgmma_schedule(part);
  const double cycles = first.cycles + kLaunchCycles + rest.cycles;
  if (cycles >= all.cycles) return {problem.rows, all, {}, all.cycles};
  return {first_rows, first, rest, cycles};
}

}  // namespace pvq::cuda
