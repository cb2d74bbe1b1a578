// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime as csrc/cuda sees it, for a GPU that a test makes up. It launches nothing.
#pragma once

#include <cuda_runtime.h>

#include <functional>

struct FakeDevice {
  int capability = 0, ptx_version = 0;  // of the GPU; of the code that it loads
  int num_sms = 1000, max_shared_bytes = 1000;
  int failures = 0;  // of the next settings of kernels
  int settings = 0;  // of kernels that were made
  std::function<void(const cudaLaunchConfig_t&)> on_launch = [](const cudaLaunchConfig_t&) {};
};

extern FakeDevice fake_device;
