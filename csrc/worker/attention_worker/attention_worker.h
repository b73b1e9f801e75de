// The attention worker's serving loop: takes frames off a channel, keeps the KV pool, and answers with
// attention.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernel/thread_pool.h"
#include "transport/channel.h"
#include "wire/frames.h"
#include "wire/model_geometry.h"
#include "worker/attention_worker/kv_pool.h"
#include "worker/attention_worker/step.h"

namespace lamina {

// The counters; wire/messages.py says what each means, in a field of the same name of WorkerStats.
#define LAMINA_WORKER_COUNTERS(COUNTER)                                                                           \
  COUNTER(steps) COUNTER(messages) COUNTER(bytes_in) COUNTER(bytes_out) COUNTER(tokens_appended)                \
  COUNTER(ns_attending) COUNTER(ns_appending) COUNTER(ns_waiting) COUNTER(ns_idle) COUNTER(rejected_frames)

// Written by the serving thread only, read by any; times are nanoseconds.
struct WorkerCounters {
#define LAMINA_DECLARE(name) std::atomic<uint64_t> name{0};
  LAMINA_WORKER_COUNTERS(LAMINA_DECLARE)
#undef LAMINA_DECLARE
};

// One frame in a trace; times are nanoseconds of the steady clock. See wire/frames.h for `began` and `posted`.
struct TraceEvent {
  uint64_t type, lane, layer, tokens;
  uint64_t began, posted, received, done;
};

// Serves one engine: the pool lives as long as this object, so the next engine begins with a clean one.
class AttentionWorker {
 public:
  // Maps the pool and starts the kernel's threads. cpus: one per thread, or empty to leave the threads unpinned. Throws
  // std::invalid_argument for an unsupported geometry or a CPU that this process may not use, std::bad_alloc where the
  // system refuses the memory, std::system_error where it refuses the threads.
  AttentionWorker(ModelGeometry geometry, int32_t num_blocks, int num_threads, std::vector<int> cpus,
                  int spin_us);
  ~AttentionWorker();
  AttentionWorker(const AttentionWorker&) = delete;
  AttentionWorker& operator=(const AttentionWorker&) = delete;

  // Starts the serving thread on `channel`; at most once. The thread ends, and closes the channel, when the
  // peer leaves or stop() is called.
  void serve(std::shared_ptr<Channel> channel);
  // Ends the serving thread soon, whatever frame is in hand; its answer is not sent.
  void stop();

  // Grows at least every 100 ms while the serving thread is well, whether it idles, waits or works on a long frame. One
  // that stands still for seconds is stuck.
  uint64_t progress() const { return threads_.progress(); }

  // Records every STEP and ATTEND until take_trace(), up to kMaxTraceEvents.
  void start_trace();
  std::vector<TraceEvent> take_trace();

  const WorkerCounters& counters() const { return counters_; }
  size_t used_bytes() const { return pool_.size(); }
  Isa isa() const { return pool_.kernel(0).isa(); }

 private:
  struct Lane {
    Step step;
    uint64_t id = 0;
    uint64_t generation = 0;
    bool known = false;      // the step was accepted
    bool in_flight = false;  // and its last layer is still to come
    uint32_t last_layer = 0;  // that this worker has a part in
  };

  void record(const FrameHeader& header, uint64_t received);

  void run();
  void loop();
  void handle(std::span<const std::byte> frame);
  void begin_step(const FrameHeader& header, std::span<const std::byte> payload);
  void attend(const FrameHeader& header, std::span<const std::byte> payload);
  void zero_blocks(std::span<const std::byte> payload);
  void copy_blocks(std::span<const std::byte> payload);
  std::vector<int32_t> read_block_ids(std::span<const std::byte> payload) const;

  std::span<std::byte> reserve_reply(size_t bytes);
  void send_error(const FrameHeader& header, const std::string& reason);
  void reject(const std::string& reason);
  void release();
  void advance() { threads_.advance(0); }
  bool any_in_flight() const;

  const ModelGeometry geometry_;
  const int32_t num_blocks_;
  KvPool pool_;
  ThreadPool threads_;  // the serving thread is its thread 0

  std::shared_ptr<Channel> channel_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> tracing_{false};
  std::mutex trace_mutex_;
  std::vector<TraceEvent> trace_;
  WorkerCounters counters_;

  // The serving thread's own.
  std::array<Lane, kMaxLanes> lanes_;
  std::vector<float> lse_;
  bool received_ = false;
  uint64_t bad_descriptors_ = 0;
  uint64_t rejected_unlogged_ = 0;
  std::optional<Clock::time_point> last_rejected_log_;
};

}  // namespace lamina
