// A fuzz target and its counts, as standalone_main.cpp and libFuzzer run it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina::fuzz {

// Inputs are programs; a program makes several of what the target takes, such as frames.
uint64_t made_so_far();

}  // namespace lamina::fuzz

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
