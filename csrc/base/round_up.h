// Sizes in whole units.
#pragma once

#include <type_traits>

namespace lamina {

template <class Integer>
constexpr Integer round_up(Integer size, std::type_identity_t<Integer> unit) {
  return (size + unit - 1) / unit * unit;
}

}  // namespace lamina
