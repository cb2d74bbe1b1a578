// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "many_columns_wgmma.cuh"

namespace pvq::cuda {

void many_columns_wgmma(const Activations& a, const Weight& weight, const Output& output, const Scratch& scratch,
                        cudaStream_t stream) {
  if (a.num_columns() <= 0 || weight.rows <= 0) return;
  const DeviceProperties& device = device_properties();
  if (device.capability != 90) throw std::runtime_error("many_columns_wgmma needs a GPU of compute capability 9.0");
  const WgmmaProblem problem{
      weight.codebook,         table_bytes(weight.codebook), weight.rows, a.num_columns(), weight.num_chunks, device.num_sms,
      device.max_shared_bytes, scratch.partial_elements,     kNumCounters};
  const WgmmaArguments arguments{{a, weight, output}, scratch.partial, scratch.counters, choose_wgmma_schedule(problem)};
  switch (weight.codebook) {
    case CodebookId::kPvq2:
      return launch_many_columns_wgmma<CodebookId::kPvq2>(arguments, stream);
    case CodebookId::kPvq3:
      return launch_many_columns_wgmma<CodebookId::kPvq3>(arguments, stream);
    case CodebookId::kPvq4:
      return launch_many_columns_wgmma<CodebookId::kPvq4>(arguments, stream);
    case CodebookId::kInt8:
      return launch_many_columns_wgmma<CodebookId::kInt8>(arguments, stream);
  }
  throw std::runtime_error("many_columns_wgmma: unknown codebook");
}

}  // namespace pvq::cuda
