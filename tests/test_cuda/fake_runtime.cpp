// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime as csrc/cuda/device.cpp sees it, for the GPU and the code of the command line: capability, PTX version.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "launch.h"

namespace {

int capability = 0, ptx_version = 0, failures = 0, settings = 0;

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 1000;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = ptx_version;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  if (failures-- > 0) return cudaErrorMemoryAllocation;
  ++settings;
  return cudaSuccess;
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no memory"; }

}  // extern "C"

const void* pvq::cuda::probe_kernel() { return &capability; }

int main(int, char** arguments) {
  capability = std::atoi(arguments[1]);
  ptx_version = std::atoi(arguments[2]);
  const pvq::cuda::DeviceProperties& device = pvq::cuda::device_properties();
  std::printf("%d %d\n", device.capability, device.has_wgmma ? 1 : 0);
  failures = 1;
  try {
    pvq::cuda::allow_shared_memory(&settings);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  for (int call = 0; call < 2; ++call) pvq::cuda::allow_shared_memory(&settings);
  std::printf("%d\n", settings);
}
