// SPDX-License-Identifier: Apache-2.0
#include "encode_kernels.h"

namespace pvq::cpu {
namespace {

#include "encode_loops.h"
#include "feedback_loops.h"

constexpr EncodeKernels kEncodeTable = {encode_range, feedback_range, descent_range, error_range};

}  // namespace

const EncodeKernels* portable_encode_kernels() { return &kEncodeTable; }

}  // namespace pvq::cpu
