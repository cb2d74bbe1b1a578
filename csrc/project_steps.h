// SPDX-License-Identifier: Apache-2.0
// Projection of a group of activations onto S(D, K), docs/format.md §6: the operations on one coordinate and on one group,
// written once for the lanes of the CPU's vectors and for the threads of a GPU (Float float, Int int32_t). Sums over the group
// and the choice of the coordinates that move are theirs.
//
// Included inside a namespace of one instruction set, after PVQ_STEP (how its functions are declared) is defined.

constexpr float kLeastGroupSum = 0x1p-60f;  // below: a group of zeros
constexpr float kMostGroupSum = 0x1p126f;   // not below: a broken token. K / sum is never subnormal
constexpr float kResidueSteps = 0x1p20f;    // of a pulse: differences below are ties
constexpr std::int32_t kNeverMoves = INT32_MIN;

// rint(x) of |x| < 2^22, ties to even: above 2^23 a float is an integer.
template <typename Float>
PVQ_STEP Float nearest_integer(Float x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// K / sum, which maps the group next to the pyramid; 0 for a group of zeros.
template <typename Float>
PVQ_STEP Float target_factor(Float sum, float num_pulses) {
  return sum >= kLeastGroupSum ? num_pulses / sum : Float{};
}

// Which coordinate moves first where the pulses exceed K by `excess`: the one with the largest of these numbers, all different.
template <typename Float, typename Int>
PVQ_STEP Int move_order(Float target, Float pulses, Int excess, int i) {
  const Int residue = to_integer(nearest_integer((target - pulses) * kResidueSteps));
  const Int order = (excess > 0 ? -residue : residue) * 256 + (255 - i);
  return (excess > 0) & (pulses == 0.0f) ? Int{} + kNeverMoves : order;
}

// <p, |y|> / <p, p> from the dot product with the targets; 0 for a group of zeros.
template <typename Float>
PVQ_STEP Float amplitude(Float dot, Float norm, Float factor) {
  return factor > 0.0f ? dot / (norm * factor) : Float{};
}
