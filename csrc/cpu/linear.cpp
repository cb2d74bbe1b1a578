// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../hadamard.h"
#include "parallel.h"

namespace pvq::cpu {
namespace {

constexpr std::int64_t kAmxColumns = 64;       // columns of a tile
constexpr std::int64_t kAmxRows = 32;          // activation rows of a step
constexpr std::int64_t kPanelCacheBytes = 768 << 10;  // decoded weights that a core works through tile by tile
constexpr std::int64_t kAmxMinRows = 4;        // below, decoding dominates and vpdpbusd is as fast
constexpr std::int64_t kSerialWeights = 1 << 17;  // weights times rows that are not worth waking a thread for

std::int64_t round_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A buffer that grows and is reused by the thread that owns it; 64-byte aligned.
class Scratch {
 public:
  template <typename T>
  T* get(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
    if (buffer_.size() < bytes) buffer_ = std::vector<std::uint8_t>(bytes);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(buffer_.data());
    return reinterpret_cast<T*>((address + 63) & ~std::uintptr_t{63});
  }

 private:
  std::vector<std::uint8_t> buffer_;
};

std::size_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One token: load, rotate, quantize. planes[p] receives in_features bytes.
void quantize_token(const LinearPlan& plan, const CpuKernels& kernels, const void* x, DType dtype, int offset,
                    std::uint8_t* const* planes, float* token_scale, std::int32_t* const* token_sum) {
  thread_local Scratch floats;
  const std::int64_t n = plan.in_features;
  float* y = floats.get<float>(2 * n + 16);
  float* scratch = y + round_up(n, 16);
  kernels.load(x, dtype, plan.signs.empty() ? nullptr : plan.signs.data(), n, y);
  if (!plan.factors.empty())
    for (std::int64_t begin = 0; begin < n; begin += plan.block_width)
      kernels.rotate(y + begin, scratch, plan.block_width, plan.factors.data(), static_cast<int>(plan.factors.size()));
  const std::uint32_t magnitude = kernels.max_magnitude(y, n);
  float largest;
  std::memcpy(&largest, &magnitude, sizeof largest);
  if (magnitude >= 0x7f800000u || largest < 0x1p-60f) {
    *token_scale = magnitude >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    for (int p = 0; p < plan.num_planes; ++p) {
      std::memset(planes[p], offset, static_cast<std::size_t>(n));
      *token_sum[p] = 0;
    }
    return;
  }
  *token_scale = largest * plan.scale_constant;
  if (plan.num_planes == 1) {
    *token_sum[0] = kernels.quantize_a8(y, n, 127.0f / largest, offset, planes[0]);
  } else {
    kernels.quantize_a16(y, n, 32512.0f / largest, offset, planes[0], planes[1], token_sum[0], token_sum[1]);
  }
}

struct Activations {
  std::uint8_t* rows;       // [num_planes * num_tokens, stride]: all tokens of plane 0, then of plane 1
  std::int64_t stride;      // bytes
  int offset;
  float* token_scale;       // [num_tokens]
  std::int32_t* token_sum;  // [num_planes, num_tokens]
};

void quantize_all(const LinearPlan& plan, const CpuKernels& kernels, const void* x, DType dtype, std::int64_t num_tokens,
                  const Activations& a) {
  const std::int64_t grain = std::max<std::int64_t>(1, 8192 / plan.in_features);
  parallel_for(num_tokens, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t token = begin; token < end; ++token) {
      std::uint8_t* planes[2] = {};
      std::int32_t* sums[2] = {};
      for (int p = 0; p < plan.num_planes; ++p) {
        const std::int64_t row = p * num_tokens + token;
        planes[p] = a.rows + row * a.stride;
        sums[p] = a.token_sum + row;
        std::memset(planes[p] + plan.in_features, 0, static_cast<std::size_t>(a.stride - plan.in_features));
      }
      const std::size_t token_bytes = static_cast<std::size_t>(plan.in_features) * dtype_bytes(dtype);
      quantize_token(plan, kernels, static_cast<const char*>(x) + static_cast<std::size_t>(token) * token_bytes, dtype, a.offset,
                     planes, a.token_scale + token, sums);
    }
  });
}

struct Product {
  const LinearPlan& plan;
  const LinearArgs& args;
  const CpuKernels& kernels;
  const Activations& a;

  // Tokens [first_token, first_token + num_tokens) of one block; `sums` points at the first of them.
  FinishArgs finish_args(const Segment& segment, std::int64_t block, std::int64_t first_token, std::int64_t num_tokens,
                         const std::int32_t* sums, std::int64_t sum_stride, std::int64_t plane_stride) const {
    const std::int64_t first = block * kLanes, packed = segment.packed_row + first, output = segment.output_row + first;
    const std::size_t bytes = dtype_bytes(args.dtype);
    FinishArgs f{};
    f.sums = sums;
    f.sum_stride = sum_stride;
    f.plane_stride = plane_stride;
    f.num_tokens = num_tokens;
    f.num_planes = plan.num_planes;
    f.activation_offset = a.offset;
    f.half_offset = segment.codebook == CodebookId::kInt8 ? 0 : 1;
    f.row_scale = args.row_scale + packed;
    f.row_sum = args.row_sum + packed;
    f.token_sum = a.token_sum + first_token;
    f.token_stride = args.num_tokens;
    f.token_scale = a.token_scale + first_token;
    f.bias = args.bias == nullptr ? nullptr : static_cast<const char*>(args.bias) + static_cast<std::size_t>(output) * bytes;
    f.dtype = args.dtype;
    f.y = static_cast<char*>(args.y) + static_cast<std::size_t>(first_token * plan.out_features + output) * bytes;
    f.y_stride = plan.out_features;
    f.num_lanes = static_cast<int>(std::min<std::int64_t>(kLanes, segment.rows - first));
    return f;
  }

  // Blocks [begin, end) of a segment, one at a time: decode and multiply at once for few rows, decode once for more.
  void by_block(const Segment& segment, std::int64_t begin, std::int64_t end) const {
    thread_local Scratch panel_scratch, sum_scratch;
    const std::int64_t rows = plan.num_planes * args.num_tokens;
    const int book = static_cast<int>(segment.codebook), groups = static_cast<int>(plan.in_features / kGroupSize);
    std::int32_t* sums = sum_scratch.get<std::int32_t>(rows * kLanes);
    const bool decode = rows > kMaxDotRows && kernels.decode[book] != nullptr;
    for (std::int64_t block = begin; block < end; ++block) {
      DotArgs dot{};
      dot.block = args.weight + segment.weight_offset + block * groups * kBlockBytes[book];
      dot.num_groups = groups;
      dot.stride = a.stride;
      if (decode) {
        std::int8_t* panel = panel_scratch.get<std::int8_t>(plan.in_features * kLanes);
        kernels.decode[book](dot.block, groups, panel);
        dot.block = reinterpret_cast<const std::uint8_t*>(panel);
      }
      const auto function = kernels.dot[decode ? static_cast<int>(CodebookId::kInt8) : book];
      for (std::int64_t row = 0; row < rows; row += kMaxDotRows) {
        dot.activations = a.rows + row * a.stride;
        dot.num_rows = static_cast<int>(std::min<std::int64_t>(kMaxDotRows, rows - row));
        dot.sums = sums + row * kLanes;
        function(dot);
      }
      kernels.finish(finish_args(segment, block, 0, args.num_tokens, sums, kLanes, args.num_tokens * kLanes));
    }
  }

  // The same for pairs of blocks on AMX tiles. As many pairs as the second-level cache holds are decoded at once; then each tile of
  // tokens meets all of them, so that its activations are read and its outputs written close together.
  void by_tile(const Segment& segment, std::int64_t begin, std::int64_t end) const {
    thread_local Scratch panel_scratch;
    alignas(64) std::int32_t sums[2 * kAmxRows * 2 * kLanes];  // [plane, token, lane of either block]
    constexpr std::int64_t kPlaneStride = kAmxRows * 2 * kLanes;
    const std::int64_t groups = plan.in_features / kGroupSize, padded = round_up(plan.in_features, kAmxColumns);
    const std::int64_t panel_bytes = padded * kLanes;
    const int book = static_cast<int>(segment.codebook);
    const bool decode = kernels.decode[book] != nullptr, in_place = !decode && padded == plan.in_features;
    const std::int64_t held = std::max<std::int64_t>(2, kPanelCacheBytes / panel_bytes / 2 * 2);
    std::int8_t* panels = panel_scratch.get<std::int8_t>(std::min(held, round_up(end - begin, 2)) * panel_bytes);
    amx_configure();
    for (std::int64_t first = begin; first < end; first += held) {
      const std::int64_t count = std::min(held, end - first);
      const std::uint8_t* packed = args.weight + segment.weight_offset + first * groups * kBlockBytes[book];
      const std::int8_t* panel = in_place ? reinterpret_cast<const std::int8_t*>(packed) : panels;
      for (std::int64_t i = 0; !in_place && i < count; ++i) {
        const std::uint8_t* from = packed + i * groups * kBlockBytes[book];
        if (decode) {
          kernels.decode[book](from, static_cast<int>(groups), panels + i * panel_bytes);
        } else {  // tiles reach past the last column: activations are 0 there, but the memory has to exist
          std::memcpy(panels + i * panel_bytes, from, static_cast<std::size_t>(plan.in_features * kLanes));
        }
      }
      for (std::int64_t token = 0; token < args.num_tokens; token += kAmxRows) {
        const std::int64_t num_tokens = std::min(kAmxRows, args.num_tokens - token);
        for (std::int64_t i = 0; i < count; i += 2) {
          const std::int8_t* low = panel + i * panel_bytes;
          const std::int8_t* high = i + 1 < count ? low + panel_bytes : low;
          for (int plane = 0; plane < plan.num_planes; ++plane)
            amx_dot(low, high, padded, a.rows + (plane * args.num_tokens + token) * a.stride, a.stride, num_tokens,
                    sums + plane * kPlaneStride);
          for (std::int64_t half = 0; half < 2 && i + half < count; ++half)
            kernels.finish(finish_args(segment, first + i + half, token, num_tokens, sums + half * kLanes, 2 * kLanes, kPlaneStride));
        }
      }
    }
    amx_release();
  }
};

}  // namespace

LinearPlan::LinearPlan(std::int64_t in, const std::vector<std::pair<int, std::int64_t>>& parts, int planes, std::uint64_t seed,
                       std::int64_t first_column, std::int64_t rotation_blocks, const std::vector<int>& orders)
    : in_features(in), num_planes(planes) {
  if (in <= 0 || in % kGroupSize != 0 || in > 65536)
    throw std::invalid_argument("in_features is " + std::to_string(in) + "; it must be a multiple of 8 up to 65536.");
  if (planes != 1 && planes != 2) throw std::invalid_argument("num_planes must be 1 (a8) or 2 (a16).");
  for (const auto& [codebook, rows] : parts) {
    if (codebook < 0 || codebook >= kNumCodebooks || rows <= 0)
      throw std::invalid_argument("a segment has codebook " + std::to_string(codebook) + " and " + std::to_string(rows) + " rows.");
    Segment segment{static_cast<CodebookId>(codebook), rows};
    segment.blocks = (rows + kLanes - 1) / kLanes;
    segment.weight_offset = weight_bytes;
    segment.packed_row = packed_rows;
    segment.output_row = out_features;
    weight_bytes += segment.blocks * (in / kGroupSize) * kBlockBytes[codebook];
    packed_rows += segment.blocks * kLanes;
    out_features += rows;
    segments.push_back(segment);
  }
  if (rotation_blocks > 0) {
    if (in % rotation_blocks != 0) throw std::invalid_argument("rotation_blocks does not divide in_features.");
    block_width = in / rotation_blocks;
    std::int64_t product = 1;
    for (const int order : orders) product *= order;
    if (orders.empty() || product != block_width)
      throw std::invalid_argument("the rotation factors do not multiply to the block width " + std::to_string(block_width) + ".");
    matrices.reserve(orders.size());
    for (std::size_t i = 0; i < orders.size(); ++i) {
      const bool power_of_two = (orders[i] & (orders[i] - 1)) == 0;
      if (power_of_two && i + 1 != orders.size()) throw std::invalid_argument("only the last rotation factor may be a power of two.");
      if (!power_of_two) matrices.push_back(dense_hadamard(orders[i]));
      factors.push_back({orders[i], power_of_two ? nullptr : matrices.back().data()});
    }
    signs = rotation_signs(seed, first_column, in);
  }
  const double levels = planes == 1 ? 127.0 : 32512.0;
  scale_constant = static_cast<float>(1.0 / (levels * std::sqrt(static_cast<double>(block_width))));
}

void linear(const LinearPlan& plan, const LinearArgs& args) {
  // The caller's thread owns these; the workers of parallel_for only read and write through them.
  thread_local Scratch rows_scratch, scale_scratch, sum_scratch;
  if (args.num_tokens <= 0) return;
  const CpuKernels& kernels = active_kernels();
  const std::int64_t rows = plan.num_planes * args.num_tokens;
  const bool tiles = amx_active() && rows >= kAmxMinRows;
  Activations a{};
  // An odd number of cache lines a row: rows a power of two apart would share a few sets of the cache.
  a.stride = tiles ? (round_up(plan.in_features, kAmxColumns) / kAmxColumns | 1) * kAmxColumns : plan.in_features;
  a.offset = tiles ? 0 : kernels.activation_offset;
  a.rows = rows_scratch.get<std::uint8_t>((rows + kAmxRows) * a.stride);  // tiles read whole, whatever is behind the last row
  a.token_scale = scale_scratch.get<float>(args.num_tokens);
  a.token_sum = sum_scratch.get<std::int32_t>(rows);
  quantize_all(plan, kernels, args.x, args.dtype, args.num_tokens, a);

  const Product product{plan, args, kernels, a};
  for (const Segment& segment : plan.segments) {
    const std::int64_t unit = tiles ? 2 : 1;  // blocks
    const std::int64_t grain = std::max<std::int64_t>(1, kSerialWeights / (unit * kLanes * plan.in_features * rows));
    parallel_for((segment.blocks + unit - 1) / unit, grain, [&](std::int64_t begin, std::int64_t end, int) {
      const std::int64_t last = std::min(segment.blocks, end * unit);
      if (tiles) {
        product.by_tile(segment, begin * unit, last);
      } else {
        product.by_block(segment, begin * unit, last);
      }
    });
  }
}

void quantize_activations(const LinearPlan& plan, const void* x, DType dtype, std::int64_t num_tokens, std::int8_t* planes,
                          float* token_scale) {
  std::vector<std::int32_t> sums(static_cast<std::size_t>(plan.num_planes * num_tokens));
  const Activations a{reinterpret_cast<std::uint8_t*>(planes), plan.in_features, 0, token_scale, sums.data()};
  quantize_all(plan, active_kernels(), x, dtype, num_tokens, a);
}

}  // namespace pvq::cpu
