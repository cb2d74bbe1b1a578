// SPDX-License-Identifier: Apache-2.0
// Addresses in, canonical codebook out. pvq_vllm/canonical_ops.py has checked every tensor behind them.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "canonical.h"
#include "cpu/parallel.h"

namespace pvq {
namespace canonical_bindings {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// N(D, K) as little-endian bytes, for int.from_bytes.
inline pybind11::bytes codebook_size(int group_size, int num_pulses) {
  const auto& size = Pyramid::get(group_size, num_pulses)->size();
  return pybind11::bytes(reinterpret_cast<const char*>(size.data()), size.size() * sizeof(uint64_t));
}

inline int index_bits(int group_size, int num_pulses) { return Pyramid::get(group_size, num_pulses)->index_bits(); }

inline int index_words(int group_size, int num_pulses) { return Pyramid::get(group_size, num_pulses)->words(); }

inline void index_from_pulses(uintptr_t pulses, int64_t count, int group_size, int num_pulses, uintptr_t index) {
  Pyramid::get(group_size, num_pulses)->index_from_pulses(at<const int16_t>(pulses), count, at<uint64_t>(index));
}

inline int64_t pulses_from_index(uintptr_t index, int64_t count, int group_size, int num_pulses, uintptr_t pulses) {
  const auto pyramid = Pyramid::get(group_size, num_pulses);
  const uint64_t* given = at<const uint64_t>(index);
  std::vector<uint64_t> copy(given, given + count * pyramid->words());
  return pyramid->pulses_from_index(copy.data(), count, at<int16_t>(pulses));
}

inline void search(uintptr_t x, int64_t count, int group_size, int num_pulses, uintptr_t pulses) {
  const int64_t grain = std::max<int64_t>(1, 4096 / group_size);
  parallel_for(count, grain, [&](int64_t begin, int64_t end, int) {
    search_pulses(at<const float>(x) + begin * group_size, end - begin, group_size, num_pulses,
                  at<int16_t>(pulses) + begin * group_size);
  });
}

inline void refine(uintptr_t target, int64_t count, int group_size, int num_pulses, uintptr_t factor, uintptr_t inverse,
                   uintptr_t metric, uintptr_t levels, int num_levels, uintptr_t scale, uintptr_t pulses, uintptr_t codes,
                   uintptr_t q) {
  const GroupMetric of_group{at<const double>(factor), at<const double>(inverse), at<const double>(metric)};
  const int64_t grain = std::max<int64_t>(1, 4096 / group_size / group_size);
  parallel_for(count, grain, [&](int64_t begin, int64_t end, int) {
    refine_pulses(at<const float>(target) + begin * group_size, end - begin, group_size, num_pulses, of_group,
                  at<const float>(levels), num_levels, at<const float>(scale) + begin, at<int16_t>(pulses) + begin * group_size,
                  at<uint16_t>(codes) + begin, at<int8_t>(q) + begin * group_size);
  });
}

// Rows that make one sweep over the rows of the table worth while.
inline int64_t row_grain(const CanonicalFormat& format) {
  const int64_t batch = Pyramid::get(format.group_size, format.num_pulses)->batch();
  return std::max<int64_t>(1, batch / std::max<int64_t>(1, format.groups));
}

inline void encode_rows(uintptr_t pulses, uintptr_t amplitudes, int64_t rows, int64_t groups, int group_size, int num_pulses,
                        int amplitude_bits, uintptr_t packed) {
  const CanonicalFormat format{group_size, num_pulses, amplitude_bits, groups};
  const int64_t row_bytes = canonical_row_bytes(format);
  parallel_for(rows, row_grain(format), [&](int64_t begin, int64_t end, int) {
    canonical_encode_rows(at<const int16_t>(pulses) + begin * groups * group_size,
                          at<const uint16_t>(amplitudes) + begin * groups, end - begin, format,
                          at<uint8_t>(packed) + begin * row_bytes);
  });
}

// (fault, row, group): fault 0 when every row was decoded, else 1 for an index, 2 for a weight out of range, 3 for a
// padding bit that is set, in the first row that has one.
inline std::tuple<int, int64_t, int64_t> decode_rows(uintptr_t packed, uintptr_t levels, int64_t rows, int64_t groups,
                                                     int group_size, int num_pulses, int amplitude_bits, uintptr_t q) {
  const CanonicalFormat format{group_size, num_pulses, amplitude_bits, groups};
  const int64_t row_bytes = canonical_row_bytes(format);
  std::vector<DecodeStatus> of_slot(std::max(1, max_threads()));
  parallel_for(rows, row_grain(format), [&](int64_t begin, int64_t end, int slot) {
    DecodeStatus status = canonical_decode_rows(at<const uint8_t>(packed) + begin * row_bytes, at<const float>(levels),
                                                end - begin, format, at<int8_t>(q) + begin * groups * group_size);
    if (status.fault != Fault::kNone) status.row += begin;
    of_slot[slot] = status;
  });
  for (const DecodeStatus& status : of_slot)  // slots are in the order of the rows
    if (status.fault != Fault::kNone) return {static_cast<int>(status.fault), status.row, status.group};
  return {0, -1, -1};
}

}  // namespace canonical_bindings

inline void bind_canonical(pybind11::module_& m) {
  namespace py = pybind11;
  namespace bound = canonical_bindings;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("canonical_codebook_size", &bound::codebook_size, py::arg("group_size"), py::arg("num_pulses"));
  m.def("canonical_index_bits", &bound::index_bits, NoGil(), py::arg("group_size"), py::arg("num_pulses"));
  m.def("canonical_index_words", &bound::index_words, NoGil(), py::arg("group_size"), py::arg("num_pulses"));
  m.def("canonical_index_from_pulses", &bound::index_from_pulses, NoGil(), py::arg("pulses"), py::arg("count"),
        py::arg("group_size"), py::arg("num_pulses"), py::arg("index"));
  m.def("canonical_pulses_from_index", &bound::pulses_from_index, NoGil(), py::arg("index"), py::arg("count"),
        py::arg("group_size"), py::arg("num_pulses"), py::arg("pulses"));
  m.def("canonical_search", &bound::search, NoGil(), py::arg("x"), py::arg("count"), py::arg("group_size"), py::arg("num_pulses"),
        py::arg("pulses"));
  m.def("canonical_refine", &bound::refine, NoGil(), py::arg("target"), py::arg("count"), py::arg("group_size"),
        py::arg("num_pulses"), py::arg("factor"), py::arg("inverse"), py::arg("metric"), py::arg("levels"), py::arg("num_levels"),
        py::arg("scale"), py::arg("pulses"), py::arg("codes"), py::arg("q"));
  m.def("canonical_encode_rows", &bound::encode_rows, NoGil(), py::arg("pulses"), py::arg("amplitudes"), py::arg("rows"),
        py::arg("groups"), py::arg("group_size"), py::arg("num_pulses"), py::arg("amplitude_bits"), py::arg("packed"));
  m.def("canonical_decode_rows", &bound::decode_rows, NoGil(), py::arg("packed"), py::arg("levels"), py::arg("rows"),
        py::arg("groups"), py::arg("group_size"), py::arg("num_pulses"), py::arg("amplitude_bits"), py::arg("q"));
}

}  // namespace pvq
