// SPDX-License-Identifier: Apache-2.0
#include "encode.h"

#include <cstring>
#include <vector>

#include "encode_kernels.h"
#include "kernels.h"
#include "parallel.h"

namespace pvq::cpu {
namespace {

Search prepare(CodebookId id) {
  Search s{};
  s.book = find_codebook(id);
  const ServingCodebook& book = *s.book;
  s.refinement_bits = book.refinement_bits;
  s.num_pyramids = book.num_pyramids;
  s.num_gains = book.num_gains;
  for (int p = 0; p < book.num_pyramids; ++p) {
    s.pyramids[p] = book.pyramids[p];
    const bool shared = p > 0 && std::memcmp(book.gains[p], book.gains[p - 1], sizeof book.gains[p]) == 0;
    if (!shared) {
      for (int g = 0; g < book.num_gains; ++g) {
        const Rung gain = book.gains[p][g];
        s.ladders[s.num_sets][g] = {static_cast<float>(gain.base) + 0.5f, static_cast<float>(gain.step),
                                    (kMaxMagnitude - gain.base) / gain.step};
      }
      s.first[s.num_sets++] = p;
    }
    s.end[s.num_sets - 1] = p + 1;
  }
  for (int set = 0; set < s.num_sets; ++set)
    for (int gain = 0; gain < s.num_gains; ++gain)
      for (int p = s.first[set]; p < s.end[set]; ++p) s.candidates[s.num_candidates++] = {set, gain, p};
  return s;
}

Search search_for(CodebookId id) { return id == CodebookId::kInt8 ? Search{} : prepare(id); }

const EncodeKernels& kernels() {
  const CpuKernels* active = &active_kernels();
  if (active == avx512_vnni_kernels()) return *avx512_encode_kernels();
  if (active == avx2_kernels()) return *avx2_encode_kernels();
  return *portable_encode_kernels();
}

// Calls body(begin, end, scratch), scratch for one column a vector of kEncodeLanes rows. How many moves a group needs differs,
// hence more pieces than threads.
template <typename Body>
void for_rows(const EncodeArgs& args, Body&& body) {
  parallel_for_chunks(args.rows, kEncodeLanes, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(args.columns + 1) * 64);
    const std::uintptr_t address = (reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) & ~std::uintptr_t{63};
    body(begin, end, reinterpret_cast<void*>(address));
  });
}

}  // namespace

void encode_rows(const EncodeArgs& args) {
  const Search search = search_for(args.codebook);
  parallel_for(args.rows, kEncodeLanes,
               [&](std::int64_t begin, std::int64_t end, int) { kernels().encode(search, args, begin, end); });
}

void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, const float* metrics, float* error) {
  const Search search = search_for(args.codebook);
  for_rows(args, [&](std::int64_t begin, std::int64_t end, void* scratch) {
    kernels().feedback(search, args, factor, metrics, error, begin, end, scratch);
  });
}

void descend_rows(const EncodeArgs& args, const float* gradient, const float* hessian, const float* metrics) {
  const Search search = search_for(args.codebook);
  for_rows(args, [&](std::int64_t begin, std::int64_t end, void* scratch) {
    kernels().descent(search, args, gradient, hessian, metrics, begin, end, scratch);
  });
}

void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error) {
  const Search search = prepare(codebook);
  parallel_for(rows, kEncodeLanes, [&](std::int64_t begin, std::int64_t end, int) {
    kernels().error(search, weight, row_scale, columns, stride, begin, end, error);
  });
}

}  // namespace pvq::cpu
