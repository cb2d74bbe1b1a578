// SPDX-License-Identifier: Apache-2.0
// For each problem on the standard input, "rows columns chunks partial_elements resident_1 resident_2 resident_3", what
// wgmma_schedule.h makes of it: "columns_per_tile splits tiles workers whole_tiles", then a line for each piece, "worker tile begin
// end", then an empty line.
#include <cstdio>

#include "wgmma_schedule.h"

int main() {
  using namespace pvq::cuda;
  WgmmaProblem problem{32768, 0, 0, 0, 232448, 0, 4096, {}};
  long long rows, columns, chunks, partial;
  int* resident = problem.resident;
  while (std::scanf("%lld %lld %lld %lld %d %d %d", &rows, &columns, &chunks, &partial, resident + 1, resident + 2, resident + 3) == 7) {
    problem.rows = rows;
    problem.num_columns = columns;
    problem.num_chunks = chunks;
    problem.partial_elements = partial;
    const WgmmaSchedule s = choose_wgmma_schedule(problem);
    std::printf("%d %d %d %d %d\n", s.columns_per_tile, s.splits, s.tiles(), s.workers, s.whole_tiles);
    for (int worker = 0; worker < s.workers; ++worker) {
      WgmmaPieces piece(s, worker);
      for (int begin, end; piece.next(s, worker, begin, end);) std::printf("%d %d %d %d\n", worker, piece.tile, begin, end);
    }
    std::printf("\n");
  }
}
