// SPDX-License-Identifier: Apache-2.0
// One call of a linear layer: which kernel runs. The contract of linear.h holds: no allocation, no waiting.
#pragma once

#include <string>

#include "plan.h"

namespace pvq::cuda {

constexpr int kNumCodebooks = 4;

struct Constants {                             // of a plan on a device; they outlive every call
  const std::uint32_t* tables[kNumCodebooks];  // by codebook, null where the plan has none
  const std::uint32_t* signs;                  // plan.sign_bits, null without rotation
  std::int32_t* counters;                      // [kNumCounters] zeros; calls on different streams need their own
};

struct Call {
  const void* x;  // [num_tokens, in_features]
  DType dtype;    // of x, bias and y
  std::int64_t num_tokens;
  const std::uint8_t* weight;  // [plan.weight_bytes]
  const float* row_scale;      // [plan.packed_rows], 0 in padding
  const void* bias;            // [out_features] or null
  void* y;                     // [num_tokens, out_features]
  char* workspace;             // [workspace_bytes(plan, num_tokens)], aligned to 256 bytes
  cudaStream_t stream;
};

// Shared memory that a block needs at most to quantize a token; a GPU with less does not run the plan. capability: of the code.
std::int64_t quantizer_shared_bytes(const CudaPlan& plan, int capability);

// What a call on the current device needs.
std::int64_t workspace_bytes(const CudaPlan& plan, std::int64_t num_tokens);

// y = x W^T + bias. The environment variable PVQ_CUDA_KERNEL, for tests, takes one kernel for everything: few (few columns),
// tiles, mma, wgmma or prefill; auto, or unset: the fastest.
void linear(const CudaPlan& plan, const Constants& constants, const Call& call);

// Makes the kernels ready that calls on the current device run, of any type and up to 65536 tokens: no call then loads code or
// sets attributes, which may wait for the device.
void prepare(const CudaPlan& plan);

// The first half alone: `call` needs x, dtype, num_tokens, workspace and stream; the result is in the workspace (layout.h).
void quantize_activations(const CudaPlan& plan, const Constants& constants, const Call& call);

// Makes `device` the current one for a scope. Pointers and streams of torch belong to a device, its current one may be another.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

struct DeviceReport {
  std::string name;
  int capability = 0, code = 0;                 // 10 major + minor, of the GPU and of the code that it runs
  std::int64_t max_shared_bytes = 0;            // of a block
  int driver_version = 0, runtime_version = 0;  // 1000 major + 10 minor
  std::string fault;  // empty: the kernels run here. driver, image (none for this GPU), or the error's name
};

// Never throws: a fault is what the caller wants to explain.
DeviceReport describe_device(int device);

}  // namespace pvq::cuda
