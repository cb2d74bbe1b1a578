// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/device.cpp on the GPU and with the code of the command line: device_check CAPABILITY PTX_VERSION
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "fake_runtime.h"
#include "launch.h"

const void* pvq::cuda::probe_kernel() { return &fake_device; }

int main(int, char** arguments) {
  fake_device.capability = std::atoi(arguments[1]);
  fake_device.ptx_version = std::atoi(arguments[2]);
  const pvq::cuda::DeviceProperties& device = pvq::cuda::device_properties();
  std::printf("%d %d\n", device.capability, device.has_wgmma ? 1 : 0);
  fake_device.failures = 1;
  try {
    pvq::cuda::allow_shared_memory(&fake_device);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  for (int call = 0; call < 2; ++call) pvq::cuda::allow_shared_memory(&fake_device);
  std::printf("%d\n", fake_device.settings);
}
