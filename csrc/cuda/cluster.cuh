// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90 and later that have no intrinsic: barriers in shared memory, clusters, bulk copies. Addresses of
// shared memory are 32-bit.
#pragma once

#include <cstdint>

// A ptxas for an architecture without clusters refuses the attribute.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PVQ_CLUSTER(n) __cluster_dims__(n, 1, 1)
#else
#define PVQ_CLUSTER(n)
#endif

namespace pvq::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Barriers: mbarrier objects of 8 bytes.

__device__ __forceinline__ void init_barrier(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After init_barrier, by the thread that did it and before the threads (of the cluster) synchronize.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives once and lets the phase wait for `bytes` more, of bulk copies and send().
__device__ __forceinline__ void expect_bytes(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the same barrier of another CTA of the cluster. The scope is the CTA, as of the wait: the cluster's costs a fence of the
// whole GPU's memory each time, and between CTAs go only bulk copies and send(), whose bytes the barriers count.
__device__ __forceinline__ void arrive_at(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity is over. A fresh barrier is in phase 0, and the phase before it, of parity 1, counts as over.
__device__ __forceinline__ void wait_barrier(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Clusters.

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void arrive_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void synchronize_cluster() {
  arrive_cluster();
  wait_cluster();
}

// Shared memory of another CTA of the cluster.
__device__ __forceinline__ std::uint32_t address_in(std::uint32_t address, std::uint32_t rank) {
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
// There, without waiting; `barrier`, of the same CTA, counts the bytes.
__device__ __forceinline__ void send(std::uint32_t address, std::uint32_t value, std::uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(value),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send(std::uint32_t address, int4 v, std::uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}

// Copies of `bytes` (a multiple of 16, addresses too) to shared memory. `barrier` counts the bytes.

__device__ __forceinline__ void copy_bulk(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

// To the same place of every CTA of `mask`, each with its own barrier.
__device__ __forceinline__ void copy_bulk_multicast(std::uint32_t to, const void* from, std::uint32_t bytes,
                                                    std::uint32_t barrier, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}

// The stages of a ring of buffers, one after another. parity: of the phase that fills the stage.
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#endif  // __CUDA_ARCH__ >= 900

}  // namespace pvq::cuda
