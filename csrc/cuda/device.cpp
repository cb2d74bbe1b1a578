// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_set>

#include "launch.h"

namespace pvq::cuda {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current GPU");
  if (device >= kMaxDevices) throw std::runtime_error("more than " + std::to_string(kMaxDevices) + " GPUs in one process");
  return device;
}

const DeviceProperties& device_properties() {
  static std::array<DeviceProperties, kMaxDevices> properties;
  static std::array<std::once_flag, kMaxDevices> once;
  const int device = current_device();
  std::call_once(once[static_cast<std::size_t>(device)], [&] {
    DeviceProperties& p = properties[static_cast<std::size_t>(device)];
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&p.num_sms, cudaDevAttrMultiProcessorCount, device), "GPU attribute");
    check(cudaDeviceGetAttribute(&p.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "GPU attribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "GPU attribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "GPU attribute");
    // A driver that finds nothing newer compiles PTX of an older architecture: those kernels lack what is newer (__CUDA_ARCH__).
    cudaFuncAttributes loaded{};
    check(cudaFuncGetAttributes(&loaded, probe_kernel()), "attributes of a kernel");
    p.capability = std::min(10 * major + minor, loaded.ptxVersion);
#ifdef PVQ_WITH_WGMMA
    p.has_wgmma = p.capability == 90;
#endif
  });
  return properties[static_cast<std::size_t>(device)];
}

namespace {

struct Allowed {
  std::mutex mutex;
  std::array<std::unordered_set<const void*>, kMaxDevices> kernels;
};
Allowed& allowed() {
  static Allowed all;
  return all;
}

}  // namespace

thread_local bool Preparation::active_ = false;

std::int64_t num_allowed() {
  const std::lock_guard lock(allowed().mutex);
  return static_cast<std::int64_t>(allowed().kernels[static_cast<std::size_t>(current_device())].size());
}

void allow_shared_memory(const void* kernel) {
  const int device = current_device();
  const std::lock_guard lock(allowed().mutex);
  std::unordered_set<const void*>& kernels = allowed().kernels[static_cast<std::size_t>(device)];
  if (kernels.count(kernel) != 0) return;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
  const int most = device_properties().max_shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of a kernel");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory of a kernel");
  kernels.insert(kernel);  // last: what failed is tried again
}

}  // namespace pvq::cuda
