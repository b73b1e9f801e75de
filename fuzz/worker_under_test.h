// A real attention worker on a real channel in this process, fed with frames whose answers are known beforehand.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "frame_judge.h"
#include "frame_program.h"
#include "raw_sender.h"
#include "transport/shm_channel.h"
#include "worker/attention_worker/attention_worker.h"

namespace lamina::fuzz {

struct Totals {
  uint64_t programs = 0;
  uint64_t frames = 0;
  uint64_t accepted = 0;
  uint64_t rejected = 0;         // equals the worker's rejected_frames
  uint64_t bad_descriptors = 0;  // of these
  uint64_t outputs = 0;
  uint64_t errors = 0;
  uint64_t channels_ended = 0;  // by the worker, because the peer broke the channel's rules
};

class WorkerUnderTest {
 public:
  WorkerUnderTest(ModelGeometry geometry, int32_t num_blocks, int num_threads);
  ~WorkerUnderTest();
  WorkerUnderTest(const WorkerUnderTest&) = delete;
  WorkerUnderTest& operator=(const WorkerUnderTest&) = delete;

  // Runs one program, compares every answer and the counters with the judge's, and has the worker attend something whose
  // result is known. Whatever is not as it should be is printed and aborts the process, which is a crash to the fuzzer.
  void run(std::span<const uint8_t> program, Totals& totals);
  // The same, and then claims to have consumed that many of the worker's frames. If that is more than there were, the
  // worker must end the channel.
  void run_and_claim(std::span<const uint8_t> program, uint64_t consumed, Totals& totals);

 private:
  struct Connection;

  void connect();
  void send(const Sent& sent, FrameJudge& judge, std::vector<Verdict>& verdicts, Totals& totals);
  void check_answers(const std::vector<Verdict>& verdicts, Totals& totals);
  // A step whose attention is known, and its comparison with softmax in double precision.
  struct Known {
    std::vector<float> q, k, v;
  };
  Known send_known();
  void check_known(const Known& known);
  std::vector<std::byte> receive();

  const ModelGeometry geometry_;
  const int32_t num_blocks_;
  const int num_threads_;
  std::unique_ptr<Connection> connection_;
  uint64_t rejected_ = 0;  // of this connection
};

}  // namespace lamina::fuzz
