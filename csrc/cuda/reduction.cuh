// SPDX-License-Identifier: Apache-2.0
// What the threads that quantize a token add up: the largest magnitude, and the sums of its planes.
#pragma once

#include <cstdint>

namespace pvq::cuda {

struct GroupSums {  // shared memory of the reductions over a group of threads
  std::uint32_t largest[32];
  std::int32_t sums[2];
};

// The largest value of `num_threads` threads, whole warps; sync() is their barrier. warps: shared memory, a word for each warp; a
// barrier has to come before it is used again.
template <typename Sync>
__device__ __forceinline__ std::uint32_t largest_of_threads(std::uint32_t value, int thread, int num_threads,
                                                            std::uint32_t* warps, const Sync& sync) {
  const int lane = thread & 31;
  value = __reduce_max_sync(0xffffffffu, value);
  if (lane == 0) warps[thread >> 5] = value;
  sync();
  return __reduce_max_sync(0xffffffffu, lane < num_threads / 32 ? warps[lane] : 0u);
}

// The sums of all planes to `totals`, in shared memory. By whole warps.
__device__ __forceinline__ void add_sums(const std::int32_t (&sums)[2], int num_planes, std::int32_t* totals) {
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    if (plane == num_planes) break;
    const std::int32_t sum = __reduce_add_sync(0xffffffffu, sums[plane]);
    if ((threadIdx.x & 31) == 0) atomicAdd(totals + plane, sum);
  }
}

}  // namespace pvq::cuda
