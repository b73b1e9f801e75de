// The fuzz target and its counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina::fuzz {

inline constexpr size_t kNumWorkers = 2;

uint64_t frames_so_far();
void print_totals();

}  // namespace lamina::fuzz

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
