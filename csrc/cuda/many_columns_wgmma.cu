// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <mutex>
#include <stdexcept>

#include "many_columns_wgmma.cuh"
#include "with_codebook.h"

namespace pvq::cuda {
namespace {

// Takes a multiprocessor for itself.
constexpr int kThreads = 512;
__global__ void __launch_bounds__(kThreads, 1) whole_multiprocessor() {}

// Clusters of such blocks that run at a time on the current device, by their size: the groups of multiprocessors that share
// clusters have different sizes.
using Resident = std::array<int, kWgmmaMaxSplits + 1>;
const Resident& resident_clusters() {
  static std::array<Resident, kMaxDevices> resident;
  static std::array<std::once_flag, kMaxDevices> once;
  const std::size_t device = static_cast<std::size_t>(current_device());
  std::call_once(once[device], [&] {
    const void* kernel = reinterpret_cast<const void*>(&whole_multiprocessor);
    allow_shared_memory(kernel);
    for (unsigned size = 1; size <= kWgmmaMaxSplits; ++size) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {size, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(size);
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = static_cast<std::size_t>(device_properties().max_shared_bytes);
      config.attrs = &attribute;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&resident[device][size], kernel, &config), "clusters that run at a time");
    }
  });
  return resident[device];
}

WgmmaLaunches launches(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks) {
  const DeviceProperties& device = device_properties();
  if (device.capability != 90) throw std::runtime_error("many_columns_wgmma needs a GPU of compute capability 9.0");
  WgmmaProblem problem{table_bytes(codebook), rows, num_columns, num_chunks, device.max_shared_bytes};
  std::copy(resident_clusters().begin(), resident_clusters().end(), problem.resident);
  return choose_wgmma_launches(problem);
}

}  // namespace

std::int64_t many_columns_wgmma_first_rows(CodebookId codebook, std::int64_t rows, std::int64_t num_columns,
                                           std::int64_t num_chunks) {
  return launches(codebook, rows, num_columns, num_chunks).rows;
}

double many_columns_wgmma_cycles(CodebookId codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks) {
  return launches(codebook, rows, num_columns, num_chunks).cycles;
}

void many_columns_wgmma(const Activations& a, const Weight& weight, const Output& output, cudaStream_t stream) {
  if (a.num_columns() <= 0 || weight.rows <= 0) return;
  const WgmmaLaunches l = launches(weight.codebook, weight.rows, a.num_columns(), weight.num_chunks);
  with_codebook(weight.codebook, [&](auto id) {
    const std::int64_t left = weight.rows - l.rows;
    launch_many_columns_wgmma<decltype(id)::value>({{a, rows_of(weight, 0, l.rows), output}, l.first.schedule, left > 0, false},
                                                   stream);
    if (left > 0)
      launch_many_columns_wgmma<decltype(id)::value>(
          {{a, rows_of(weight, l.rows, left), rows_of(output, l.rows)}, l.rest.schedule, false, true}, stream);
  });
}

}  // namespace pvq::cuda
