// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set, from the decode<> and dot<> (and vector_loops.h) of the file that includes this inside its
// anonymous namespace.

constexpr CpuKernels make_table(const char* name, int activation_offset) {
  return {
      name,
      activation_offset,
      {dot<CodebookId::kPvq2>, dot<CodebookId::kPvq3>, dot<CodebookId::kPvq4>, dot<CodebookId::kInt8>},
      {decode<CodebookId::kPvq2>, decode<CodebookId::kPvq3>, decode<CodebookId::kPvq4>, nullptr},
      load,
      rotate,
      max_magnitude,
      quantize_a8,
      quantize_a16,
      project,
      quantize_pulses,
      finish,
  };
}
