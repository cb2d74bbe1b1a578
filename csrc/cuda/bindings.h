// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace pvq::cuda {

// Fills the submodule _C.cuda. pvq_vllm/cuda_ops.py has checked every tensor behind the addresses.
void bind(pybind11::module_ m);

}  // namespace pvq::cuda
