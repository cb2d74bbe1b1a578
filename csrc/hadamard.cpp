// SPDX-License-Identifier: Apache-2.0
#include "hadamard.h"

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pvq {
namespace {

bool is_prime(int n) {
  if (n < 2) return false;
  for (int d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

bool is_paley_one(int order) { return order % 4 == 0 && is_prime(order - 1); }  // p = order - 1 is then 3 mod 4

bool is_paley_two(int order) { return order % 4 == 0 && (order / 2 - 1) % 4 == 1 && is_prime(order / 2 - 1); }

// chi[x] for x in [0, p): 0 at 0, 1 at the squares, -1 elsewhere.
std::vector<int> quadratic_character(int p) {
  std::vector<int> chi(static_cast<std::size_t>(p), -1);
  chi[0] = 0;
  for (std::int64_t x = 1; x < p; ++x) chi[static_cast<std::size_t>(x * x % p)] = 1;
  return chi;
}

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
  if (is_paley_one(order)) {
    const int p = order - 1;
    const std::vector<int> chi = quadratic_character(p);
    for (int r = 0; r <= p; ++r)
      for (int c = 0; c <= p; ++c) {
        int value = r == c ? 1 : r == 0 ? 1 : c == 0 ? -1 : chi[static_cast<std::size_t>(((r - c) % p + p) % p)];
        h[static_cast<std::size_t>(r) * m + static_cast<std::size_t>(c)] = static_cast<float>(value);
      }
    return h;
  }
  const int p = order / 2 - 1;
  const std::vector<int> chi = quadratic_character(p);
  for (int r = 0; r <= p; ++r)
    for (int c = 0; c <= p; ++c) {
      const int conference = r == c ? 0 : (r == 0 || c == 0) ? 1 : chi[static_cast<std::size_t>(((r - c) % p + p) % p)];
      const int block[2][2] = {{r == c ? 1 : conference, r == c ? -1 : conference},
                               {r == c ? -1 : conference, r == c ? -1 : -conference}};
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          h[static_cast<std::size_t>(2 * r + i) * m + static_cast<std::size_t>(2 * c + j)] = static_cast<float>(block[i][j]);
    }
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
