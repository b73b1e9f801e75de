// How long the model worker waited for attention, as a histogram: what its metrics show.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace lamina {

using Microseconds = std::chrono::microseconds;

// Upper bounds of the classes, inclusive; one more class holds what exceeds the last.
inline constexpr std::array<Microseconds, 15> kWaitBounds = {
    Microseconds(10),      Microseconds(25),      Microseconds(50),      Microseconds(100),
    Microseconds(250),     Microseconds(500),     Microseconds(1'000),   Microseconds(2'500),
    Microseconds(5'000),   Microseconds(10'000),  Microseconds(25'000),  Microseconds(50'000),
    Microseconds(100'000), Microseconds(1'000'000), Microseconds(10'000'000)};

struct WaitCounts {
  std::array<uint32_t, kWaitBounds.size() + 1> counts{};
  std::chrono::nanoseconds sum{0};

  void add(std::chrono::nanoseconds wait) {
    size_t place = 0;
    while (place < kWaitBounds.size() && wait > kWaitBounds[place]) ++place;
    ++counts[place];
    sum += wait;
  }
};

}  // namespace lamina
