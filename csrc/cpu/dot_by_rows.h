// SPDX-License-Identifier: Apache-2.0
// dot<> by number of activation rows, from the dot_rows<> of the file that includes this inside its anonymous namespace.

template <CodebookId kId>
void dot(const DotArgs& p) {
  constexpr void (*kByRows[kMaxDotRows])(const DotArgs&) = {dot_rows<kId, 1>, dot_rows<kId, 2>, dot_rows<kId, 3>,
                                                            dot_rows<kId, 4>, dot_rows<kId, 5>, dot_rows<kId, 6>,
                                                            dot_rows<kId, 7>, dot_rows<kId, 8>};
  kByRows[p.num_rows - 1](p);
}
