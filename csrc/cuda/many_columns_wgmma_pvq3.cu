// SPDX-License-Identifier: Apache-2.0
#include "many_columns_wgmma.cuh"

namespace pvq::cuda {

template void launch_many_columns_wgmma<CodebookId::kPvq3>(const WgmmaArguments&, cudaStream_t);

}  // namespace pvq::cuda
