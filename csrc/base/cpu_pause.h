// A hint to the CPU that the caller polls.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lamina {

inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace lamina
