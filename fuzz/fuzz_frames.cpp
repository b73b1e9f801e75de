// The fuzz target for frames: an input picks a worker and is a program of frames for it.
#include "fuzz_target.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>

#include "worker_under_test.h"

namespace lamina::fuzz {
namespace {

constexpr size_t kNumWorkers = 2;

Totals totals;

WorkerUnderTest& worker(size_t index) {
  static const std::unique_ptr<WorkerUnderTest> workers[kNumWorkers] = {
      std::make_unique<WorkerUnderTest>(ModelGeometry{{DType::kFloat32, 2, 2, 32, 32, 32}, {0.17f, 0.2f}}, 5, 1),
      std::make_unique<WorkerUnderTest>(ModelGeometry{{DType::kFloat32, 2, 1, 48, 64, 48}, {0.15f}}, 3, 2),
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
