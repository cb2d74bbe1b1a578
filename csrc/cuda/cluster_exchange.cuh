// SPDX-License-Identifier: Apache-2.0
// What the blocks of a cluster that share a token tell each other. (Nothing before sm_90, where no kernel asks for clusters.)
#pragma once

#include <cstdint>

#include "cluster.cuh"
#include "shared_memory.cuh"

namespace pvq::cuda {

constexpr int kMaxClusterSize = 8;

// In shared memory. Every value is sent to where it is needed, and a barrier there counts it: faster by half than to write it
// there and to synchronize the cluster.
struct ClusterExchange {
  std::uint64_t largest_barrier, sums_barrier;
  std::uint32_t largest[kMaxClusterSize];  // by rank
  std::int32_t sums[2][kMaxClusterSize];

  // By all threads, first; until all blocks of the cluster run.
  __device__ __forceinline__ void begin(int cluster_size, int num_planes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      const std::uint32_t of_largest = shared_address(&largest_barrier), of_sums = shared_address(&sums_barrier);
      init_barrier(of_largest, 1);
      init_barrier(of_sums, 1);
      fence_barrier_init();
      expect_bytes(of_largest, 4 * cluster_size);
      expect_bytes(of_sums, 4 * num_planes * (cluster_size - 1));
    }
    __syncwarp();
    synchronize_cluster();
#endif
  }

  // Of the values of all blocks. By all threads, each with its block's value.
  __device__ __forceinline__ std::uint32_t largest_of_cluster(std::uint32_t value, int cluster_size, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const std::uint32_t barrier = shared_address(&largest_barrier);
    const int thread = threadIdx.x, lane = threadIdx.x & 31;
    if (thread < cluster_size) send(address_in(shared_address(&largest[rank]), thread), value, address_in(barrier, thread));
    wait_barrier(barrier, 0);
    value = __reduce_max_sync(0xffffffffu, lane < cluster_size ? largest[lane] : 0u);
#endif
    return value;
  }

  // Adds those of all blocks to `totals` of rank 0, of one plane a thread: thread p has plane p. By all threads, after the block
  // has synchronized.
  __device__ __forceinline__ void add_sums(std::int32_t* totals, int cluster_size, int num_planes, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const int plane = threadIdx.x;
    if (plane >= num_planes) return;
    const std::uint32_t barrier = shared_address(&sums_barrier);
    if (rank > 0) {
      send(address_in(shared_address(&sums[plane][rank]), 0), static_cast<std::uint32_t>(totals[plane]), address_in(barrier, 0));
      return;
    }
    wait_barrier(barrier, 0);
    for (int other = 1; other < cluster_size; ++other) totals[plane] += sums[plane][other];
#endif
  }
};

}  // namespace pvq::cuda
