// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace pvq::cpu {
namespace {

constexpr std::size_t kDigitTableSize = 8192;

std::vector<std::uint32_t> padded_digits(CodebookId id) {
  std::vector<std::uint32_t> table = shape_table(*find_codebook(id));
  table.resize(kDigitTableSize, 0);
  return table;
}

std::vector<std::uint32_t> pvq2_planes() {  // all words of weights 0-3, then of weights 4-7
  const std::vector<std::uint32_t> pairs = pvq2_code_magnitudes();
  std::vector<std::uint32_t> planes(pairs.size());
  for (std::size_t i = 0; i < pairs.size(); ++i) planes[256 * (i % 2) + i / 2] = pairs[i];
  return planes;
}

enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

#ifdef __x86_64__
// AMX state is off until the process asks for it once (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool request_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool amx_tile = (edx >> 24 & 1) != 0, amx_int8 = (edx >> 25 & 1) != 0;
  return amx_tile && amx_int8 && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa best_isa(Isa cap) {
  __builtin_cpu_init();
  if (cap >= Isa::kAvx512 && avx512_vnni_kernels() != nullptr && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#ifdef PVQ_WITH_AMX
    if (cap >= Isa::kAmx && request_amx()) return Isa::kAmx;
#endif
    return Isa::kAvx512;
  }
  if (cap >= Isa::kAvx2 && avx2_kernels() != nullptr && __builtin_cpu_supports("avx2")) return Isa::kAvx2;
  return Isa::kPortable;
}
#else
Isa best_isa(Isa) { return Isa::kPortable; }
#endif

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "amx"};

Isa active() {
  static const Isa isa = [] {
    const char* name = std::getenv("PVQ_CPU_ISA");
    if (name == nullptr || *name == '\0') return best_isa(Isa::kAmx);
    for (int i = 0; i < 4; ++i)
      if (std::strcmp(name, kIsaNames[i]) == 0) return best_isa(static_cast<Isa>(i));
    throw std::invalid_argument("PVQ_CPU_ISA is '" + std::string(name) + "'; use portable, avx2, avx512 or amx.");
  }();
  return isa;
}

}  // namespace

const std::uint32_t* digit_table(CodebookId id) {
  static const std::vector<std::uint32_t> pvq2 = padded_digits(CodebookId::kPvq2);
  static const std::vector<std::uint32_t> joined = padded_digits(CodebookId::kPvq4);  // pvq3 has the same shapes
  static_assert(find_codebook(CodebookId::kPvq3)->pyramids[0] == find_codebook(CodebookId::kPvq4)->pyramids[0] &&
                find_codebook(CodebookId::kPvq3)->pyramids[1] == find_codebook(CodebookId::kPvq4)->pyramids[1] &&
                find_codebook(CodebookId::kPvq3)->pyramids[2] == find_codebook(CodebookId::kPvq4)->pyramids[2]);
  return id == CodebookId::kPvq2 ? pvq2.data() : joined.data();
}

const std::uint32_t* pvq2_magnitudes() {
  static const std::vector<std::uint32_t> table = pvq2_planes();
  return table.data();
}

const CpuKernels& active_kernels() {
  switch (active()) {
    case Isa::kAmx:
    case Isa::kAvx512:
      return *avx512_vnni_kernels();
    case Isa::kAvx2:
      return *avx2_kernels();
    case Isa::kPortable:
      break;
  }
  return *portable_kernels();
}

bool amx_active() { return active() == Isa::kAmx; }

const char* active_isa() { return kIsaNames[static_cast<int>(active())]; }

}  // namespace pvq::cpu
