// SPDX-License-Identifier: Apache-2.0
// The private module _C: addresses, sizes and a stream come in as integers. pvq_vllm/ops.py and canonical_ops.py have checked
// the tensors behind the addresses; nobody else may call in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "canonical_bindings.h"
#include "causal_softmax.h"
#include "codebook.h"
#include "cpu/encode.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "hadamard.h"
#ifdef PVQ_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using pvq::CodebookId;

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

CodebookId codebook_id(int id) {
  if (id < 0 || id >= pvq::cpu::kNumCodebooks) throw py::value_error("unknown codebook id " + std::to_string(id));
  return static_cast<CodebookId>(id);
}

py::list serving_codebooks() {
  py::list books;
  for (const pvq::ServingCodebook& book : pvq::kServingCodebooks) {
    py::list pyramids, gains;
    for (int p = 0; p < book.num_pyramids; ++p) {
      py::list row;
      for (int g = 0; g < book.num_gains; ++g) row.append(py::make_tuple(book.gains[p][g].base, book.gains[p][g].step));
      pyramids.append(book.pyramids[p]);
      gains.append(py::tuple(row));
    }
    py::dict d;
    d["id"] = static_cast<int>(book.id);
    d["name"] = book.name;
    d["bytes_per_group"] = book.bytes_per_group;
    d["pyramids"] = py::tuple(pyramids);
    d["shape_bits"] = book.shape_bits;
    d["refinement_bits"] = book.refinement_bits;
    d["gains"] = py::tuple(gains);
    d["target_rms"] = book.target_rms;
    books.append(d);
  }
  return books;
}

pvq::cpu::EncodeArgs encode_args(std::uintptr_t weight, std::uintptr_t row_scale, std::int64_t rows, std::int64_t columns,
                                 int codebook, std::uintptr_t codes, std::uintptr_t q) {
  return {codebook_id(codebook),   at<const float>(weight), at<const float>(row_scale), rows, columns,
          at<std::uint8_t>(codes), at<std::int8_t>(q)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Kernels of PVQ for vLLM. Private: call pvq_vllm.ops.";
  m.attr("__version__") = PVQ_VERSION;
#ifdef PVQ_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  m.def("serving_codebooks", &serving_codebooks);
  m.def("shape_table", [](int id) {
    const pvq::ServingCodebook* book = pvq::find_codebook(codebook_id(id));
    if (book == nullptr) throw py::value_error("codebook id " + std::to_string(id) + " has no shapes");
    return pvq::shape_table(*book);
  });
  m.def("is_hadamard_order", &pvq::is_hadamard_order);
  m.def("dense_hadamard", &pvq::dense_hadamard);
  m.def("rotation_signs", &pvq::rotation_signs);
  m.def("cpu_isa", [] { return std::string(pvq::cpu::active_isa()); });
  m.def("max_threads", &pvq::max_threads);

  py::class_<pvq::cpu::LinearPlan>(m, "LinearPlan")
      .def(py::init<std::int64_t, const std::vector<std::pair<int, std::int64_t>>&, int, std::uint64_t, std::int64_t,
                    std::int64_t, const std::vector<int>&, int, int>(),
           py::arg("in_features"), py::arg("segments"), py::arg("num_planes"), py::arg("seed"), py::arg("first_column"),
           py::arg("rotation_blocks"), py::arg("factors"), py::arg("group_size") = 0, py::arg("num_pulses") = 0)
      .def_readonly("in_features", &pvq::cpu::LinearPlan::in_features)
      .def_readonly("out_features", &pvq::cpu::LinearPlan::out_features)
      .def_readonly("packed_rows", &pvq::cpu::LinearPlan::packed_rows)
      .def_readonly("weight_bytes", &pvq::cpu::LinearPlan::weight_bytes)
      .def_readonly("num_planes", &pvq::cpu::LinearPlan::num_planes)
      .def_property_readonly("segments", [](const pvq::cpu::LinearPlan& plan) {  // (codebook, rows, weight offset, packed row)
        py::list list;
        for (const auto& s : plan.segments)
          list.append(py::make_tuple(static_cast<int>(s.codebook), s.rows, s.weight_offset, s.packed_row));
        return list;
      });

  m.def(
      "pack_segment",
      [](int codebook, std::uintptr_t codes, std::int64_t rows, std::int64_t in_features, std::uintptr_t weight,
         std::uintptr_t row_sum) {
        return pvq::cpu::pack_segment(codebook_id(codebook), at<const std::uint8_t>(codes), rows, in_features,
                                      at<std::uint8_t>(weight), at<std::int32_t>(row_sum));
      },
      Release());
  m.def(
      "decode_codes",
      [](int codebook, std::uintptr_t codes, std::int64_t rows, std::int64_t in_features, std::uintptr_t q) {
        return pvq::cpu::decode_codes(codebook_id(codebook), at<const std::uint8_t>(codes), rows, in_features,
                                      at<std::int8_t>(q));
      },
      Release());
  m.def(
      "linear",
      [](const pvq::cpu::LinearPlan& plan, std::uintptr_t x, int dtype, std::int64_t num_tokens, std::uintptr_t weight,
         std::uintptr_t row_scale, std::uintptr_t row_sum, std::uintptr_t bias, std::uintptr_t y) {
        pvq::cpu::linear(plan,
                         {at<const void>(x), static_cast<pvq::cpu::DType>(dtype), num_tokens, at<const std::uint8_t>(weight),
                          at<const float>(row_scale), at<const std::int32_t>(row_sum), at<const void>(bias), at<void>(y)});
      },
      Release());
  m.def(
      "quantize_activations",
      [](const pvq::cpu::LinearPlan& plan, std::uintptr_t x, int dtype, std::int64_t num_tokens, std::uintptr_t planes,
         std::uintptr_t token_scale) {
        pvq::cpu::quantize_activations(plan, at<const void>(x), static_cast<pvq::cpu::DType>(dtype), num_tokens,
                                       at<std::int8_t>(planes), at<float>(token_scale));
      },
      Release());
  m.def(
      "encode_rows",
      [](std::uintptr_t weight, std::uintptr_t row_scale, std::int64_t rows, std::int64_t columns, int codebook,
         std::uintptr_t codes,
         std::uintptr_t q) { pvq::cpu::encode_rows(encode_args(weight, row_scale, rows, columns, codebook, codes, q)); },
      Release());
  m.def(
      "encode_rows_with_feedback",
      [](std::uintptr_t weight, std::uintptr_t row_scale, std::int64_t rows, std::int64_t columns, int codebook,
         std::uintptr_t codes, std::uintptr_t q, std::uintptr_t factor, std::uintptr_t metrics, std::uintptr_t error) {
        pvq::cpu::encode_rows_with_feedback(encode_args(weight, row_scale, rows, columns, codebook, codes, q),
                                            at<const float>(factor), at<const float>(metrics), at<float>(error));
      },
      Release());
  m.def(
      "descend_rows",
      [](std::uintptr_t weight, std::uintptr_t row_scale, std::int64_t rows, std::int64_t columns, int codebook,
         std::uintptr_t codes, std::uintptr_t q, std::uintptr_t gradient, std::uintptr_t hessian, std::uintptr_t metrics) {
        pvq::cpu::descend_rows(encode_args(weight, row_scale, rows, columns, codebook, codes, q), at<const float>(gradient),
                               at<const float>(hessian), at<const float>(metrics));
      },
      Release());
  m.def(
      "encoding_error",
      [](int codebook, std::uintptr_t weight, std::uintptr_t row_scale, std::int64_t rows, std::int64_t columns,
         std::int64_t stride, std::uintptr_t error) {
        pvq::cpu::encoding_error(codebook_id(codebook), at<const float>(weight), at<const float>(row_scale), rows, columns,
                                 stride, at<float>(error));
      },
      Release());
  m.def(
      "causal_softmax",
      [](std::uintptr_t scores, std::int64_t rows, std::int64_t queries, std::int64_t keys, std::uintptr_t probabilities) {
        pvq::causal_softmax(at<float>(scores), rows, queries, keys, at<std::uint16_t>(probabilities));
      },
      Release());
  pvq::bind_canonical(m);
#ifdef PVQ_WITH_CUDA
  pvq::cuda::bind(m.def_submodule("cuda"));
#endif
}
