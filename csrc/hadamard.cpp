// SPDX-License-Identifier: Apache-2.0
#include "hadamard.h"

#include <cstddef>
#include <stdexcept>
#include <string>

#include "paley.h"

namespace pvq {
namespace {

std::uint64_t splitmix64(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

bool is_hadamard_order(int order) {
  return is_power_of_two(order) || (order > 0 && (is_paley_one(order) || is_paley_two(order)));
}

std::vector<float> dense_hadamard(int order) {
  if (!is_hadamard_order(order) || is_power_of_two(order))
    throw std::invalid_argument("no dense Hadamard matrix of order " + std::to_string(order) + " is known here.");
  const std::size_t m = static_cast<std::size_t>(order);
  std::vector<float> h(m * m);
  const int p = paley_prime(order);
  std::vector<int> character(2 * static_cast<std::size_t>(p) + 1);  // by x + p, -p <= x <= p
  for (int x = -p; x <= p; ++x) character[static_cast<std::size_t>(x + p)] = quadratic_character(x, p);
  const auto chi = [&](int x) { return character[static_cast<std::size_t>(x + p)]; };
  for (int r = 0; r < order; ++r)
    for (int c = 0; c < order; ++c)
      h[static_cast<std::size_t>(r) * m + static_cast<std::size_t>(c)] = static_cast<float>(paley_entry(order, r, c, chi));
  return h;
}

std::vector<float> rotation_signs(std::uint64_t seed, std::int64_t first, std::int64_t count) {
  std::vector<float> signs(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint64_t bit = static_cast<std::uint64_t>(first + i);
    signs[static_cast<std::size_t>(i)] = splitmix64(seed, bit / 64) >> (bit % 64) & 1 ? -1.0f : 1.0f;
  }
  return signs;
}

}  // namespace pvq
