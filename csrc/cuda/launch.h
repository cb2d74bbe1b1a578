// SPDX-License-Identifier: Apache-2.0
// Kernel launches with programmatic dependence, checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace pvq::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

constexpr int kMaxDevices = 64;

// Where dynamic shared memory starts, at most: behind static variables and what the system keeps.
constexpr int kMaxSharedBase = 2048;

struct DeviceProperties {
  int num_sms = 0, max_shared_bytes = 0;
  int capability = 0;      // 10 major + minor: the device's, or that of the code that it runs if this is lower
  bool has_wgmma = false;  // on compute capability 9.0, and only in code compiled for 9.0a
};

// Of the current device; read once.
const DeviceProperties& device_properties();
int current_device();

// A kernel like all others, to ask which machine code the driver loaded.
const void* probe_kernel();

// Lets the next kernel of the stream start its prologue (sm_90 and later; nothing before).
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels before this one have finished and their writes are visible: before the first read of what they wrote, and
// before the first global write. (Two kernels have another order: expand_first, and the second launch of many_columns_wgmma.)
__device__ __forceinline__ void wait_for_dependencies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets `kernel` take as much shared memory as there is. All kernels ask for the largest share of the first-level cache: with
// shares of different sizes the blocks of two kernels cannot be on one multiprocessor at the same time.
void allow_shared_memory(const void* kernel);
std::int64_t num_allowed();  // kernels of the current device that have been

// While there is one, what this thread would launch is made ready instead: code is loaded, attributes are set.
class Preparation {
 public:
  Preparation() { active_ = true; }
  ~Preparation() { active_ = false; }
  Preparation(const Preparation&) = delete;
  Preparation& operator=(const Preparation&) = delete;
  static bool active() { return active_; }

 private:
  static thread_local bool active_;
};

// `kernel` must call wait_for_dependencies(). overlap: let it start before the kernel in front of it has ended. cluster: its
// size, of a kernel that does not say it itself.
template <typename... Parameters, typename... Arguments>
void launch_clusters(int cluster, bool overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                     cudaStream_t stream, Arguments&&... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  if (Preparation::active()) return;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (overlap && device_properties().capability >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

template <typename... Parameters, typename... Arguments>
void launch_overlapping(bool overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                        cudaStream_t stream, Arguments&&... arguments) {
  launch_clusters(1, overlap, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  launch_overlapping(true, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace pvq::cuda
