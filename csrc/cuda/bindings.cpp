// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "canonical.h"
#include "dispatch.h"
#include "encode.h"
#include "expand.h"
#include "launch.h"
#include "pack.h"
#include "wgmma_schedule.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace pvq::cuda {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

CodebookId codebook_id(int id) {
  if (id < 0 || id >= kNumCodebooks) throw py::value_error("unknown codebook id " + std::to_string(id));
  return static_cast<CodebookId>(id);
}

cudaStream_t stream_at(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Number of the capture that `stream` is part of, which no other capture of this process has; none if it is not being captured.
std::optional<unsigned long long> capture_of(int device, Address stream) {
  const DeviceScope scope(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (stream != 0) check(cudaStreamGetCaptureInfo(stream_at(stream), &status, &id), "capture of a stream");
  if (status == cudaStreamCaptureStatusNone) return std::nullopt;
  return id;
}

py::list segments_of(const CudaPlan& plan) {  // (codebook, rows, weight offset, packed row)
  py::list list;
  for (const Segment& s : plan.segments)
    list.append(py::make_tuple(static_cast<int>(s.codebook), s.rows, s.weight_offset, s.packed_row));
  return list;
}

py::dict offsets_of(const CudaPlan& plan, std::int64_t num_tokens) {  // for tests: what lies where in the workspace
  const Workspace w = plan.workspace(num_tokens);
  py::dict d;
  d["activations"] = w.activations;
  d["sums"] = w.sums;
  d["token_scale"] = w.token_scale;
  d["padded_columns"] = w.padded_columns;
  d["bytes"] = w.bytes;
  return d;
}

py::list expansion_order(int blocks, int chunks, int round_blocks) {  // for tests: (block, group, tile) of every piece
  const ExpansionOrder order{blocks, chunks, round_blocks};
  py::list list;
  for (int i = 0; i < order.pieces(); ++i) {
    const ExpansionOrder::Piece piece = order.at(i);
    list.append(py::make_tuple(piece.block, piece.group, piece.tile));
  }
  return list;
}

py::list tile_order(int row_tiles, int column_tiles, int panel_shift, int first,
                    int count) {  // for tests: (row tile, column tile)
  const TileOrder order(row_tiles, column_tiles, panel_shift);
  py::list list;
  for (int tile = first; tile < first + count; ++tile) {
    int row_tile, column_tile;
    order.place(tile, row_tile, column_tile);
    list.append(py::make_tuple(row_tile, column_tile));
  }
  return list;
}

py::list wgmma_shares(int splits, int num_chunks) {  // for tests: of every CTA, chunks by warpgroup
  py::list ctas;
  for (int rank = 0; rank < splits; ++rank) {
    const WgmmaShare share(rank, splits, num_chunks);
    py::list warpgroups;
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
      py::list chunks;
      for (int chunk = share.begin; chunk < share.end; ++chunk) chunks.append(chunk);
      for (int i = 0; i < share.chunks(warpgroup == rank) - (share.end - share.begin); ++i) chunks.append(share.middle_begin + i);
      warpgroups.append(chunks);
    }
    ctas.append(warpgroups);
  }
  return ctas;
}

py::tuple wgmma_launches(std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks, int table_bytes,
                         int max_shared_bytes, const std::vector<int>& resident) {  // for tests: rows of the first, the launches
  WgmmaProblem problem{table_bytes, rows, num_columns, num_chunks, max_shared_bytes};
  for (std::size_t size = 1; size <= kWgmmaMaxSplits; ++size) problem.resident[size] = resident.at(size - 1);
  const WgmmaLaunches launches = choose_wgmma_launches(problem);
  const auto describe = [](const WgmmaSchedule& s) {
    return py::dict("columns_per_tile"_a = s.columns_per_tile, "splits"_a = s.splits, "tiles"_a = s.order.tiles(),
                    "workers"_a = s.workers, "stages"_a = s.stages, "shared_sums"_a = s.shared_sums,
                    "shared_stages"_a = s.shared_stages, "shared_bytes"_a = s.shared_bytes);
  };
  py::list schedules;
  schedules.append(describe(launches.first.schedule));
  if (launches.rows < rows) schedules.append(describe(launches.rest.schedule));
  return py::make_tuple(launches.rows, schedules);
}

Constants constants_at(const std::vector<Address>& tables, Address signs) {
  Constants constants{};
  for (std::size_t i = 0; i < tables.size() && i < kNumCodebooks; ++i) constants.tables[i] = at<const std::uint32_t>(tables[i]);
  constants.signs = at<const std::uint32_t>(signs);
  return constants;
}

void linear_at(const CudaPlan& plan, Constants constants, Address counters, Address x, int dtype, std::int64_t num_tokens,
               Address weight, Address row_scale, Address bias, Address y, Address workspace, int device, Address stream) {
  const DeviceScope scope(device);
  constants.counters = at<std::int32_t>(counters);
  linear(plan, constants,
         {at<const void>(x), static_cast<DType>(dtype), num_tokens, at<const std::uint8_t>(weight), at<const float>(row_scale),
          at<const void>(bias), at<void>(y), at<char>(workspace), stream_at(stream)});
}

void quantize_at(const CudaPlan& plan, const Constants& constants, Address x, int dtype, std::int64_t num_tokens,
                 Address workspace, int device, Address stream) {
  const DeviceScope scope(device);
  quantize_activations(plan, constants,
                       {at<const void>(x), static_cast<DType>(dtype), num_tokens, nullptr, nullptr, nullptr, nullptr,
                        at<char>(workspace), stream_at(stream)});
}

EncodeArgs encode_args(int codebook, Address weight, Address row_scale, std::int64_t rows, std::int64_t columns, Address codes,
                       Address q) {
  return {codebook_id(codebook),   at<const float>(weight), at<const float>(row_scale), rows, columns,
          at<std::uint8_t>(codes), at<std::int8_t>(q)};
}

void bind_encoder(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "encode_rows",
      [](int codebook, Address weight, Address row_scale, std::int64_t rows, std::int64_t columns, Address codes, Address q,
         int device, Address stream) {
        const DeviceScope scope(device);
        encode_rows(encode_args(codebook, weight, row_scale, rows, columns, codes, q), stream_at(stream));
      },
      Release());
  m.def(
      "encode_rows_with_feedback",
      [](int codebook, Address weight, Address row_scale, std::int64_t rows, std::int64_t columns, Address codes, Address q,
         Address factor, Address metrics, Address error, int device, Address stream) {
        const DeviceScope scope(device);
        encode_rows_with_feedback(encode_args(codebook, weight, row_scale, rows, columns, codes, q), at<const float>(factor),
                                  at<const float>(metrics), at<float>(error), stream_at(stream));
      },
      Release());
  m.def(
      "descend_rows",
      [](int codebook, Address weight, Address row_scale, std::int64_t rows, std::int64_t columns, Address codes, Address q,
         Address gradient, Address hessian, Address metrics, int device, Address stream) {
        const DeviceScope scope(device);
        descend_rows(encode_args(codebook, weight, row_scale, rows, columns, codes, q), at<float>(gradient),
                     at<const float>(hessian), at<const float>(metrics), stream_at(stream));
      },
      Release());
  m.def(
      "encoding_error",
      [](int codebook, Address weight, Address row_scale, std::int64_t rows, std::int64_t columns, std::int64_t stride,
         Address error, int device, Address stream) {
        const DeviceScope scope(device);
        encoding_error(codebook_id(codebook), at<const float>(weight), at<const float>(row_scale), rows, columns, stride,
                       at<float>(error), stream_at(stream));
      },
      Release());
}

void bind_decoder(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "canonical_workspace_bytes",
      [](int group_size, int num_pulses, int amplitude_bits, std::int64_t groups, std::int64_t rows) {
        return canonical_workspace_bytes({group_size, num_pulses, amplitude_bits, groups}, rows);
      },
      Release());
  m.def(
      "canonical_decode_rows",
      [](int group_size, int num_pulses, int amplitude_bits, std::int64_t groups, Address packed, Address levels,
         std::int64_t rows, Address q, Address fault, Address workspace, std::int64_t workspace_bytes, int device,
         Address stream) {
        const DeviceScope scope(device);
        canonical_decode_rows(at<const std::uint8_t>(packed), at<const float>(levels), rows,
                              {group_size, num_pulses, amplitude_bits, groups}, at<std::int8_t>(q), at<std::int64_t>(fault),
                              at<void>(workspace), workspace_bytes, stream_at(stream));
      },
      Release());
  m.def("canonical_fault", [](std::int64_t word) {  // (fault, row, group), fault 0: none
    const DecodeStatus status = canonical_fault(word);
    return std::make_tuple(static_cast<int>(status.fault), status.row, status.group);
  });
}

}  // namespace

void bind(py::module_ m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.attr("architectures") = PVQ_CUDA_ARCHITECTURES;
  m.attr("num_counters") = kNumCounters;

  py::class_<DeviceReport>(m, "DeviceReport")
      .def_readonly("name", &DeviceReport::name)
      .def_readonly("capability", &DeviceReport::capability)
      .def_readonly("code", &DeviceReport::code)
      .def_readonly("max_shared_bytes", &DeviceReport::max_shared_bytes)
      .def_readonly("driver_version", &DeviceReport::driver_version)
      .def_readonly("runtime_version", &DeviceReport::runtime_version)
      .def_readonly("fault", &DeviceReport::fault);
  m.def("describe_device", &describe_device, Release());
  m.def("capture_of", &capture_of);

  py::class_<CudaPlan>(m, "CudaPlan")
      .def(py::init<std::int64_t, const std::vector<std::pair<int, std::int64_t>>&, int, std::uint64_t, std::int64_t,
                    std::int64_t, const std::vector<int>&, int, int>(),
           py::arg("in_features"), py::arg("segments"), py::arg("num_planes"), py::arg("seed"), py::arg("first_column"),
           py::arg("rotation_blocks"), py::arg("factors"), py::arg("group_size") = 0, py::arg("num_pulses") = 0)
      .def_readonly("in_features", &CudaPlan::in_features)
      .def_readonly("out_features", &CudaPlan::out_features)
      .def_readonly("packed_rows", &CudaPlan::packed_rows)
      .def_readonly("weight_bytes", &CudaPlan::weight_bytes)
      .def_readonly("num_planes", &CudaPlan::num_planes)
      .def_readonly("sign_bits", &CudaPlan::sign_bits)
      .def_property_readonly("segments", &segments_of)
      .def("shared_bytes", &quantizer_shared_bytes)
      .def("workspace_bytes",
           [](const CudaPlan& plan, std::int64_t num_tokens, int device) {
             const DeviceScope scope(device);
             return workspace_bytes(plan, num_tokens);
           })
      .def("workspace_offsets", &offsets_of);
  py::class_<Constants>(m, "Constants").def(py::init(&constants_at), py::arg("tables"), py::arg("signs"));

  m.def("expansion_order", &expansion_order);
  m.def("tile_order", &tile_order);
  m.def("wgmma_shares", &wgmma_shares);
  m.def("wgmma_launches", &wgmma_launches);
  m.def("many_columns_wgmma_first_rows",  // for tests
        [](int codebook, std::int64_t rows, std::int64_t num_columns, std::int64_t num_chunks, int device) {
          const DeviceScope scope(device);
          return many_columns_wgmma_first_rows(codebook_id(codebook), rows, num_columns, num_chunks);
        });
  m.def("device_table", [](int codebook) { return device_table(codebook_id(codebook)); });
  m.def(
      "pack_rows",
      [](int codebook, Address codes, std::int64_t rows, std::int64_t in_features, std::int64_t first_row, Address weight,
         Address table, Address invalid_row, int device, Address stream) {
        const DeviceScope scope(device);
        pack_rows(codebook_id(codebook), at<const std::uint8_t>(codes), rows, in_features, first_row, at<std::uint8_t>(weight),
                  at<const std::uint32_t>(table), at<std::int64_t>(invalid_row), stream_at(stream));
      },
      Release());
  m.def(
      "unpack_rows",
      [](int codebook, Address weight, std::int64_t first_row, std::int64_t rows, std::int64_t in_features, Address table,
         Address q, int device, Address stream) {
        const DeviceScope scope(device);
        unpack_rows(codebook_id(codebook), at<const std::uint8_t>(weight), first_row, rows, in_features,
                    at<const std::uint32_t>(table), at<std::int8_t>(q), stream_at(stream));
      },
      Release());
  m.def("linear", &linear_at, Release());
  m.def(
      "prepare",
      [](const CudaPlan& plan, int device) {
        const DeviceScope scope(device);
        prepare(plan);
      },
      Release());
  m.def("num_prepared", [](int device) {  // kernels; for tests
    const DeviceScope scope(device);
    return num_allowed();
  });
  m.def("quantize_activations", &quantize_at, Release());
  bind_encoder(m);
  bind_decoder(m);
}

}  // namespace pvq::cuda
