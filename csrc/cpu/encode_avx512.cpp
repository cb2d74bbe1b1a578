// SPDX-License-Identifier: Apache-2.0
#include "encode_kernels.h"

#ifdef __AVX512DQ__
namespace pvq::cpu {
namespace {

#include "encode_loops.h"
#include "feedback_loops.h"

constexpr EncodeKernels kEncodeTable = {encode_range, feedback_range, descent_range, error_range};

}  // namespace

const EncodeKernels* avx512_encode_kernels() { return &kEncodeTable; }

}  // namespace pvq::cpu
#else
namespace pvq::cpu {
const EncodeKernels* avx512_encode_kernels() { return nullptr; }
}  // namespace pvq::cpu
#endif
