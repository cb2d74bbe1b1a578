// SPDX-License-Identifier: Apache-2.0
// Tiles that two workers share (wgmma_schedule.h): the first one to have its sums leaves them in global memory and goes on, the
// other one adds them to its own. Nobody waits, so it does not matter which workers run at the same time.
#pragma once

#include <cuda_runtime.h>

#include "hopper.cuh"
#include "wgmma_finish.cuh"

namespace pvq::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A piece of a tile, for all `threads` of the warpgroups that multiply. `other`: where its other worker is, -1 or 1.
template <int kN>
class WgmmaJoin {
 public:
  __device__ __forceinline__ WgmmaJoin(const WgmmaArguments& p, int tile, int worker, int other, int barrier, int threads)
      : barrier_(barrier), threads_(threads) {
    counter_ = p.scratch.counters + (tile - p.schedule.whole_tiles);
    int4* partial = reinterpret_cast<int4*>(p.scratch.partial) + threadIdx.x / 128 * (kQuads * 128) + threadIdx.x % 128;
    own_ = partial + slot(worker, other);
    others_ = partial + slot(worker + other, -other);
  }

  // To `sums`. False: the other worker's are not there yet, and these have been left for it.
  __device__ __forceinline__ bool add_others(std::int32_t (&sums)[kN / 2]) const {
    if (!comes_last()) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        __stcg(own_ + q * 128, make_int4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]));
      if (!arrive()) return false;
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int4 v = __ldcg(others_ + q * 128);
      sums[4 * q] += v.x;
      sums[4 * q + 1] += v.y;
      sums[4 * q + 2] += v.z;
      sums[4 * q + 3] += v.w;
    }
    return true;
  }

 private:
  static constexpr int kQuads = kN / 8;

  // A worker has two pieces to leave at most, one with each neighbour.
  __device__ __forceinline__ static std::int64_t slot(int worker, int other) {
    return static_cast<std::int64_t>(2 * worker + (other > 0 ? 1 : 0)) * (tile_sums_bytes(kN) / 16);
  }

  // Whether the other worker has left its sums.
  __device__ __forceinline__ bool comes_last() const {
    bool last = false;
    if (threadIdx.x == 0) {
      std::int32_t arrived;
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(counter_) : "memory");
      last = is_last(arrived);
    }
    __syncwarp();
    return any_thread(barrier_, threads_, last);
  }

  // Own sums have been left; whether the other worker had done so before.
  __device__ __forceinline__ bool arrive() const {
    __threadfence();
    synchronize_threads(barrier_, threads_);
    bool last = false;
    if (threadIdx.x == 0) {
      std::int32_t arrived;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter_) : "memory");
      last = is_last(arrived);
    }
    __syncwarp();
    return any_thread(barrier_, threads_, last);
  }

  // The counter is zero before and after every launch.
  __device__ __forceinline__ bool is_last(std::int32_t arrived) const {
    if (arrived == 1) *counter_ = 0;
    return arrived == 1;
  }

  int barrier_, threads_;
  std::int32_t* counter_;
  int4 *own_, *others_;
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
