// SPDX-License-Identifier: Apache-2.0
#include "fake_runtime.h"

FakeDevice fake_device;

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaSetDevice(int) { return cudaSuccess; }

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? fake_device.capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor       ? fake_device.capability % 10
           : attribute == cudaDevAttrMultiProcessorCount          ? fake_device.num_sms
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? fake_device.max_shared_bytes
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = fake_device.ptx_version;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  if (fake_device.failures-- > 0) return cudaErrorMemoryAllocation;
  ++fake_device.settings;
  return cudaSuccess;
}

// Groups of 16 or 18 multiprocessors share a cluster.
cudaError_t CUDARTAPI cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  *clusters = fake_device.num_sms / 18 * (18 / size);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  fake_device.on_launch(*config);
  return cudaSuccess;
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "no memory"; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }

// Of describe_device() and of the kernels' host code, which no check calls.
cudaError_t CUDARTAPI cudaRuntimeGetVersion(int*) { return cudaErrorNotSupported; }
cudaError_t CUDARTAPI cudaDriverGetVersion(int*) { return cudaErrorNotSupported; }
cudaError_t CUDARTAPI cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNotSupported; }
cudaError_t CUDARTAPI cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t CUDARTAPI cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t) { return cudaErrorNotSupported; }

// What nvcc's host code calls when a program starts, and in place of cudaLaunchKernel.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

}  // extern "C"
