// The fuzz target for frames: an input picks a worker and is a program of frames for it.
#include "fuzz_target.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>

#include "uniform_geometry.h"
#include "worker_under_test.h"

namespace lamina::fuzz {
namespace {

constexpr size_t kNumWorkers = 3;

Totals totals;

// The second group's blocks are smaller, its layers have all rules, and one of them shares another's KV.
ModelGeometry layers_of_several_kinds() {
  const ScoreRule windowed{.scale = 0.2f, .soft_cap = 3, .window = 20, .chunk = 0, .sinks = {0.5f, -1}, .alibi_slopes = {}};
  const ScoreRule chunked{.scale = 0.1f, .soft_cap = 0, .window = 0, .chunk = 24, .sinks = {}, .alibi_slopes = {0.5f, 0.1f}};
  return {{{32, 2, 32, 32, DType::kFloat32}, {16, 1, 48, 32, DType::kBFloat16}},
          {{0, 0, 0, 2, ScoreRule{0.17f, 0, 0, 0, {}, {}}, true},
           {1, 1, 0, 2, windowed, true},
           {1, 1, 1, 2, chunked, true},
           {1, 1, 0, 2, windowed, false}}};
}

WorkerUnderTest& worker(size_t index) {
  static const std::unique_ptr<WorkerUnderTest> workers[kNumWorkers] = {
      std::make_unique<WorkerUnderTest>(uniform_geometry({DType::kFloat32, 2, 2, 32, 32, 32}, {0.17f, 0.2f}), 5, 1),
      std::make_unique<WorkerUnderTest>(uniform_geometry({DType::kFloat32, 2, 1, 48, 64, 48}, {0.15f}), 3, 2),
      std::make_unique<WorkerUnderTest>(layers_of_several_kinds(), 6, 2),
  };
  return *workers[index];
}

void print_totals() {
  const auto number = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf(
      "fuzz: %llu frames in %llu programs: %llu accepted, %llu rejected and counted as such (%llu of them bad\n"
      "fuzz: descriptors); answers checked: %llu OUTPUT, %llu ERROR; %llu channels ended for a broken rule\n",
      number(totals.frames), number(totals.programs), number(totals.accepted), number(totals.rejected),
      number(totals.bad_descriptors), number(totals.outputs), number(totals.errors),
      number(totals.channels_ended));
  std::fflush(stdout);
}

}  // namespace

uint64_t made_so_far() { return totals.frames; }

}  // namespace lamina::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit(lamina::fuzz::print_totals);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lamina::fuzz;
  if (size < 2) return 0;
  Bytes choice({data, size});
  const uint8_t pick = choice.byte();
  WorkerUnderTest& target = worker(pick % kNumWorkers);
  const std::span<const uint8_t> program(data + 1, size - 1);
  if (pick >= 250) {
    target.run_and_claim(program, Bytes(program).number(), totals);
  } else {
    target.run(program, totals);
  }
  return 0;
}
