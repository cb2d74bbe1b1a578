// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "dispatch.h"
#include "launch.h"
#include "rotate.cuh"

namespace pvq::cuda {
namespace {

constexpr std::int64_t kMmaColumns = 32;  // up to here mma.sync is faster than wgmma, which wants 64 columns or more

constexpr std::int64_t kMostPreparedTokens = 65536;

enum class Choice { kAuto, kFew, kTiles, kMma, kWgmma, kPrefill };

Choice choice() {
  const char* text = std::getenv("PVQ_CUDA_KERNEL");
  if (text == nullptr || *text == 0) return Choice::kAuto;
  const std::string name(text);
  if (name == "auto") return Choice::kAuto;
  if (name == "few") return Choice::kFew;
  if (name == "tiles") return Choice::kTiles;
  if (name == "mma") return Choice::kMma;
  if (name == "wgmma") return Choice::kWgmma;
  if (name == "prefill") return Choice::kPrefill;
  throw std::invalid_argument("PVQ_CUDA_KERNEL is '" + name + "'; use auto, few, tiles, mma, wgmma or prefill.");
}

Tokens tokens_of(const CudaPlan& plan, const Constants& constants, const Call& call) {
  Tokens tokens{call.x, call.dtype, call.num_tokens, plan.in_features, plan.num_planes, plan.scale_constant, plan.rotation};
  tokens.rotation.signs = constants.signs;
  tokens.projection = plan.projection;
  return tokens;
}

Activations activations_of(const CudaPlan& plan, const Workspace& w, const Call& call) {
  return {reinterpret_cast<std::int8_t*>(call.workspace + w.activations),
          reinterpret_cast<std::int32_t*>(call.workspace + w.sums),
          reinterpret_cast<float*>(call.workspace + w.token_scale),
          call.num_tokens,
          num_chunks(plan.in_features),
          w.padded_columns,
          plan.num_planes,
          plan.projection.group_size == 0 && (plan.rotation.num_factors == 0 || rotates_in_warps(plan.rotation))};
}

void make_activations(const Tokens& tokens, const Activations& out, bool waits_last, cudaStream_t stream) {
  if (tokens.projection.group_size > 0) return project_tokens(tokens, out, stream);
  rotate_quantize(tokens, out, waits_last, stream);
}

// Of a segment.
bool takes_prefill(Choice chosen, const Segment& segment, std::int64_t num_columns, std::int64_t num_chunks) {
  if (!device_properties().has_wgmma) return false;
  return chosen == Choice::kPrefill ||
         (chosen == Choice::kAuto && prefill_pays(segment.codebook, segment.rows, num_columns, num_chunks));
}

Workspace workspace_of(const CudaPlan& plan, std::int64_t num_tokens, Choice chosen) {
  bool for_prefill = false;
  for (const Segment& segment : plan.segments)
    for_prefill |= takes_prefill(chosen, segment, num_tokens * plan.num_planes, num_chunks(plan.in_features));
  return plan.workspace(num_tokens, for_prefill);
}

// By every kernel but prefill.
void multiply(Choice chosen, const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch,
              cudaStream_t stream) {
  const bool hopper = device_properties().has_wgmma, any = chosen == Choice::kAuto;
  if ((any || chosen == Choice::kFew) && a.num_columns() <= kMaxFewColumns && few_columns(a, weight, output, scratch, stream))
    return;
  const bool tiles = any ? warp_tiles_pay(weight.codebook, weight.rows, a.num_columns()) : chosen == Choice::kTiles;
  if (hopper && tiles && warp_tiles(a, weight, output, stream)) return;
  if (hopper && chosen != Choice::kMma && (!any || a.num_columns() > kMmaColumns)) {
    many_columns_wgmma(a, weight, output, stream);
  } else {
    many_columns(a, weight, output, scratch, stream);
  }
}

__global__ void probe() {}

}  // namespace

const void* probe_kernel() { return reinterpret_cast<const void*>(&probe); }

std::int64_t quantizer_shared_bytes(const CudaPlan& plan, int capability) {
  const std::int64_t n = plan.in_features;
  if (plan.projection.group_size == 0) {
    if (plan.rotation.num_factors == 0) return 0;
    if (rotates_in_warps(plan.rotation)) return capability >= 90 ? 0 : 4 * n + 256;  // a cluster has registers for any token
  }
  // Static, besides the token: a dense factor's matrix, of order 28 or 76, and sums.
  const std::int64_t order = largest_dense_order(plan.rotation) > 28 ? 76 : 28;
  return float_buffer_bytes(n) + order * order * 4 + 256;
}

std::int64_t workspace_bytes(const CudaPlan& plan, std::int64_t num_tokens) {
  return workspace_of(plan, num_tokens, choice()).bytes;
}

void linear(const CudaPlan& plan, const Constants& constants, const Call& call) {
  if (call.num_tokens <= 0) return;
  const Choice chosen = choice();
  const Workspace w = workspace_of(plan, call.num_tokens, chosen);
  const Tokens tokens = tokens_of(plan, constants, call);
  Activations a = activations_of(plan, w, call);
  if (chosen == Choice::kAuto && plan.segments.size() == 1)
    a.shared_beside = shared_beside(plan.segments[0].codebook, plan.segments[0].rows, a.num_columns(), a.num_chunks);
  const Scratch scratch{reinterpret_cast<std::int32_t*>(call.workspace + w.partial), w.partial_elements, constants.counters};
  std::uint8_t* expanded = reinterpret_cast<std::uint8_t*>(call.workspace + w.expanded);
  const bool alone = chosen == Choice::kAuto && plan.segments.size() == 1 && plan.projection.group_size == 0;
  bool quantized = false;
  for (const Segment& segment : plan.segments) {
    const Weight weight{segment.codebook,
                        call.weight + segment.weight_offset,
                        call.row_scale + segment.packed_row,
                        constants.tables[static_cast<int>(segment.codebook)],
                        segment.rows,
                        a.num_chunks};
    const Output output = rows_of(Output{call.y, call.bias, call.dtype, plan.out_features}, segment.output_row);
    if (alone && quantize_and_multiply(tokens, weight, output, scratch, call.stream)) return;
    const bool by_prefill = takes_prefill(chosen, segment, a.num_columns(), a.num_chunks),
               expands_first = by_prefill && !quantized;
    if (expands_first) expand_first(weight, a.num_columns(), expanded, call.stream);
    if (!quantized) make_activations(tokens, a, expands_first, call.stream);
    quantized = true;
    if (by_prefill)
      prefill(a, weight, output, expanded, expands_first, call.stream);
    else
      multiply(chosen, a, weight, output, scratch, call.stream);
  }
}

void prepare(const CudaPlan& plan) {
  const Preparation preparation;
  Call call{};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    call.dtype = dtype;
    // From some hundred tokens on the choice changes seldom.
    for (call.num_tokens = 1; call.num_tokens <= kMostPreparedTokens; call.num_tokens += 1 + call.num_tokens / 256)
      linear(plan, Constants{}, call);
  }
}

void quantize_activations(const CudaPlan& plan, const Constants& constants, const Call& call) {
  if (call.num_tokens <= 0) return;
  const Workspace w = plan.workspace(call.num_tokens);
  make_activations(tokens_of(plan, constants, call), activations_of(plan, w, call), false, call.stream);
}

DeviceScope::DeviceScope(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "current GPU");
  if (current == device) return;
  check(cudaSetDevice(device), "choice of a GPU");
  previous_ = current;
}

DeviceScope::~DeviceScope() {
  // On a GPU without a context this makes one, of hundreds of MB: cuda_ops.py has torch choose the GPU, which avoids it.
  if (previous_ < 0) return;
  const cudaError_t status = cudaSetDevice(previous_);
  if (status != cudaSuccess)
    std::fprintf(stderr, "pvq_vllm: GPU %d cannot be made the current one again: %s\n", previous_, cudaGetErrorString(status));
}

DeviceReport describe_device(int device) {
  DeviceReport report;
  (void)cudaRuntimeGetVersion(&report.runtime_version);
  (void)cudaDriverGetVersion(&report.driver_version);
  cudaDeviceProp properties{};
  cudaFuncAttributes attributes{};
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status == cudaSuccess) {
    report.name = properties.name;
    report.capability = 10 * properties.major + properties.minor;
    report.max_shared_bytes = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
    try {
      const DeviceScope scope(device);
      status = cudaFuncGetAttributes(&attributes, probe_kernel());
      if (status == cudaSuccess) report.code = attributes.ptxVersion;
    } catch (const std::runtime_error& error) {
      report.fault = error.what();
    }
  }
  if (status == cudaErrorInsufficientDriver) {
    report.fault = "driver";
  } else if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
             status == cudaErrorUnsupportedPtxVersion) {
    report.fault = "image";
  } else if (status != cudaSuccess) {
    report.fault = cudaGetErrorString(status);
  }
  (void)cudaGetLastError();
  return report;
}

}  // namespace pvq::cuda
