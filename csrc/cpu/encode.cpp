// SPDX-License-Identifier: Apache-2.0
#include "encode.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

// One source, compiled for several instruction sets and chosen at load. Contraction is off, so all give the same codes.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PVQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PVQ_CLONES
#endif
#define PVQ_INLINE static inline __attribute__((always_inline))

namespace pvq::cpu {
namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef std::int32_t Ints __attribute__((vector_size(32)));

struct Ladder {         // magnitudes of one gain: base + j step, j = 2^r m + f in [0, last]
  float base, step;
  int last;
};

// A codebook prepared for the search.
struct Search {
  const ServingCodebook* book;
  int refinement_bits, num_pyramids, num_gains, num_sets;
  int pyramids[kMaxPyramids];
  Ladder ladders[kMaxPyramids][kMaxGains];  // by set: pyramids that share their gains are searched together
  int first[kMaxPyramids], end[kMaxPyramids];  // pyramids of a set
};

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
        const int gain = book.gains[p][g];
        Ladder& ladder = s.ladders[s.num_sets][g];
        ladder.base = static_cast<float>(gain >> book.shift) + 0.5f;
        ladder.step = static_cast<float>((2 * gain) >> book.shift);
        for (ladder.last = 0; ((2 * (ladder.last + 1) + 1) * gain) >> book.shift <= kMaxMagnitude; ++ladder.last) {
        }
      }
      s.first[s.num_sets++] = p;
    }
    s.end[s.num_sets - 1] = p + 1;
  }
  return s;
}

struct Codeword {
  int pyramid, gain;
  Ints j;
  float cost;
};

PVQ_INLINE float sum_of(Floats v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

PVQ_INLINE int total_of(Ints v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

PVQ_INLINE Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// Nearest codeword to the magnitudes `a` (int8 units, not negative).
PVQ_INLINE Codeword nearest(const Search& s, Floats a) {
  constexpr float kForbidden = 1e30f;
  Codeword best{0, 0, Ints{}, std::numeric_limits<float>::infinity()};
  const int r = s.refinement_bits;
  for (int set = 0; set < s.num_sets; ++set)
    for (int gain = 0; gain < s.num_gains; ++gain) {
      const Ladder& ladder = s.ladders[set][gain];
      const Ints last = Ints{} + ladder.last;
      Floats position = (a - ladder.base) / ladder.step + 0.5f;
      position = position < 0.0f ? Floats{} : position;
      position = position > 1000.0f ? Floats{} + 1000.0f : position;
      Ints free = __builtin_convertvector(position, Ints);
      free = free > last ? last : free;
      const Floats free_error = a - (ladder.base + to_float(free) * ladder.step);
      const Floats free_cost = free_error * free_error;
      if (sum_of(free_cost) >= best.cost) continue;  // no pyramid can be nearer than the free choice
      const int free_total = total_of(free >> r);
      for (int p = s.first[set]; p < s.end[set]; ++p) {
        Ints j = free;
        Floats cost = free_cost;
        int missing = s.pyramids[p] - free_total;
        const bool up = missing > 0;
        bool possible = true;
        for (; missing != 0; missing += up ? -1 : 1) {
          // The nearest magnitude in the next cell: its lowest going up, its highest going down.
          const Ints next = up ? (((j >> r) + 1) << r) : ((j >> r) << r) - 1;
          const Floats error = a - (ladder.base + to_float(next) * ladder.step);
          const Floats next_cost = error * error;
          const Ints allowed = up ? (next <= last) : (next >= 0);
          const Floats change = allowed ? next_cost - cost : Floats{} + kForbidden;
          int move = 0;
          for (int i = 1; i < kGroupSize; ++i) move = change[i] < change[move] ? i : move;
          if (change[move] >= kForbidden) {
            possible = false;
            break;
          }
          j[move] = next[move];
          cost[move] = next_cost[move];
        }
        const float total = sum_of(cost);
        if (possible && total < best.cost) best = {p, gain, j, total};
      }
    }
  return best;
}

PVQ_INLINE void write_code(const Search& s, const Codeword& word, int signs, std::uint8_t* code, std::int8_t* q) {
  const ServingCodebook& book = *s.book;
  int m[kGroupSize], refinement = 0;
  const int gain = book.gains[word.pyramid][word.gain];
  for (int i = 0; i < kGroupSize; ++i) {
    const int j = word.j[i];
    m[i] = j >> s.refinement_bits;
    refinement |= (j & ((1 << s.refinement_bits) - 1)) << i;
    const int b = ((2 * j + 1) * gain) >> book.shift;
    q[i] = static_cast<std::int8_t>((signs >> i & 1) != 0 ? ~b : b);
  }
  const int index = shape_index(book, word.pyramid, m) | word.gain << book.shape_bits;
  *code++ = static_cast<std::uint8_t>(index);
  if (book.shape_bits > 8) *code++ = static_cast<std::uint8_t>(index >> 8);
  *code++ = static_cast<std::uint8_t>(signs);
  if (s.refinement_bits == 1) *code = static_cast<std::uint8_t>(refinement);
}

// Codes one group; `inverse` is 1 / row_scale, or 0.
PVQ_INLINE void encode_group(const Search& s, const float* w, float inverse, std::uint8_t* code, std::int8_t* q) {
  if (s.book == nullptr) {  // int8
    for (int i = 0; i < kGroupSize; ++i) {
      float value = __builtin_rintf(w[i] * inverse);
      value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
      q[i] = static_cast<std::int8_t>(value);
      code[i] = static_cast<std::uint8_t>(q[i]);
    }
    return;
  }
  Floats a;
  int signs = 0;
  for (int i = 0; i < kGroupSize; ++i) {
    const float target = w[i] * inverse;
    signs |= (target < 0.0f ? 1 : 0) << i;
    a[i] = target < 0.0f ? -target : target;
  }
  write_code(s, nearest(s, a), signs, code, q);
}

PVQ_CLONES void encode_range(const Search& s, const EncodeArgs& p, std::int64_t begin, std::int64_t end, int code_bytes) {
  const std::int64_t groups = p.columns / kGroupSize;
  for (std::int64_t row = begin; row < end; ++row) {
    const float inverse = p.row_scale[row] > 0.0f ? 1.0f / p.row_scale[row] : 0.0f;
    for (std::int64_t g = 0; g < groups; ++g)
      encode_group(s, p.weight + row * p.columns + g * kGroupSize, inverse, p.codes + (row * groups + g) * code_bytes,
                   p.q + row * p.columns + g * kGroupSize);
  }
}

PVQ_CLONES void feedback_range(const Search& s, const EncodeArgs& p, const float* factor, float* error, std::int64_t begin,
                               std::int64_t end, int code_bytes, float half) {
  const std::int64_t n = p.columns, groups = n / kGroupSize;
  std::vector<float> buffer(static_cast<std::size_t>(n));
  float* w = buffer.data();
  for (std::int64_t row = begin; row < end; ++row) {
    std::memcpy(w, p.weight + row * n, static_cast<std::size_t>(n) * sizeof(float));
    const float scale = p.row_scale[row], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroupSize;
      std::int8_t* q = p.q + row * n + first;
      encode_group(s, w + first, inverse, p.codes + (row * groups + g) * code_bytes, q);
      float e[kGroupSize];
      for (int j = 0; j < kGroupSize; ++j) {  // E U_QQ = w - what, U_QQ upper: forward substitution
        float value = w[first + j] - (static_cast<float>(q[j]) + half) * scale;
        for (int i = 0; i < j; ++i) value -= e[i] * factor[(first + i) * n + first + j];
        e[j] = value / factor[(first + j) * n + first + j];
        error[row * n + first + j] = e[j];
      }
      for (int i = 0; i < kGroupSize; ++i) {
        const float* u = factor + (first + i) * n;
        for (std::int64_t c = first + kGroupSize; c < n; ++c) w[c] -= e[i] * u[c];
      }
    }
  }
}

PVQ_CLONES void error_range(const Search& s, const float* weight, const float* row_scale, std::int64_t columns,
                            std::int64_t stride, std::int64_t begin, std::int64_t end, float* error) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float scale = row_scale[row], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    float sum = 0.0f;
    for (std::int64_t g = 0; g < columns / kGroupSize; g += stride) {
      Floats a;
      for (int i = 0; i < kGroupSize; ++i) a[i] = std::fabs(weight[row * columns + g * kGroupSize + i] * inverse);
      sum += nearest(s, a).cost;
    }
    error[row] = sum * scale * scale;
  }
}

int code_bytes_of(CodebookId id) { return id == CodebookId::kInt8 ? 8 : find_codebook(id)->bytes_per_group; }

Search search_for(CodebookId id) { return id == CodebookId::kInt8 ? Search{} : prepare(id); }

}  // namespace

void encode_rows(const EncodeArgs& args) {
  const Search search = search_for(args.codebook);
  parallel_for(args.rows, 4, [&](std::int64_t begin, std::int64_t end, int) {
    encode_range(search, args, begin, end, code_bytes_of(args.codebook));
  });
}

void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, float* error) {
  const Search search = search_for(args.codebook);
  const float half = args.codebook == CodebookId::kInt8 ? 0.0f : 0.5f;
  parallel_for(args.rows, 4, [&](std::int64_t begin, std::int64_t end, int) {
    feedback_range(search, args, factor, error, begin, end, code_bytes_of(args.codebook), half);
  });
}

void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error) {
  const Search search = prepare(codebook);
  parallel_for(rows, 4, [&](std::int64_t begin, std::int64_t end, int) {
    error_range(search, weight, row_scale, columns, stride, begin, end, error);
  });
}

}  // namespace pvq::cpu
