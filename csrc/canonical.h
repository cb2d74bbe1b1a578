// SPDX-License-Identifier: Apache-2.0
// The canonical codebook: every point of the pyramid S(D, K) (docs/format.md, section 4.3).
//
//   D = group_size    coordinates of a group              1 .. kMaxGroupSize
//   K = num_pulses    sum |p_i| of a point p in Z^D       1 .. kMaxPulses
//   N(D, K)           number of points; an index has I = ceil(log2 N) bits, up to 4549 of them
//   l, j              coordinates and pulses that are left: a state of the enumeration
//
// Everything takes plain pointers and starts no thread: a caller splits the rows or the groups.
// No torch, no Python. Must be compiled without contraction into fused multiply-adds.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace pvq {

constexpr int kMaxGroupSize = 1024;
constexpr int kMaxPulses = 4096;
constexpr int kMaxAmplitudeBits = 16;

// Enumeration of S(D, K) with integers of several 64-bit words, least significant word first.
class Pyramid {
 public:
  // Throws std::invalid_argument when D or K is out of range. O(D K words) time, O(K words) memory.
  Pyramid(int group_size, int num_pulses);

  // The same object for the same arguments (built once in a process, safe to share by threads).
  static std::shared_ptr<const Pyramid> get(int group_size, int num_pulses);

  int group_size() const { return group_size_; }
  int num_pulses() const { return num_pulses_; }
  int index_bits() const { return index_bits_; }               // I
  int words() const { return words_; }                         // 64-bit words of an index
  const std::vector<uint64_t>& size() const { return size_; }  // N(D, K), [words]

  // pulses [count, D], each with sum |p| == K (not checked) -> index [count, words].
  void index_from_pulses(const int16_t* pulses, int64_t count, uint64_t* index) const;

  // index [count, words] -> pulses [count, D]. Returns -1, or the position of the first index that
  // is N or more; nothing is written then. `index` is overwritten.
  int64_t pulses_from_index(uint64_t* index, int64_t count, int16_t* pulses) const;

  // How many groups one sweep over the rows of the table should serve.
  int64_t batch() const { return batch_; }

  // The table of the enumeration (canonical.cpp) from its last row downward, for decoders that keep rows of it (csrc/cuda):
  // U(D, .), [K + 2, words]; the words of an entry of U(l, .) that are significant; U(l, .) to U(l-1, .) in place.
  const std::vector<uint64_t>& top_row() const { return top_row_; }
  int width(int l) const { return width_[l]; }
  void descend(uint64_t* row, int width) const;

 private:
  void ascend(uint64_t* row, int width) const;

  int group_size_, num_pulses_, index_bits_ = 0, words_ = 0;
  int64_t batch_;
  std::vector<int> width_;         // [D + 1] words that hold N(l, K)
  std::vector<uint64_t> size_;     // [words]
  std::vector<uint64_t> top_row_;  // [K + 2, words] U(D, j)
};

// Nearest point by direction: x [count, D] finite -> pulses [count, D]. Tries Fischer's rounding and the
// greedy search on the cosine, keeps the better and refines it; same result as codec.pyramid.search_pulses.
void search_pulses(const float* x, int64_t count, int group_size, int num_pulses, int16_t* pulses);

// The metric of the errors of a group of D columns, each float64 [D, D] row by row: an upper U, U^-1, and U^-1 U^-T.
struct GroupMetric {
  const double* factor;
  const double* inverse;
  const double* metric;
};

// Codes that are nearer in `metric`, or as they were: target [count, D] finite, levels [num_levels] ascending, scale [count]
// positive; pulses [count, D], codes [count] and q [count, D] are read and changed (canonical_refine.cpp).
void refine_pulses(const float* target, int64_t count, int group_size, int num_pulses, const GroupMetric& metric,
                   const float* levels, int num_levels, const float* scale, int16_t* pulses, uint16_t* codes, int8_t* q);

struct CanonicalFormat {
  int group_size;      // D
  int num_pulses;      // K
  int amplitude_bits;  // b, 0 .. kMaxAmplitudeBits
  int64_t groups;      // groups of a row, in_features / D
};

// Bytes of a packed row: ceil(groups (I + b) / 8).
int64_t canonical_row_bytes(const CanonicalFormat& format);

// pulses [rows, groups, D], amplitudes [rows, groups] below 2^b -> packed [rows, row_bytes].
void canonical_encode_rows(const int16_t* pulses, const uint16_t* amplitudes, int64_t rows, const CanonicalFormat& format,
                           uint8_t* packed);

enum class Fault : int { kNone = 0, kIndex = 1, kRange = 2, kPadding = 3 };

struct DecodeStatus {
  Fault fault = Fault::kNone;
  int64_t row = -1;    // first row with a fault
  int64_t group = -1;  // and its group, -1 for kPadding
};

// packed [rows, row_bytes], levels [2^b] -> q [rows, groups * D]; stops at the first fault: an index of N or
// more (kIndex), a weight outside [-127, 127] (kRange), an unused bit of a row that is set (kPadding).
DecodeStatus canonical_decode_rows(const uint8_t* packed, const float* levels, int64_t rows, const CanonicalFormat& format,
                                   int8_t* q);

}  // namespace pvq
