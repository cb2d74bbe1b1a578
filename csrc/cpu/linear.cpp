// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "../hadamard.h"
#include "../plan_checks.h"
#include "parallel.h"

namespace pvq::cpu {
namespace {

constexpr std::int64_t kPanelCacheBytes = 768 << 10;  // decoded weights that a core works through tile by tile
constexpr std::int64_t kSharedPanelBytes = 5 << 19;   // decoded weights of a layer whose tokens are spread over the threads
constexpr std::int64_t kSharedTilesPerThread = 4;     // tiles of tokens a thread should get for that
constexpr std::int64_t kAmxMinRows = 4;               // below, decoding dominates and vpdpbusd is as fast
constexpr std::int64_t kSerialWeights = 1 << 17;      // weights times rows that are not worth waking a thread for

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

// One token: load, rotate, project if the plan says so, quantize. planes[p] receives in_features bytes.
void quantize_token(const LinearPlan& plan, const CpuKernels& kernels, const void* x, DType dtype, int offset,
                    std::uint8_t* const* planes, float* token_scale, std::int32_t* const* token_sum) {
  thread_local Scratch floats;
  const std::int64_t n = plan.in_features;
  const bool projected = plan.projection.group_size > 0;
  float* y = floats.get<float>(2 * round_up(n, 16) + n / kMinProjectedGroup);
  float* scratch = y + round_up(n, 16);
  float* group_scale = scratch + round_up(n, 16);
  kernels.load(x, dtype, plan.signs.empty() ? nullptr : plan.signs.data(), n, y);
  if (!plan.factors.empty())
    for (std::int64_t begin = 0; begin < n; begin += plan.block_width)
      kernels.rotate(y + begin, scratch, plan.block_width, plan.factors.data(), static_cast<int>(plan.factors.size()));
  float largest;
  if (projected) {
    largest = kernels.project(y, n, plan.projection.group_size, plan.projection.num_pulses, group_scale);
  } else {
    const std::uint32_t magnitude = kernels.max_magnitude(y, n);
    std::memcpy(&largest, &magnitude, sizeof largest);
  }
  const bool finite = std::isfinite(largest);
  if (!finite || largest < 0x1p-60f) {
    *token_scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    for (int p = 0; p < plan.num_planes; ++p) {
      std::memset(planes[p], offset, static_cast<std::size_t>(n));
      *token_sum[p] = 0;
    }
    return;
  }
  *token_scale = largest * plan.scale_constant;
  if (projected) {
    *token_sum[0] = kernels.quantize_pulses(y, n, plan.projection.group_size, group_scale, 127.0f / largest, offset, planes[0]);
  } else if (plan.num_planes == 1) {
    *token_sum[0] = kernels.quantize_a8(y, n, 127.0f / largest, offset, planes[0]);
  } else {
    kernels.quantize_a16(y, n, 32512.0f / largest, offset, planes[0], planes[1], token_sum[0], token_sum[1]);
  }
}

struct Activations {
  std::uint8_t* rows;   // [num_planes * num_tokens, stride]: all tokens of plane 0, then of plane 1
  std::int64_t stride;  // bytes
  int offset;
  float* token_scale;       // [num_tokens]
  std::int32_t* token_sum;  // [num_planes, num_tokens]
};

// Tokens [begin, end) of x into rows 0, 1, … of each plane of `a`; plane_rows: rows from a plane to the next.
void quantize_tokens(const LinearPlan& plan, const CpuKernels& kernels, const void* x, DType dtype, std::int64_t begin,
                     std::int64_t end, std::int64_t plane_rows, const Activations& a) {
  const std::size_t token_bytes = static_cast<std::size_t>(plan.in_features) * dtype_bytes(dtype);
  const char* from = static_cast<const char*>(x) + static_cast<std::size_t>(begin) * token_bytes;
  for (std::int64_t token = begin; token < end; ++token, from += token_bytes) {
    std::uint8_t* planes[2] = {};
    std::int32_t* sums[2] = {};
    for (int p = 0; p < plan.num_planes; ++p) {
      const std::int64_t row = p * plane_rows + token - begin;
      planes[p] = a.rows + row * a.stride;
      sums[p] = a.token_sum + row;
      std::memset(planes[p] + plan.in_features, 0, static_cast<std::size_t>(a.stride - plan.in_features));
    }
    quantize_token(plan, kernels, from, dtype, a.offset, planes, a.token_scale + token - begin, sums);
  }
}

void quantize_all(const LinearPlan& plan, const CpuKernels& kernels, const void* x, DType dtype, std::int64_t num_tokens,
                  const Activations& a) {
  const std::int64_t grain = std::max<std::int64_t>(1, 8192 / plan.in_features);
  parallel_for(num_tokens, grain, [&](std::int64_t begin, std::int64_t end, int) {
    const Activations from_begin{a.rows + begin * a.stride, a.stride, a.offset, a.token_scale + begin, a.token_sum + begin};
    quantize_tokens(plan, kernels, x, dtype, begin, end, num_tokens, from_begin);
  });
}

// What is known of finish() before there are sums: block `block` of a segment, y at token 0.
FinishArgs finish_args(const LinearPlan& plan, const LinearArgs& args, const Segment& segment, std::int64_t block) {
  const std::int64_t first = block * kLanes, packed = segment.packed_row + first, output = segment.output_row + first;
  const std::size_t offset = static_cast<std::size_t>(output) * dtype_bytes(args.dtype);
  FinishArgs f{};
  f.num_planes = plan.num_planes;
  f.half_offset = segment.codebook == CodebookId::kInt8 ? 0 : 1;
  f.row_scale = args.row_scale + packed;
  f.row_sum = args.row_sum + packed;
  f.bias = args.bias == nullptr ? nullptr : static_cast<const char*>(args.bias) + offset;
  f.dtype = args.dtype;
  f.y = static_cast<char*>(args.y) + offset;
  f.y_stride = plan.out_features;
  f.num_lanes = static_cast<int>(std::min<std::int64_t>(kLanes, segment.rows - first));
  return f;
}

struct BlockProduct {
  const LinearPlan& plan;
  const LinearArgs& args;
  const CpuKernels& kernels;
  const Activations& a;

  // Blocks [begin, end) of a segment, one at a time: decode and multiply at once for few rows, decode once for more.
  void run(const Segment& segment, std::int64_t begin, std::int64_t end) const {
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
      FinishArgs f = finish_args(plan, args, segment, block);
      f.sums = sums;
      f.sum_stride = kLanes;
      f.plane_stride = args.num_tokens * kLanes;
      f.num_tokens = f.token_stride = args.num_tokens;
      f.activation_offset = a.offset;
      f.token_sum = a.token_sum;
      f.token_scale = a.token_scale;
      kernels.finish(f);
    }
  }
};

// The product on AMX tiles, pairs of blocks at a time.
class TileProduct {
 public:
  TileProduct(const LinearPlan& plan, const LinearArgs& args, const CpuKernels& kernels)
      : plan_(plan), args_(args), kernels_(kernels), padded_(round_up(plan.in_features, kAmxColumns)) {
    for (const Segment& segment : plan.segments) num_pairs_ += (segment.blocks + 1) / 2;
  }

  // An odd number of cache lines a row: rows a power of two apart would share a few sets of the cache.
  std::int64_t stride() const { return (padded_ / kAmxColumns | 1) * kAmxColumns; }

  // A small layer and many tokens: all weights are decoded once and every thread takes tiles of tokens as it gets done, quantizes
  // them into its first-level cache and multiplies them by all weights.
  bool by_tokens() const {
    return 2 * num_pairs_ * panel_bytes() <= kSharedPanelBytes &&
           args_.num_tokens >= kSharedTilesPerThread * max_threads() * kAmxRows;
  }

  void run_by_tokens() const {
    thread_local Scratch panel_scratch, pair_scratch;
    std::int8_t* panels = panel_scratch.get<std::int8_t>(2 * num_pairs_ * panel_bytes());
    AmxPair* pairs = pair_scratch.get<AmxPair>(num_pairs_);
    parallel_for_chunks(
        num_pairs_, std::max<std::int64_t>(1, kSerialWeights / (2 * panel_bytes())),
        [&](std::int64_t begin, std::int64_t end) { decode(begin, end, panels + 2 * begin * panel_bytes(), pairs + begin); });
    parallel_for_chunks(args_.num_tokens, kAmxRows, [&](std::int64_t begin, std::int64_t end) {
      thread_local Scratch row_scratch;
      std::int32_t token_sum[2 * kAmxRows];
      float token_scale[kAmxRows];
      std::uint8_t* rows = row_scratch.get<std::uint8_t>(plan_.num_planes * kAmxRows * stride());
      const Activations a{rows, stride(), 0, token_scale, token_sum};
      amx_configure();
      for (std::int64_t token = begin; token < end; token += kAmxRows) {
        const std::int64_t last = std::min(end, token + kAmxRows);
        quantize_tokens(plan_, kernels_, args_.x, args_.dtype, token, last, kAmxRows, a);
        amx_tiles(pairs, num_pairs_,
                  {a.rows, a.stride, kAmxRows * a.stride, padded_, token, last - token, token_sum, kAmxRows, token_scale});
      }
      amx_release();
    });
  }

  // Any other: threads take pairs. As many as the second-level cache holds are decoded at once; then each tile of tokens meets
  // all of them, so that its activations are read and its outputs written close together.
  void run_by_rows(const Activations& a) const {
    const std::int64_t held = std::max<std::int64_t>(1, kPanelCacheBytes / panel_bytes() / 2);
    const std::int64_t grain = kSerialWeights / (2 * kLanes * plan_.in_features * plan_.num_planes * args_.num_tokens);
    parallel_for(num_pairs_, grain, [&](std::int64_t begin, std::int64_t end, int) {
      thread_local Scratch panel_scratch, pair_scratch;
      const std::int64_t most = std::min(held, end - begin);
      std::int8_t* panels = panel_scratch.get<std::int8_t>(2 * most * panel_bytes());
      AmxPair* pairs = pair_scratch.get<AmxPair>(most);
      amx_configure();
      for (std::int64_t first = begin; first < end; first += held) {
        const std::int64_t count = std::min(held, end - first);
        decode(first, first + count, panels, pairs);
        for (std::int64_t token = 0; token < args_.num_tokens; token += kAmxRows)
          amx_tiles(pairs, count,
                    {a.rows + token * a.stride, a.stride, args_.num_tokens * a.stride, padded_, token,
                     std::min(kAmxRows, args_.num_tokens - token), a.token_sum + token, args_.num_tokens, a.token_scale + token});
      }
      amx_release();
    });
  }

 private:
  std::int64_t panel_bytes() const { return padded_ * kLanes; }

  // Pairs [begin, end) of all segments together, their panels one after the other from `panels`.
  void decode(std::int64_t begin, std::int64_t end, std::int8_t* panels, AmxPair* pairs) const {
    std::int64_t first = 0;  // of the segment
    for (const Segment& segment : plan_.segments) {
      const std::int64_t count = (segment.blocks + 1) / 2;
      for (std::int64_t i = std::max(begin, first); i < std::min(end, first + count); ++i)
        pairs[i - begin] = decode_pair(segment, 2 * (i - first), panels + 2 * (i - begin) * panel_bytes());
      first += count;
    }
  }

  AmxPair decode_pair(const Segment& segment, std::int64_t block, std::int8_t* panels) const {
    const std::int64_t groups = plan_.in_features / kGroupSize;
    const int book = static_cast<int>(segment.codebook);
    AmxPair pair{};
    pair.finish = finish_args(plan_, args_, segment, block);
    for (int i = 0; i < 2 && block + i < segment.blocks; ++i) {
      const std::uint8_t* packed = args_.weight + segment.weight_offset + (block + i) * groups * kBlockBytes[book];
      pair.panels[i] = panels + i * panel_bytes();
      pair.num_lanes[i] = static_cast<int>(std::min<std::int64_t>(kLanes, segment.rows - (block + i) * kLanes));
      if (kernels_.decode[book] != nullptr) {
        kernels_.decode[book](packed, static_cast<int>(groups), panels + i * panel_bytes());
      } else if (padded_ == plan_.in_features) {
        pair.panels[i] = reinterpret_cast<const std::int8_t*>(packed);
      } else {  // tiles reach past the last column: activations are 0 there, but the memory has to exist
        std::memcpy(panels + i * panel_bytes(), packed, static_cast<std::size_t>(plan_.in_features * kLanes));
      }
    }
    if (pair.num_lanes[1] == 0) pair.panels[1] = pair.panels[0];
    return pair;
  }

  const LinearPlan& plan_;
  const LinearArgs& args_;
  const CpuKernels& kernels_;
  std::int64_t padded_, num_pairs_ = 0;
};

}  // namespace

LinearPlan::LinearPlan(std::int64_t in, const std::vector<std::pair<int, std::int64_t>>& parts, int planes, std::uint64_t seed,
                       std::int64_t first_column, std::int64_t rotation_blocks, const std::vector<int>& orders, int group_size,
                       int num_pulses)
    : in_features(in), num_planes(planes), projection{group_size, num_pulses} {
  check_layer(in, parts, planes);
  check_projection(in, planes, projection);
  for (const auto& [codebook, rows] : parts) {
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
    block_width = rotation_block_width(in, rotation_blocks, orders);
    matrices.reserve(orders.size());
    for (const int order : orders) {
      if (!is_power_of_two(order)) matrices.push_back(dense_hadamard(order));
      factors.push_back({order, is_power_of_two(order) ? nullptr : matrices.back().data()});
    }
    signs = rotation_signs(seed, first_column, in);
  }
  scale_constant = activation_constant(planes, block_width);
}

void linear(const LinearPlan& plan, const LinearArgs& args) {
  // The caller's thread owns these; the workers of parallel_for only read and write through them.
  thread_local Scratch rows_scratch, scale_scratch, sum_scratch;
  if (args.num_tokens <= 0) return;
  const CpuKernels& kernels = active_kernels();
  const std::int64_t rows = plan.num_planes * args.num_tokens;
  const bool tiles = amx_active() && rows >= kAmxMinRows;
  const TileProduct tile_product(plan, args, kernels);
  if (tiles && tile_product.by_tokens()) return tile_product.run_by_tokens();

  Activations a{};
  a.stride = tiles ? tile_product.stride() : plan.in_features;
  a.offset = tiles ? 0 : kernels.activation_offset;
  a.rows = rows_scratch.get<std::uint8_t>((rows + kAmxRows) * a.stride);  // tiles read whole, whatever is behind the last row
  a.token_scale = scale_scratch.get<float>(args.num_tokens);
  a.token_sum = sum_scratch.get<std::int32_t>(rows);
  quantize_all(plan, kernels, args.x, args.dtype, args.num_tokens, a);
  if (tiles) return tile_product.run_by_rows(a);

  const BlockProduct product{plan, args, kernels, a};
  for (const Segment& segment : plan.segments) {
    const std::int64_t grain = kSerialWeights / (kLanes * plan.in_features * rows);
    parallel_for(segment.blocks, grain, [&](std::int64_t begin, std::int64_t end, int) { product.run(segment, begin, end); });
  }
}

void quantize_activations(const LinearPlan& plan, const void* x, DType dtype, std::int64_t num_tokens, std::int8_t* planes,
                          float* token_scale) {
  std::vector<std::int32_t> sums(static_cast<std::size_t>(plan.num_planes * num_tokens));
  const Activations a{reinterpret_cast<std::uint8_t*>(planes), plan.in_features, 0, token_scale, sums.data()};
  quantize_all(plan, active_kernels(), x, dtype, num_tokens, a);
}

}  // namespace pvq::cpu
