// SPDX-License-Identifier: Apache-2.0
// Conversions to and from float32, and the final scaling, in plain loops: as vector_loops.h, but the AMX file needs these too.
// Included inside an anonymous namespace; needs kernels.h.

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

template <typename Scale>
inline void widen(const void* x, DType dtype, std::int64_t n, float* y, Scale scale) {
  if (dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(x);
    for (std::int64_t i = 0; i < n; ++i) y[i] = scale(from[i], i);
  } else if (dtype == DType::kBFloat16) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < n; ++i) y[i] = scale(float_from_bits(static_cast<std::uint32_t>(from[i]) << 16), i);
  } else {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x);
    for (std::int64_t i = 0; i < n; ++i) y[i] = scale(float_from_half(from[i]), i);
  }
}

inline void widen_to_float(const void* x, DType dtype, std::int64_t n, float* y) {
  widen(x, dtype, n, y, [](float value, std::int64_t) { return value; });
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
