// SPDX-License-Identifier: Apache-2.0
// From a codebook known at run time to code compiled for it.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../codebook.h"

namespace pvq::cuda {

// What `function` returns for an integral_constant of the codebook.
template <typename Function>
auto with_codebook(CodebookId id, Function function) {
  switch (id) {
    case CodebookId::kPvq2:
      return function(std::integral_constant<CodebookId, CodebookId::kPvq2>());
    case CodebookId::kPvq3:
      return function(std::integral_constant<CodebookId, CodebookId::kPvq3>());
    case CodebookId::kPvq4:
      return function(std::integral_constant<CodebookId, CodebookId::kPvq4>());
    case CodebookId::kInt8:
      return function(std::integral_constant<CodebookId, CodebookId::kInt8>());
  }
  throw std::invalid_argument("unknown codebook id " + std::to_string(static_cast<int>(id)));
}

}  // namespace pvq::cuda
