// SPDX-License-Identifier: Apache-2.0
// Paley's Hadamard matrices (docs/format.md §5), entry by entry at compile time or at run time: the one definition for C++ and
// CUDA.
#pragma once

namespace pvq {

constexpr bool is_prime(int n) {
  if (n < 2) return false;
  for (int d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

constexpr bool is_paley_one(int order) { return order % 4 == 0 && is_prime(order - 1); }  // p = order - 1 is then 3 mod 4
constexpr bool is_paley_two(int order) { return order % 4 == 0 && (order / 2 - 1) % 4 == 1 && is_prime(order / 2 - 1); }

// Quadratic character of x mod the prime p: 0, 1 for a square, -1 else.
constexpr int quadratic_character(int x, int p) {
  x = (x % p + p) % p;
  if (x == 0) return 0;
  for (long long y = 1; y < p; ++y)
    if (y * y % p == x) return 1;
  return -1;
}

// H[r][c] of a dense order; chi(x) must be the quadratic character of paley_prime(order).
constexpr int paley_prime(int order) { return is_paley_one(order) ? order - 1 : order / 2 - 1; }

template <typename Character>
constexpr int paley_entry(int order, int r, int c, Character chi) {
  if (is_paley_one(order)) return r == c ? 1 : r == 0 ? 1 : c == 0 ? -1 : chi(r - c);
  const int block_row = r / 2, block_column = c / 2, i = r % 2, j = c % 2;
  if (block_row == block_column) return i == 0 && j == 0 ? 1 : -1;
  const int conference = block_row == 0 || block_column == 0 ? 1 : chi(block_row - block_column);
  return i == 1 && j == 1 ? -conference : conference;
}

// A whole matrix of +-1 at compile time.
template <int kOrder>
struct PaleyMatrix {
  bool positive[kOrder][kOrder] = {};
  constexpr PaleyMatrix() {
    constexpr int p = paley_prime(kOrder);
    int chi[2 * p + 1] = {};  // by x + p, -p <= x <= p
    for (int x = -p; x <= p; ++x) chi[x + p] = quadratic_character(x, p);
    for (int r = 0; r < kOrder; ++r)
      for (int c = 0; c < kOrder; ++c) positive[r][c] = paley_entry(kOrder, r, c, [&](int x) { return chi[x + p]; }) > 0;
  }
};

}  // namespace pvq
