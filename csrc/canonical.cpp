// SPDX-License-Identifier: Apache-2.0
// The canonical codebook: index <-> pulses and rows of packed codes.
//
// Enumeration. N(l, k) points have l coordinates and k pulses. Fischer orders the first coordinate
// 0, +1, -1, +2, -2, ...  With the prefix sums (Opus, celt/cwrs.c)
//
//     U(l, j) = sum_{i<j} N(l-1, i)          N(l, j) = U(l, j) + U(l, j+1)
//     U(l, j) = U(l-1, j) + U(l, j-1) + U(l-1, j-1)      U(l, 0) = 0,  U(1, j>0) = 1
//
// and counting from the end, r = N(l, k) - index in [1, N(l, k)], one coordinate x that leaves
// j = k - |x| pulses costs a single addition, with no sum over |x|:
//
//     x > 0:   r(l, k) = r(l-1, j) + U(l, j) + U(l, j+1)
//     x <= 0:  r(l, k) = r(l-1, j) + 2 U(l, j)
//
// so j is the largest one with r > 2 U(l, j), and x > 0 if also |x| > 0 and r > N(l, j).
//
//     U(l, j)   j = 0   1    2    3    4
//     l = 1         0   1    1    1    1
//     l = 2         0   1    3    5    7        N(2, 3) = 5 + 7 = 12
//     l = 3         0   1    5   13   25        N(3, 3) = 13 + 25 = 38
//
// The table is never stored: many groups go together through its rows, upward (l = 1 .. D) to encode and
// downward to decode, and one row of K + 2 integers is updated in place between two coordinates. A row
// uses only the words that N(l, K) needs.
#include "canonical.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pvq {
namespace {

using Wide = unsigned __int128;

// Pyramids kept by Pyramid::get; a checkpoint has one or two, and the largest takes 2.4 MB.
constexpr size_t kKeptPyramids = 32;

int significant_words(const uint64_t* value, int words) {
  while (words > 1 && value[words - 1] == 0) --words;
  return words;
}

int bit_length(const uint64_t* value, int words) {
  const int top = significant_words(value, words) - 1;
  return value[top] == 0 ? 0 : 64 * top + 64 - __builtin_clzll(value[top]);
}

// value += a + b
void add_two(uint64_t* value, const uint64_t* a, const uint64_t* b, int width) {
  Wide carry = 0;
  for (int w = 0; w < width; ++w) {
    carry += static_cast<Wide>(value[w]) + a[w] + b[w];
    value[w] = static_cast<uint64_t>(carry);
    carry >>= 64;
  }
}

// difference = value - a - b; returns true when that is greater than zero.
bool subtract_two(const uint64_t* value, const uint64_t* a, const uint64_t* b, int width, uint64_t* difference) {
  uint64_t borrow = 0, any = 0;
  for (int w = 0; w < width; ++w) {
    const Wide d = static_cast<Wide>(value[w]) - a[w] - b[w] - borrow;
    difference[w] = static_cast<uint64_t>(d);
    borrow = (0 - static_cast<uint64_t>(d >> 64)) & 3;  // 0, 1 or 2
    any |= difference[w];
  }
  return borrow == 0 && any != 0;
}

// value > 2 a
bool greater_than_double(const uint64_t* value, const uint64_t* a, int width) {
  for (int w = width - 1; w >= 0; --w) {
    const uint64_t doubled = (a[w] << 1) | (w > 0 ? a[w - 1] >> 63 : 0);
    if (value[w] != doubled) return value[w] > doubled;
  }
  return false;
}

// Enough words for N(D, K) = sum_i 2^i C(D, i) C(K-1, i-1), from logarithms; at most one too many.
int words_bound(int d, int k) {
  std::vector<double> log_factorial(d + k + 1, 0.0);
  for (int i = 1; i <= d + k; ++i) log_factorial[i] = log_factorial[i - 1] + std::log2(i);
  const auto log_choose = [&](int n, int i) { return log_factorial[n] - log_factorial[i] - log_factorial[n - i]; };
  double largest = 0;
  for (int i = 1; i <= std::min(d, k); ++i) largest = std::max(largest, i + log_choose(d, i) + log_choose(k - 1, i - 1));
  const double terms = std::log2(std::min(d, k)) + 1;
  return static_cast<int>((largest + terms + 1) / 64) + 1;
}

}  // namespace

Pyramid::Pyramid(int group_size, int num_pulses)
    : group_size_(group_size), num_pulses_(num_pulses), batch_(std::max(512, 2 * num_pulses)) {
  if (group_size < 1 || group_size > kMaxGroupSize)
    throw std::invalid_argument("group_size must be 1 to 1024, got " + std::to_string(group_size));
  if (num_pulses < 1 || num_pulses > kMaxPulses)
    throw std::invalid_argument("num_pulses must be 1 to 4096, got " + std::to_string(num_pulses));
  words_ = words_bound(group_size, num_pulses);
  std::vector<uint64_t> row(static_cast<size_t>(num_pulses + 2) * words_, 0);
  for (int j = 1; j <= num_pulses + 1; ++j) row[static_cast<size_t>(j) * words_] = 1;
  width_.assign(group_size + 1, 1);
  size_.assign(words_, 0);
  size_[0] = 2;  // N(1, K)
  for (int l = 2; l <= group_size; ++l) {
    // N(l, K) <= (2 K + 1) N(l-1, K), so a row needs at most one word more than the row before.
    const int width = std::min(words_, width_[l - 1] + 1);
    ascend(row.data(), width);
    std::fill(size_.begin(), size_.end(), 0);
    const uint64_t* last = row.data() + static_cast<size_t>(num_pulses) * words_;
    add_two(size_.data(), last, last + words_, width);
    width_[l] = significant_words(size_.data(), width);
  }
  // Drop the words that the bound had too many.
  const int needed = width_[group_size];
  top_row_.resize(static_cast<size_t>(num_pulses + 2) * needed);
  for (int j = 0; j <= num_pulses + 1; ++j)
    std::copy_n(row.data() + static_cast<size_t>(j) * words_, needed, top_row_.data() + static_cast<size_t>(j) * needed);
  words_ = needed;
  size_.resize(needed);
  std::vector<uint64_t> last_index = size_;  // N - 1
  for (int w = 0; w < words_ && last_index[w]-- == 0; ++w) {
  }
  index_bits_ = bit_length(last_index.data(), words_);
}

std::shared_ptr<const Pyramid> Pyramid::get(int group_size, int num_pulses) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, std::shared_ptr<const Pyramid>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(group_size, num_pulses);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  auto pyramid = std::make_shared<const Pyramid>(group_size, num_pulses);
  if (kept.size() >= kKeptPyramids) kept.clear();
  kept.emplace(key, pyramid);
  return pyramid;
}

// Row U(l-1, .) becomes U(l, .), in place; `width` words of every entry are significant.
void Pyramid::ascend(uint64_t* row, int width) const {
  std::vector<uint64_t> before(words_, 0), saved(words_);  // U(l-1, j-1), U(l-1, j)
  for (int j = 1; j <= num_pulses_ + 1; ++j) {
    uint64_t* entry = row + static_cast<size_t>(j) * words_;
    std::copy_n(entry, width, saved.data());
    add_two(entry, entry - words_, before.data(), width);
    before.swap(saved);
  }
}

// Row U(l, .) becomes U(l-1, .), in place.
void Pyramid::descend(uint64_t* row, int width) const {
  std::vector<uint64_t> before(words_, 0), saved(words_);  // U(l, j-1), U(l, j)
  for (int j = 1; j <= num_pulses_ + 1; ++j) {
    uint64_t* entry = row + static_cast<size_t>(j) * words_;
    std::copy_n(entry, width, saved.data());
    subtract_two(entry, entry - words_, before.data(), width, entry);
    before.swap(saved);
  }
}

void Pyramid::index_from_pulses(const int16_t* pulses, int64_t count, uint64_t* index) const {
  std::vector<uint64_t> row;
  std::vector<int> left;
  for (int64_t begin = 0; begin < count; begin += batch_) {
    const int64_t groups = std::min(batch_, count - begin);
    uint64_t* r = index + begin * words_;
    std::fill(r, r + groups * words_, 0);
    for (int64_t g = 0; g < groups; ++g) r[g * words_] = 1;
    left.assign(groups, 0);
    row.assign(static_cast<size_t>(num_pulses_ + 2) * words_, 0);
    for (int j = 1; j <= num_pulses_ + 1; ++j) row[static_cast<size_t>(j) * words_] = 1;
    for (int l = 1; l <= group_size_; ++l) {
      const int width = width_[l];
      if (l > 1) ascend(row.data(), width);
      const int16_t* x = pulses + begin * group_size_ + (group_size_ - l);
      for (int64_t g = 0; g < groups; ++g, x += group_size_) {
        const uint64_t* entry = row.data() + static_cast<size_t>(left[g]) * words_;
        add_two(r + g * words_, entry, *x > 0 ? entry + words_ : entry, width);
        left[g] = std::min(num_pulses_, left[g] + std::abs(*x));
      }
    }
    const std::vector<uint64_t> zero(words_, 0);
    for (int64_t g = 0; g < groups; ++g) subtract_two(size_.data(), r + g * words_, zero.data(), words_, r + g * words_);
  }
}

int64_t Pyramid::pulses_from_index(uint64_t* index, int64_t count, int16_t* pulses) const {
  const std::vector<uint64_t> zero(words_, 0);
  std::vector<uint64_t> difference(words_), row;
  std::vector<int> left;
  // r = N - index, which must be greater than zero.
  for (int64_t g = 0; g < count; ++g) {
    uint64_t* r = index + g * words_;
    if (!subtract_two(size_.data(), r, zero.data(), words_, r)) return g;
  }
  for (int64_t begin = 0; begin < count; begin += batch_) {
    const int64_t groups = std::min(batch_, count - begin);
    left.assign(groups, num_pulses_);
    row = top_row_;
    for (int l = group_size_; l >= 1; --l) {
      const int width = width_[l];
      if (l < group_size_) descend(row.data(), width_[l + 1]);
      int16_t* x = pulses + begin * group_size_ + (group_size_ - l);
      for (int64_t g = 0; g < groups; ++g, x += group_size_) {
        const int k = left[g];
        *x = 0;
        if (k == 0) continue;
        uint64_t* r = index + (begin + g) * words_;
        // Largest j with r > 2 U(l, j); |x| = k - j is mostly small, so look near k first. U(l, 0) = 0
        // ends the search.
        const auto fits = [&](int j) { return greater_than_double(r, row.data() + static_cast<size_t>(j) * words_, width); };
        int j = k, refused = k + 1;
        for (int step = 1; !fits(j); step *= 2) {
          refused = j;
          j = std::max(0, j - step);
        }
        while (refused - j > 1) {
          const int middle = (j + refused) / 2;
          (fits(middle) ? j : refused) = middle;
        }
        const uint64_t* entry = row.data() + static_cast<size_t>(j) * words_;
        if (j < k && subtract_two(r, entry, entry + words_, width, difference.data())) {
          std::copy_n(difference.data(), width, r);
          *x = static_cast<int16_t>(k - j);
        } else {
          subtract_two(r, entry, entry, width, r);
          *x = static_cast<int16_t>(j - k);
        }
        left[g] = j;
      }
    }
  }
  return -1;
}

namespace {

// `bits` bits of `value` into a row of zeros, from bit `position` on, least significant first.
void write_bits(uint8_t* row, int64_t position, int bits, const uint64_t* value) {
  const int shift = static_cast<int>(position & 7);
  uint8_t* byte = row + (position >> 3);
  for (int done = 0; done < bits; done += 64, ++value) {
    const int part = std::min(64, bits - done);
    const Wide shifted = static_cast<Wide>(*value) << shift;
    for (int b = 0; 8 * b < shift + part; ++b) byte[b] |= static_cast<uint8_t>(shifted >> (8 * b));
    byte += 8;
  }
}

void read_bits(const uint8_t* row, int64_t position, int bits, uint64_t* value) {
  const int shift = static_cast<int>(position & 7);
  const uint8_t* byte = row + (position >> 3);
  for (int done = 0; done < bits; done += 64, ++value) {
    const int part = std::min(64, bits - done);
    Wide shifted = 0;
    for (int b = 0; 8 * b < shift + part; ++b) shifted |= static_cast<Wide>(byte[b]) << (8 * b);
    *value = static_cast<uint64_t>(shifted >> shift);
    if (part < 64) *value &= (uint64_t{1} << part) - 1;
    byte += 8;
  }
}

}  // namespace

int64_t canonical_row_bytes(const CanonicalFormat& format) {
  const int index_bits = Pyramid::get(format.group_size, format.num_pulses)->index_bits();
  return (format.groups * (index_bits + format.amplitude_bits) + 7) / 8;
}

void canonical_encode_rows(const int16_t* pulses, const uint16_t* amplitudes, int64_t rows, const CanonicalFormat& format,
                           uint8_t* packed) {
  const auto pyramid = Pyramid::get(format.group_size, format.num_pulses);
  const int words = pyramid->words(), index_bits = pyramid->index_bits();
  const int group_bits = index_bits + format.amplitude_bits;
  const int64_t row_bytes = canonical_row_bytes(format), total = rows * format.groups;
  std::memset(packed, 0, rows * row_bytes);
  std::vector<uint64_t> index(pyramid->batch() * words);
  for (int64_t begin = 0; begin < total; begin += pyramid->batch()) {
    const int64_t count = std::min(pyramid->batch(), total - begin);
    pyramid->index_from_pulses(pulses + begin * format.group_size, count, index.data());
    for (int64_t g = 0; g < count; ++g) {
      uint8_t* row = packed + (begin + g) / format.groups * row_bytes;
      const int64_t position = (begin + g) % format.groups * group_bits;
      const uint64_t amplitude = amplitudes[begin + g];
      write_bits(row, position, index_bits, index.data() + g * words);
      write_bits(row, position + index_bits, format.amplitude_bits, &amplitude);
    }
  }
}

DecodeStatus canonical_decode_rows(const uint8_t* packed, const float* levels, int64_t rows, const CanonicalFormat& format,
                                   int8_t* q) {
  // x + kRound - kRound is rint(x) for |x| < 2^51, to even, without a call.
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const auto pyramid = Pyramid::get(format.group_size, format.num_pulses);
  const int d = format.group_size, words = pyramid->words(), index_bits = pyramid->index_bits();
  const int group_bits = index_bits + format.amplitude_bits;
  const int64_t row_bytes = canonical_row_bytes(format), total = rows * format.groups;
  const int used = static_cast<int>(format.groups * group_bits % 8);
  for (int64_t r = 0; used != 0 && r < rows; ++r)
    if (packed[(r + 1) * row_bytes - 1] >> used) return {Fault::kPadding, r, -1};

  std::vector<uint64_t> index(pyramid->batch() * words);
  std::vector<double> level(pyramid->batch());
  std::vector<int16_t> pulses(pyramid->batch() * d);
  for (int64_t begin = 0; begin < total; begin += pyramid->batch()) {
    const int64_t count = std::min(pyramid->batch(), total - begin);
    for (int64_t g = 0; g < count; ++g) {
      const uint8_t* row = packed + (begin + g) / format.groups * row_bytes;
      const int64_t position = (begin + g) % format.groups * group_bits;
      uint64_t amplitude = 0;
      uint64_t* words_of_index = index.data() + g * words;
      words_of_index[words - 1] = 0;  // N may need one word more than an index
      read_bits(row, position, index_bits, words_of_index);
      read_bits(row, position + index_bits, format.amplitude_bits, &amplitude);
      level[g] = levels[amplitude];
    }
    const int64_t invalid = pyramid->pulses_from_index(index.data(), count, pulses.data());
    if (invalid >= 0) return {Fault::kIndex, (begin + invalid) / format.groups, (begin + invalid) % format.groups};
    for (int64_t g = 0; g < count; ++g) {
      const int16_t* p = pulses.data() + g * d;
      int64_t square = 0;
      int largest = 0;
      for (int i = 0; i < d; ++i) {
        square += int64_t{p[i]} * p[i];
        largest = std::max(largest, std::abs(p[i]));
      }
      const double factor = level[g] / std::sqrt(static_cast<double>(square));
      if (!(largest * factor < 127.5))  // 127.5 would round to 128
        return {Fault::kRange, (begin + g) / format.groups, (begin + g) % format.groups};
      int8_t* out = q + (begin + g) * d;
      for (int i = 0; i < d; ++i) out[i] = static_cast<int8_t>(static_cast<int>((p[i] * factor + kRound) - kRound));
    }
  }
  return {};
}

}  // namespace pvq
