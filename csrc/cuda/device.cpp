// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <mutex>

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
    p.capability = 10 * major + minor;
  });
  return properties[static_cast<std::size_t>(device)];
}

}  // namespace pvq::cuda
