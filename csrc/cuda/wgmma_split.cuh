// SPDX-License-Identifier: Apache-2.0
// The epilogue of many_columns_wgmma.cuh where the CTAs of a cluster have divided the chunks of a tile.
#pragma once

#include "hopper.cuh"
#include "wgmma_finish.cuh"
#include "wgmma_work.cuh"

namespace pvq::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Sums of a thread go by fours, 2048 bytes apart: those of a warpgroup's 128 threads.
constexpr int kQuadBytes = 2048;
__device__ __forceinline__ int4 quad_of(const std::int32_t* sums, int q) {
  return make_int4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
}
template <int kQuads>
__device__ __forceinline__ void add_quads(std::uint32_t from, std::int32_t (&total)[4 * kQuads]) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int4 v = shared_quad(from + q * kQuadBytes);
    total[4 * q] += v.x;
    total[4 * q + 1] += v.y;
    total[4 * q + 2] += v.z;
    total[4 * q + 3] += v.w;
  }
}

// Two CTAs. The warpgroup that has fewer chunks to multiply sends its sums; the other one adds them to its own and finishes.

constexpr int kPairPartBytes = 64 * kStagedColumns * 4;  // of a slice of columns, which has a barrier
// By a thread, before the CTAs synchronize.
template <int kN>
__device__ __forceinline__ void expect_pair(const WgmmaWork& work) {
  for (int slice = 0; slice < kN / kStagedColumns; ++slice) expect_bytes(work.part(slice), kPairPartBytes);
}

// A warpgroup.
template <int kN>
__device__ __forceinline__ void finish_pair(const WgmmaArguments& p, const WgmmaWork& work, const FinishArea<kN>& area,
                                            int warpgroup, int thread, const std::int32_t (&acc)[kN / 2], int first_row,
                                            int first_column) {
  constexpr int kSlices = kN / kStagedColumns, kQuads = kStagedColumns / 8;
  static_assert(kSlices <= kSplitParts);
  if (first_row >= p.weight.rows) return;
  const std::uint32_t sums = work.window + p.schedule.shared_sums + thread * 16;
  const int slices = min(kSlices, ceil_div(static_cast<int>(p.a.num_columns()) - first_column, kStagedColumns));  // that exist
  if (warpgroup != work.rank) {
    const int owner = 1 - work.rank;
    const std::uint32_t remote = address_in(sums, owner), barrier = address_in(work.part(0), owner);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice >= slices) break;
#pragma unroll
      for (int q = slice * kQuads; q < (slice + 1) * kQuads; ++q)
        send(remote + q * kQuadBytes, quad_of(acc, q), barrier + 8 * slice);
    }
    return;
  }
  wait_barrier(work.ready(warpgroup), 0);
  using Finish = WgmmaFinish<kStagedColumns, kN>;
  Finish(p, area, first_row, first_column, 0, thread, kWarpgroupBarrier + warpgroup)
      .template store<kSlices>(kSlices, [&](int slice, typename Finish::Sums& total) {
        if (slice < slices) wait_barrier(work.part(slice), 0);
#pragma unroll
        for (int i = 0; i < Finish::kSums; ++i) total[i] = acc[slice * Finish::kSums + i];
        add_quads<kQuads>(sums + slice * kQuads * kQuadBytes, total);
      });
}

// Three CTAs send each other their sums, and each adds up and finishes its parts of the columns. A warpgroup.
template <int kN>
__device__ __forceinline__ void finish_three(const WgmmaArguments& p, const WgmmaWork& work, const FinishArea<kN>& area,
                                             int warpgroup, int thread, const std::int32_t (&acc)[kN / 2], int first_row,
                                             int first_column) {
  constexpr int kPart = kN / kSplitParts, kQuads = kPart / 8,
                kBytes = kQuads * kQuadBytes;               // of a part: of a CTA and a warpgroup
  static_assert(kMostParts * kWgmmaGroups <= kSplitParts);  // barriers
  const int first = first_part(work.rank);
  const int parts = min(kSplitParts, ceil_div(static_cast<int>(p.a.num_columns()) - first_column, kPart));  // that exist
  wait_barrier(work.ready(warpgroup), 0);
  synchronize_cluster();  // all stages have been read
  if (first_row >= p.weight.rows) return;
  const std::uint32_t sums = work.window + p.schedule.shared_sums + thread * 16;
  const auto place = [&](int part, int rank) { return ((part * kWgmmaGroups + warpgroup) * 3 + rank) * kBytes; };
  const auto barrier = [&](int part) { return work.part(part * kWgmmaGroups + warpgroup); };
#pragma unroll
  for (int part = 0; part < kSplitParts; ++part) {
    if (part >= parts) break;
    const int owner = (part >= first_part(1)) + (part >= first_part(2)), local = part - first_part(owner);
    const std::uint32_t to = sums + place(local, work.rank);
    const std::int32_t* v = acc + part * (kPart / 2);
    if (owner == work.rank) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) store_shared(to + q * kQuadBytes, quad_of(v, q));
    } else {
      const std::uint32_t remote = address_in(to, owner), remote_barrier = address_in(barrier(local), owner);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) send(remote + q * kQuadBytes, quad_of(v, q), remote_barrier);
    }
  }
  const int mine = min(first_part(work.rank + 1), parts) - first;
  if (mine <= 0) return;
  using Finish = WgmmaFinish<kPart, kN>;
  Finish(p, area, first_row, first_column, first * kPart, thread, kWarpgroupBarrier + warpgroup)
      .template store<1>(mine, [&](int part, typename Finish::Sums& total) {
        if (thread == 0) expect_bytes(barrier(part), 2 * kBytes);
        wait_barrier(barrier(part), 0);
#pragma unroll
        for (int i = 0; i < Finish::kSums; ++i) total[i] = 0;
        for (int rank = 0; rank < 3; ++rank) add_quads<kQuads>(sums + place(part, rank), total);
      });
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
