// SPDX-License-Identifier: Apache-2.0
#include "encode_kernels.h"

namespace pvq::cpu {
namespace {

#include "encode_loops.h"

}  // namespace

const EncodeKernels* portable_encode_kernels() { return &kEncodeTable; }

}  // namespace pvq::cpu
