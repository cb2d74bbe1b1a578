// SPDX-License-Identifier: Apache-2.0
// What a CTA of many_columns_wgmma.cuh does, and its barriers.
#pragma once

#include "decode.cuh"
#include "hopper.cuh"
#include "wgmma_schedule.h"

namespace pvq::cuda {

constexpr int kWgmmaGroups = 2;  // warpgroups that multiply

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses in shared memory.
constexpr int kTableBarrier = kSharedBase, kFullBarriers = kSharedBase + 16, kEmptyBarriers = kFullBarriers + 8 * kWgmmaMaxStages;
constexpr int kPartBarriers = kEmptyBarriers + 8 * kWgmmaMaxStages;  // of sums from other CTAs (wgmma_split.cuh)
// Of a warpgroup's area: it holds what the tile needs; it can be filled again.
constexpr int kReadyBarriers = kPartBarriers + 8 * kSplitParts, kFreeBarriers = kReadyBarriers + 8 * kWgmmaGroups;
static_assert(kFreeBarriers + 8 * kWgmmaGroups <= kSharedGains && kSharedGains % 64 == 0 &&
              kSharedGains + kGainTableBytes <= kSharedArea);

constexpr int kWarpgroupBarrier = 1;  // named, one for each warpgroup that multiplies; 0 is __syncthreads

// What a CTA does: its share of the tiles first, first + stride, ...
struct WgmmaWork : WgmmaShare {
  int first, stride, rank;
  std::uint32_t window;  // where this CTA's shared memory starts

  __device__ __forceinline__ WgmmaWork(const WgmmaSchedule& s, int rank, int splits, int num_chunks, std::uint32_t window)
      : WgmmaShare(rank, splits, num_chunks),
        first(static_cast<int>(blockIdx.x) / splits),
        stride(s.workers),
        rank(rank),
        window(window) {}
  __device__ __forceinline__ int units(const WgmmaSchedule& s) const {
    return ((s.order.tiles() - 1 - first) / stride + 1) * (end - begin) + middle;
  }

  __device__ __forceinline__ std::uint32_t full(int stage) const { return window + kFullBarriers + 8 * stage; }
  __device__ __forceinline__ std::uint32_t empty(int stage) const { return window + kEmptyBarriers + 8 * stage; }
  __device__ __forceinline__ std::uint32_t ready(int warpgroup) const { return window + kReadyBarriers + 8 * warpgroup; }
  __device__ __forceinline__ std::uint32_t free(int warpgroup) const { return window + kFreeBarriers + 8 * warpgroup; }
  __device__ __forceinline__ std::uint32_t part(int part) const { return window + kPartBarriers + 8 * part; }
  __device__ __forceinline__ std::uint32_t stage(const WgmmaSchedule& s, int stage) const {
    return window + s.shared_stages + stage * s.stage_bytes;
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
