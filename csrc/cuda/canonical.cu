// SPDX-License-Identifier: Apache-2.0
// The enumeration is that of csrc/canonical.cpp; here a thread takes a group through the rows U(l, .), l = D .. 1. The rows lie
// in device memory in bands: as many as fit and have the same number of significant words. Between two bands a group is its index
// r = N - index, the pulses that are left and the pulses so far, all in the workspace with the groups side by side, so that a
// thread needs no memory of its own and neighbours read neighbours, however long an index is.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "canonical.h"
#include "launch.h"
#include "layout.h"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 128;
constexpr std::int64_t kMaxTableBytes = std::int64_t{32} << 20;  // of one band
constexpr std::int64_t kAlignment = 16;

// A fault as a number that is smaller the earlier it is: row, group in 18 bits, Fault in 2.
constexpr int kGroupBits = 18, kFaultBits = 2;
constexpr std::int64_t kNoGroup = (std::int64_t{1} << kGroupBits) - 1;

struct Batch {
  const std::uint8_t* packed;
  const float* levels;
  std::int64_t first_row, num_groups;  // num_groups: of all rows of the batch
  std::int64_t row_bytes, groups;      // groups: of a row
  int group_size, num_pulses, amplitude_bits, index_bits, words;
  std::int8_t* q;  // of the first group
  std::int64_t* fault;
  std::uint64_t* table;
  std::uint64_t* rest;   // r, [words][num_groups]
  std::int16_t* pulses;  // [D][num_groups]
  std::int16_t* left;    // [num_groups]
};

__device__ void report(const Batch& b, std::int64_t row, std::int64_t group, Fault fault) {
  const std::int64_t word = ((b.first_row + row) << kGroupBits | group) << kFaultBits | static_cast<std::int64_t>(fault);
  atomicMin(reinterpret_cast<long long*>(b.fault), static_cast<long long>(word));
}

// At most 64 bits of a row, from bit `position` on; reads no byte without one of them.
__device__ std::uint64_t read_bits(const std::uint8_t* row, std::int64_t position, int bits) {
  if (bits == 0) return 0;
  const std::uint8_t* byte = row + (position >> 3);
  const int shift = static_cast<int>(position & 7);
  std::uint64_t value = byte[0] >> shift;
  for (int have = 8 - shift, i = 1; have < bits; have += 8, ++i) value |= static_cast<std::uint64_t>(byte[i]) << have;
  return bits == 64 ? value : value & ((std::uint64_t{1} << bits) - 1);
}

// value - a - borrow; borrow 0 or 1, before and after.
__device__ std::uint64_t subtract(std::uint64_t value, std::uint64_t a, std::uint64_t& borrow) {
  const std::uint64_t d = value - a, out = d - borrow;
  borrow = static_cast<std::uint64_t>(value < a) | static_cast<std::uint64_t>(d < borrow);
  return out;
}

// r = N - index of every group; an index of N or more is a fault, and r = 1 goes on in its place.
__global__ void __launch_bounds__(kThreads) read_indices(const __grid_constant__ Batch b, const std::uint64_t* size) {
  wait_for_dependencies();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= b.num_groups) return;
  const std::int64_t row = i / b.groups, group = i % b.groups;
  const std::uint8_t* bytes = b.packed + row * b.row_bytes;
  const std::int64_t position = group * (b.index_bits + b.amplitude_bits);
  std::uint64_t borrow = 0, any = 0;
  for (int w = 0; w < b.words; ++w) {
    const std::uint64_t index = read_bits(bytes, position + 64 * w, min(64, max(0, b.index_bits - 64 * w)));
    const std::uint64_t r = subtract(size[w], index, borrow);
    any |= r;
    b.rest[w * b.num_groups + i] = r;
  }
  if (borrow != 0 || any == 0) {
    report(b, row, group, Fault::kIndex);
    for (int w = 0; w < b.words; ++w) b.rest[w * b.num_groups + i] = w == 0;
  }
  b.left[i] = static_cast<std::int16_t>(b.num_pulses);
  const int used = static_cast<int>(b.groups * (b.index_bits + b.amplitude_bits) % 8);
  if (group == 0 && used != 0 && bytes[b.row_bytes - 1] >> used != 0) report(b, row, kNoGroup, Fault::kPadding);
}

// r > 2 a
__device__ bool greater_than_double(const std::uint64_t* r, std::int64_t stride, const std::uint64_t* a, int width) {
  for (int w = width - 1; w >= 0; --w) {
    const std::uint64_t value = r[w * stride], doubled = a[w] << 1 | (w > 0 ? a[w - 1] >> 63 : 0);
    if (value != doubled) return value > doubled;
  }
  return false;
}

// r -= a + b if that leaves more than zero or `always`; is it done?
__device__ bool subtract_two(std::uint64_t* r, std::int64_t stride, const std::uint64_t* a, const std::uint64_t* b, int width,
                             bool always) {
  if (!always) {
    std::uint64_t borrow_a = 0, borrow_b = 0, any = 0;
    for (int w = 0; w < width; ++w) any |= subtract(subtract(r[w * stride], a[w], borrow_a), b[w], borrow_b);
    if (borrow_a != 0 || borrow_b != 0 || any == 0) return false;
  }
  std::uint64_t borrow_a = 0, borrow_b = 0;
  for (int w = 0; w < width; ++w) r[w * stride] = subtract(subtract(r[w * stride], a[w], borrow_a), b[w], borrow_b);
  return true;
}

// Coordinates D - first .. D - last of every group; b.table: U(first, .) down to U(last, .), [K + 2, width] each.
__global__ void __launch_bounds__(kThreads) take_coordinates(const __grid_constant__ Batch b, int first, int last, int width) {
  wait_for_dependencies();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= b.num_groups) return;
  std::uint64_t* r = b.rest + i;
  int k = b.left[i];
  const std::uint64_t* row = b.table;
  for (int l = first; l >= last; --l, row += static_cast<std::int64_t>(b.num_pulses + 2) * width) {
    int x = 0;
    if (k > 0) {
      const auto entry = [&](int j) { return row + static_cast<std::int64_t>(j) * width; };
      const auto fits = [&](int j) { return greater_than_double(r, b.num_groups, entry(j), width); };
      // The largest j that fits; near k in most cases. j = 0 fits always.
      int j = k, refused = k + 1;
      for (int step = 1; j > 0 && !fits(j); step *= 2) {
        refused = j;
        j = max(0, j - step);
      }
      while (refused - j > 1) {
        const int middle = (j + refused) / 2;
        if (fits(middle))
          j = middle;
        else
          refused = middle;
      }
      if (j < k && subtract_two(r, b.num_groups, entry(j), entry(j + 1), width, false)) {
        x = k - j;
      } else {
        subtract_two(r, b.num_groups, entry(j), entry(j), width, true);
        x = j - k;
      }
      k = j;
    }
    b.pulses[static_cast<std::int64_t>(b.group_size - l) * b.num_groups + i] = static_cast<std::int16_t>(x);
  }
  b.left[i] = static_cast<std::int16_t>(k);
}

// Pulses to q: float64, every operation rounded.
__global__ void __launch_bounds__(kThreads) scale_pulses(const __grid_constant__ Batch b) {
  wait_for_dependencies();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= b.num_groups) return;
  const std::int64_t row = i / b.groups, group = i % b.groups;
  const std::int64_t position = group * (b.index_bits + b.amplitude_bits) + b.index_bits;
  const double level = b.levels[read_bits(b.packed + row * b.row_bytes, position, b.amplitude_bits)];
  int square = 0, largest = 0;  // square <= K^2
  for (int d = 0; d < b.group_size; ++d) {
    const int p = b.pulses[d * b.num_groups + i];
    square += p * p;
    largest = max(largest, abs(p));
  }
  const double factor = __ddiv_rn(level, __dsqrt_rn(static_cast<double>(square)));
  const bool valid = __dmul_rn(static_cast<double>(largest), factor) < 127.5;  // 127.5 would round to 128
  if (!valid) report(b, row, group, Fault::kRange);
  for (int d = 0; d < b.group_size; ++d) {
    const int p = b.pulses[d * b.num_groups + i];
    b.q[i * b.group_size + d] = valid ? static_cast<std::int8_t>(__double2int_rn(__dmul_rn(static_cast<double>(p), factor))) : 0;
  }
}

// Where the parts of the workspace start.
struct Workspace {
  std::int64_t table_bytes, rest, pulses, left, bytes;
};

Workspace workspace_of(const CanonicalFormat& format, const Pyramid& pyramid, std::int64_t rows) {
  const std::int64_t groups = rows * format.groups, entry_bytes = 8 * pyramid.words(),
                     row_bytes = (format.num_pulses + 2) * entry_bytes;
  const std::int64_t rows_at_once = std::clamp<std::int64_t>(kMaxTableBytes / row_bytes, 1, format.group_size);
  Workspace w{};
  w.table_bytes = rows_at_once * row_bytes;
  w.rest = round_up(w.table_bytes + entry_bytes, kAlignment);  // N(D, K) follows the table
  w.pulses = w.rest + round_up(groups * entry_bytes, kAlignment);
  w.left = w.pulses + round_up(2 * groups * format.group_size, kAlignment);
  w.bytes = w.left + round_up(2 * groups, kAlignment);
  return w;
}

// After what the stream has done so far; `from` may change once this returns.
void copy_words(std::uint64_t* to, const std::vector<std::uint64_t>& from, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(std::uint64_t), cudaMemcpyHostToDevice, stream), "copy of a table");
  check(cudaStreamSynchronize(stream), "copy of a table");
}

// All rows of the table, in bands that fit and have one width, through take_coordinates.
void take_all(const Batch& b, const Pyramid& pyramid, std::int64_t table_bytes, dim3 grid, cudaStream_t stream) {
  std::vector<std::uint64_t> row = pyramid.top_row(), band;
  const std::int64_t entries = b.num_pulses + 2;
  for (int first = b.group_size; first >= 1;) {
    const int width = pyramid.width(first);
    const std::int64_t most = table_bytes / (entries * width * 8);
    band.clear();
    int l = first;
    for (; l >= 1 && pyramid.width(l) == width && first - l < most; --l) {
      for (std::int64_t j = 0; j < entries; ++j)
        band.insert(band.end(), row.begin() + j * b.words, row.begin() + j * b.words + width);
      if (l > 1) pyramid.descend(row.data(), width);
    }
    copy_words(b.table, band, stream);
    launch(take_coordinates, grid, dim3(kThreads), 0, stream, b, first, l + 1, width);
    first = l;
  }
}

}  // namespace

std::int64_t canonical_workspace_bytes(const CanonicalFormat& format, std::int64_t rows) {
  return workspace_of(format, *Pyramid::get(format.group_size, format.num_pulses), rows).bytes;
}

void canonical_decode_rows(const std::uint8_t* packed, const float* levels, std::int64_t rows, const CanonicalFormat& format,
                           std::int8_t* q, std::int64_t* fault, void* workspace, std::int64_t workspace_bytes,
                           cudaStream_t stream) {
  if (rows <= 0 || format.groups <= 0) return;
  const std::shared_ptr<const Pyramid> pyramid = Pyramid::get(format.group_size, format.num_pulses);
  std::int64_t at_once = rows;
  while (at_once > 1 && workspace_of(format, *pyramid, at_once).bytes > workspace_bytes) at_once = (at_once + 1) / 2;
  const Workspace w = workspace_of(format, *pyramid, at_once);
  if (w.bytes > workspace_bytes) throw std::invalid_argument("the workspace of canonical_decode_rows is too small for one row.");

  const std::int64_t row_bytes = canonical_row_bytes(format);
  char* const base = static_cast<char*>(workspace);
  std::uint64_t* const size = reinterpret_cast<std::uint64_t*>(base + w.table_bytes);
  copy_words(size, pyramid->size(), stream);
  for (std::int64_t first = 0; first < rows; first += at_once) {
    const std::int64_t num_groups = std::min(at_once, rows - first) * format.groups;
    const Batch b{packed + first * row_bytes,
                  levels,
                  first,
                  num_groups,
                  row_bytes,
                  format.groups,
                  format.group_size,
                  format.num_pulses,
                  format.amplitude_bits,
                  pyramid->index_bits(),
                  pyramid->words(),
                  q + first * format.groups * format.group_size,
                  fault,
                  reinterpret_cast<std::uint64_t*>(base),
                  reinterpret_cast<std::uint64_t*>(base + w.rest),
                  reinterpret_cast<std::int16_t*>(base + w.pulses),
                  reinterpret_cast<std::int16_t*>(base + w.left)};
    const dim3 grid(static_cast<unsigned>((num_groups + kThreads - 1) / kThreads));
    launch(read_indices, grid, dim3(kThreads), 0, stream, b, size);
    take_all(b, *pyramid, w.table_bytes, grid, stream);
    launch(scale_pulses, grid, dim3(kThreads), 0, stream, b);
  }
}

DecodeStatus canonical_fault(std::int64_t word) {
  if (word == INT64_MAX) return {};
  const std::int64_t group = word >> kFaultBits & kNoGroup;
  return {static_cast<Fault>(word & ((1 << kFaultBits) - 1)), word >> (kFaultBits + kGroupBits), group == kNoGroup ? -1 : group};
}

}  // namespace pvq::cuda
