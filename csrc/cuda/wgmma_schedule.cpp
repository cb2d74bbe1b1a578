// SPDX-License-Identifier: Apache-2.0
#include "wgmma_schedule.h"

#include <stdexcept>

namespace pvq::cuda {
namespace {

constexpr int kColumns[] = {16, 32, 64, 128, 256};

int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Cycles of a multiprocessor for one unit: every warpgroup decodes and multiplies a chunk. Shared memory moves 128 bytes a cycle;
// per step of 64 x 32 weights: gathers of the tables (with conflicts about 11 cycles a warp), packed weights in and out, B once
// out for each warpgroup, and in, shared by the row groups. The L2 cache gives a multiprocessor about 32 bytes a cycle.
double unit_cycles(CodebookId codebook, const WgmmaSchedule& s) {
  const int n = s.columns_per_tile, groups = wgmma_groups(n);
  const double gathers = codebook == CodebookId::kInt8 ? 0 : 44;
  const double weights = 4.0 * chunk_bytes(codebook) / kSteps / 128;
  const double b = n * 32 / 128.0;
  const double step = std::max(n / 2.0, gathers + 2 * weights + b + b / s.row_groups());
  const double fetched = s.stage_bytes - (wgmma_cluster(n) - 1.0) / wgmma_cluster(n) * s.k_groups * n * kChunkColumns;
  return std::max(groups * kSteps * step, fetched / 32);
}

// From a tile's last product to the next tile's first.
double tile_cycles(const WgmmaSchedule& s) { return 700 + 8.0 * s.columns_per_tile + (s.k_groups > 1 ? 500 : 0); }

double rest_cycles(const WgmmaSchedule& s, double unit) {
  if (s.rest_tiles == 0) return 0;
  const double cycles = ceil_div(s.rest_units(), s.rest_workers) * unit + tile_cycles(s);
  if (s.rest_workers == s.rest_tiles) return cycles;
  // Out to scratch, a counter, and one CTA reads all the others.
  const int contributors = ceil_div(s.rest_workers, s.rest_tiles) + (s.rest_workers % s.rest_tiles != 0);
  return cycles + 3000 + contributors * (600 + s.row_groups() * s.columns_per_tile * 256 / 40.0);
}

// Shared memory, with as many stages as there is room for.
void lay_out(const WgmmaProblem& problem, WgmmaSchedule& s) {
  const int n = s.columns_per_tile, groups = wgmma_groups(n);
  s.stage_bytes = s.k_groups * n * kChunkColumns + groups * 4 * chunk_bytes(problem.codebook);
  s.area_stride = std::max(staged_columns(n) * kStagedColumnBytes + n * 8, (s.k_groups - 1) * kExchangeBytes);
  s.shared_gains = kSharedGains;
  s.shared_digits = static_cast<int>(round_up(kSharedArea + s.row_groups() * s.area_stride, std::max(problem.table_bytes, 1024)));
  s.shared_stages = s.shared_digits + problem.table_bytes;
  s.stages = std::min((kSharedBase + problem.max_shared_bytes - s.shared_stages) / s.stage_bytes, kWgmmaMaxStages);
  s.shared_bytes = s.shared_stages + s.stages * s.stage_bytes - kSharedBase;
}

bool fits(const WgmmaProblem& problem, const WgmmaSchedule& s) {
  if (s.rest_workers == s.rest_tiles) return true;
  return s.num_slots() * s.slot_elements() <= problem.partial_elements &&
         s.rest_tiles * s.tile_row_groups() <= problem.num_counters;
}

}  // namespace

WgmmaSchedule choose_wgmma_schedule(const WgmmaProblem& problem) {
  WgmmaSchedule best{};
  double best_cycles = -1;
  for (int n : kColumns) {
    if (problem.columns_per_tile != 0) {
      if (n != problem.columns_per_tile) continue;
    } else {
      if (n >= 2 * problem.num_columns && n > kColumns[0]) continue;  // half of it or more is empty
      if (n * 8 < problem.num_columns && n < 256) continue;           // decodes too often
    }
    const int cluster = wgmma_cluster(n);
    for (int k = 1; k <= (cluster > 1 ? 1 : wgmma_groups(n)); k *= 2) {
      if (problem.k_groups != 0 && k != problem.k_groups) continue;
      WgmmaSchedule s{};
      s.columns_per_tile = n;
      s.k_groups = k;
      while ((k << s.row_shift) < wgmma_groups(n)) ++s.row_shift;
      lay_out(problem, s);
      if (s.stages < (problem.k_groups != 0 ? 2 : 3)) continue;  // a stage is free only when the next one has been decoded
      s.row_tiles = ceil_div(problem.rows, 64 * s.tile_row_groups());
      s.column_tiles = ceil_div(problem.num_columns, n);
      s.units = ceil_div(problem.num_chunks, k);
      const int tiles = s.row_tiles * s.column_tiles, capacity = std::max(problem.num_sms / cluster, 1);
      const double unit = unit_cycles(problem.codebook, s);
      s.whole_rounds = tiles / capacity;
      s.rest_tiles = tiles % capacity;
      constexpr int kMaxSplit = 16;
      for (int split = 1; split <= kMaxSplit; ++split) {  // the last attempt: a worker on every multiprocessor
        s.rest_workers = std::min(split == kMaxSplit ? capacity : s.rest_tiles * split, std::min(capacity, s.rest_units()));
        if (!fits(problem, s)) continue;
        s.workers = s.whole_rounds > 0 ? capacity : s.rest_workers;
        const double cycles = s.whole_rounds * (s.units * unit + tile_cycles(s)) + rest_cycles(s, unit);
        if (best_cycles < 0 || cycles < best_cycles) {
          best = s;
          best_cycles = cycles;
        }
      }
    }
  }
  if (best_cycles < 0) throw std::runtime_error("many_columns_wgmma: no tile fits the shared memory of this GPU");
  return best;
}

}  // namespace pvq::cuda
