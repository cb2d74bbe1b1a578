// SPDX-License-Identifier: Apache-2.0
// Rotation, activation quantization and the final scaling, written once in plain loops; each kernels_*.cpp includes this file and so compiles it
// for its own instruction set. Every float operation is one that format.md §5 to §7 order, so the width of a vector cannot
// change a bit. Included inside an anonymous namespace; needs kernels.h.

// Adding and subtracting 1.5 * 2^23 rounds a float below 2^22 to the nearest integer, ties to even, as rint() does.
inline float round_to_integer(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

template <int kChunk>
struct ChunkOf {
  typedef float Type __attribute__((vector_size(kChunk * sizeof(float)), aligned(4)));
};

// sum + x * h with h = +-1: the product is exact, so a fused multiply-add rounds as the addition alone does.
template <int kChunk>
inline typename ChunkOf<kChunk>::Type add_signed(typename ChunkOf<kChunk>::Type sum, typename ChunkOf<kChunk>::Type x, float h) {
#ifdef __AVX512F__
  if constexpr (kChunk == 16)
    return (typename ChunkOf<kChunk>::Type)_mm512_fmadd_ps((__m512)x, _mm512_set1_ps(h), (__m512)sum);
#endif
  return sum + x * h;
}

// One dense factor along its index: out[r][j] = sum over c of H[r][c] in[c][j], j in [0, kChunk), in order of c. Four rows at a
// time hide the latency of the additions.
template <int kChunk>
inline void dense_chunk(const float* in, float* out, std::int64_t run, int order, const float* matrix) {
  using Chunk = typename ChunkOf<kChunk>::Type;
  for (int r = 0; r < order; r += 4) {  // every dense order is a multiple of four
    const float* row = matrix + r * order;
    Chunk x = *reinterpret_cast<const Chunk*>(in);
    Chunk sum0 = x * row[0], sum1 = x * row[order], sum2 = x * row[2 * order], sum3 = x * row[3 * order];
    for (int c = 1; c < order; ++c) {
      x = *reinterpret_cast<const Chunk*>(in + c * run);
      sum0 = add_signed<kChunk>(sum0, x, row[c]);
      sum1 = add_signed<kChunk>(sum1, x, row[order + c]);
      sum2 = add_signed<kChunk>(sum2, x, row[2 * order + c]);
      sum3 = add_signed<kChunk>(sum3, x, row[3 * order + c]);
    }
    *reinterpret_cast<Chunk*>(out + r * run) = sum0;
    *reinterpret_cast<Chunk*>(out + (r + 1) * run) = sum1;
    *reinterpret_cast<Chunk*>(out + (r + 2) * run) = sum2;
    *reinterpret_cast<Chunk*>(out + (r + 3) * run) = sum3;
  }
}

inline void dense_factor(const float* in, float* out, std::int64_t width, std::int64_t run, int order, const float* matrix) {
  for (std::int64_t base = 0; base < width; base += run * order) {
    std::int64_t j = 0;
    for (; j + 16 <= run; j += 16) dense_chunk<16>(in + base + j, out + base + j, run, order, matrix);
    for (; j + 4 <= run; j += 4) dense_chunk<4>(in + base + j, out + base + j, run, order, matrix);
    for (; j < run; ++j) dense_chunk<1>(in + base + j, out + base + j, run, order, matrix);
  }
}

// [outer][order][run] -> [order][outer][run]
inline void swap_axes(const float* in, float* out, std::int64_t outer, std::int64_t order, std::int64_t run) {
  for (std::int64_t o = 0; o < outer; ++o)
    for (std::int64_t c = 0; c < order; ++c) {
      const float* from = in + (o * order + c) * run;
      float* to = out + (c * outer + o) * run;
      if (run == 4) {
        __builtin_memcpy(to, from, 4 * sizeof(float));
      } else {
        for (std::int64_t j = 0; j < run; ++j) to[j] = from[j];
      }
    }
}

// The stages h < 16 stay in one vector: with a, b the lanes whose bit h is clear and set, lane a becomes b + a and lane b becomes
// a - b, both partner + (+-1) * self.
inline void butterflies_in_vector(float* y, std::int64_t width, std::int64_t order) {
  using Vector = ChunkOf<16>::Type;
  typedef std::int32_t Lanes __attribute__((vector_size(64)));
  const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (std::int64_t base = 0; base < width; base += 16) {
    Vector v = *reinterpret_cast<const Vector*>(y + base);
    for (int h = 1; h < 16 && h < order; h *= 2) {
      const Vector partner = __builtin_shuffle(v, lane ^ h), one = Vector{} + 1.0f, sign = (lane & h) == 0 ? one : -one;
#ifdef __AVX512F__
      v = (Vector)_mm512_fmadd_ps((__m512)v, (__m512)sign, (__m512)partner);
#else
      v = partner + v * sign;
#endif
    }
    *reinterpret_cast<Vector*>(y + base) = v;
  }
}

inline void butterflies(float* y, std::int64_t width, std::int64_t order) {
  std::int64_t h = 1;
  if (width % 16 == 0) {
    butterflies_in_vector(y, width, order);
    h = 16;
  }
  for (; h < order; h *= 2)
    for (std::int64_t base = 0; base < width; base += 2 * h)
      for (std::int64_t j = 0; j < h; ++j) {
        const float a = y[base + j], b = y[base + h + j];
        y[base + j] = a + b;
        y[base + h + j] = a - b;
      }
}

void rotate(float* y, float* scratch, std::int64_t width, const RotationFactor* factors, int num_factors) {
  float* from = y;
  float* to = scratch;
  std::int64_t run = width;
  for (int f = 0; f < num_factors; ++f) {
    run /= factors[f].order;
    if (factors[f].matrix == nullptr) {
      butterflies(from, width, factors[f].order);  // always the last factor: run is 1
    } else if (run < 16 && width > run * factors[f].order) {  // short runs: bring the blocks side by side, and back
      const std::int64_t order = factors[f].order, outer = width / (run * order);
      swap_axes(from, to, outer, order, run);
      dense_factor(to, from, width, outer * run, factors[f].order, factors[f].matrix);
      swap_axes(from, to, order, outer, run);
      float* swap = from;
      from = to;
      to = swap;
    } else {
      dense_factor(from, to, width, run, factors[f].order, factors[f].matrix);
      float* swap = from;
      from = to;
      to = swap;
    }
  }
  if (from != y) __builtin_memcpy(y, from, static_cast<std::size_t>(width) * sizeof(float));
}

std::uint32_t max_magnitude(const float* y, std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t magnitude;
    __builtin_memcpy(&magnitude, y + i, sizeof magnitude);
    magnitude &= 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

std::int32_t quantize_a8(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* a) {
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t value = static_cast<std::int32_t>(round_to_integer(y[i] * inverse_scale));
    sum += value;
    a[i] = static_cast<std::uint8_t>(value + offset);
  }
  return sum;
}

void quantize_a16(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* hi, std::uint8_t* lo,
                  std::int32_t* sum_hi, std::int32_t* sum_lo) {
  std::int32_t sums[2] = {0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t value = static_cast<std::int32_t>(round_to_integer(y[i] * inverse_scale));
    const std::int32_t high = (value + 128) >> 8;
    const std::int32_t low = value - 256 * high;
    sums[0] += high;
    sums[1] += low;
    hi[i] = static_cast<std::uint8_t>(high + offset);
    lo[i] = static_cast<std::uint8_t>(low + offset);
  }
  *sum_hi = sums[0];
  *sum_lo = sums[1];
}

inline float float_from_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 31u;
  std::uint32_t mantissa = half & 1023u;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact
  return sign != 0 ? -magnitude : magnitude;
}

inline std::uint16_t half_from_float(float value) {
  const std::uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the last half bit with the last float bit and rounds to even
    const std::uint32_t rounded = bits_from_float(float_from_bits(magnitude) + 0.5f);
    return static_cast<std::uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}

inline void widen_to_float(const void* x, DType dtype, std::int64_t n, float* y) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(y, x, static_cast<std::size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < n; ++i) y[i] = float_from_bits(static_cast<std::uint32_t>(from[i]) << 16);
  } else {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < n; ++i) y[i] = float_from_half(from[i]);
  }
}

void load(const void* x, DType dtype, const float* signs, std::int64_t n, float* y) {
  widen_to_float(x, dtype, n, y);
  if (signs != nullptr)
    for (std::int64_t i = 0; i < n; ++i) y[i] *= signs[i];
}

typedef float Lanes16f __attribute__((vector_size(64), aligned(4)));
typedef std::int32_t Lanes16i __attribute__((vector_size(64), aligned(4)));
typedef std::uint32_t Lanes16u __attribute__((vector_size(64)));
typedef std::uint16_t Lanes16h __attribute__((vector_size(32), aligned(2)));

inline void store_lanes(Lanes16f value, DType dtype, int num_lanes, void* y, std::int64_t offset) {
  if (dtype == DType::kBFloat16) {
    const Lanes16u bits = (Lanes16u)value;
    const Lanes16u rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 64u;
    const Lanes16h narrow = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Lanes16h);
    __builtin_memcpy(static_cast<std::uint16_t*>(y) + offset, &narrow, static_cast<std::size_t>(num_lanes) * 2);
  } else if (dtype == DType::kFloat32) {
    __builtin_memcpy(static_cast<float*>(y) + offset, &value, static_cast<std::size_t>(num_lanes) * 4);
  } else {
    std::uint16_t* to = static_cast<std::uint16_t*>(y) + offset;
    for (int lane = 0; lane < num_lanes; ++lane) to[lane] = half_from_float(value[lane]);
  }
}

template <bool kFull>
inline void finish_tokens(const FinishArgs& p) {
  const int num_lanes = kFull ? kLanes : p.num_lanes;
  float bias_values[kLanes] = {};
  if (p.bias != nullptr) widen_to_float(p.bias, p.dtype, num_lanes, bias_values);
  const Lanes16f bias = *reinterpret_cast<const Lanes16f*>(bias_values);
  const Lanes16f half_scale = *reinterpret_cast<const Lanes16f*>(p.row_scale) * 0.5f;
  const Lanes16i correction = *reinterpret_cast<const Lanes16i*>(p.row_sum) * p.activation_offset;
  for (std::int64_t token = 0; token < p.num_tokens; ++token) {
    const std::int32_t* sums = p.sums + token * p.sum_stride;
    const Lanes16i sum = (*reinterpret_cast<const Lanes16i*>(sums) - correction) * 2 + p.half_offset * p.token_sum[token];
    Lanes16f value = __builtin_convertvector(sum, Lanes16f);
    if (p.num_planes == 2) {
      const Lanes16i low = (*reinterpret_cast<const Lanes16i*>(sums + p.plane_stride) - correction) * 2 +
                           p.half_offset * p.token_sum[p.token_stride + token];
      value = value * 256.0f + __builtin_convertvector(low, Lanes16f);
    }
    value = (value * half_scale) * p.token_scale[token];
    if (p.bias != nullptr) value += bias;
    store_lanes(value, p.dtype, num_lanes, p.y, token * p.y_stride);
  }
}

void finish(const FinishArgs& p) {
  if (p.num_lanes == kLanes) {
    finish_tokens<true>(p);
  } else {
    finish_tokens<false>(p);
  }
}
