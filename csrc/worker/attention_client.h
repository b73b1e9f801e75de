// The model worker's side of the exchange: describes steps, sends q, k, v, and takes the outputs.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "transport/channel.h"
#include "transport/wire.h"
#include "worker/model_geometry.h"
#include "worker/step.h"
#include "worker/turns.h"

namespace lamina {

// The attention worker dropped a frame; the text is its reason.
struct AttentionWorkerError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of one tensor, [tokens, heads, head size] with contiguous tokens: row t begins at data + t * stride
// (bytes).
struct Rows {
  std::byte* data;
  int64_t stride;
};
struct ConstRows {
  const std::byte* data;
  int64_t stride;
};

// One thread per lane may use it at the same time; one lane belongs to one thread at a time.
class AttentionClient {
 public:
  AttentionClient(std::unique_ptr<Channel> channel, ModelGeometry geometry);

  // Lanes that share one compute device use it in turns: between begin_turn() and end_turn(), collect() hands the device
  // to the next lane and comes back when it is this lane's turn again, see turns.h.
  // join_turn() says that the lane's next step comes after all that joined before it.
  void join_turn(uint32_t lane);
  void begin_turn(uint32_t lane, Deadline deadline);
  void end_turn(uint32_t lane);

  // Where the time of the lane's step went.
  struct StepTimes {
    std::chrono::nanoseconds waiting{0};    // in collect()
    std::chrono::nanoseconds attention{0};  // of the attention worker, as it says itself
  };
  StepTimes step_times(uint32_t lane);

  struct StepRows {
    size_t q;        // rows of q that post() sends
    size_t context;  // of these, prefill rows with context, which come back with LSE
  };
  // Opens the lane's next step. What the lane still had in flight is forgotten; late outputs are dropped.
  // Throws std::invalid_argument for a step that does not add up, FrameTooLarge if one layer of it exceeds
  // the channel.
  StepRows begin_step(uint32_t lane, const StepView& step, Deadline deadline);

  // Sends one layer's q rows and all k, v of the lane's step. q, k, v hold the step's tokens in order.
  void post(uint32_t lane, uint32_t layer, ConstRows q, ConstRows k, ConstRows v, Deadline deadline);

  // Waits for the output of the oldest layer posted and not collected, which must be `layer`; there is none
  // to wait for if the step has no q rows. Decode rows go to rows [0, num_decodes) of out; prefill rows, in order, to
  // context_out [rows, heads, head size] and context_lse [rows, heads], both contiguous.
  void collect(uint32_t lane, uint32_t layer, Rows out, std::byte* context_out, std::byte* context_lse,
               Deadline deadline);

  void zero_blocks(std::span<const int32_t> block_ids, Deadline deadline);
  // pairs: source, destination, source, ...
  void copy_blocks(std::span<const int32_t> pairs, Deadline deadline);

  // Marks all later frames. Outputs and errors of another generation are dropped.
  void set_generation(uint64_t generation);
  uint64_t generation() const;

  void close() { channel_->close(); }

 private:
  struct TokenRange {
    size_t first, count;
  };
  struct Reply {
    FrameHeader header;
    std::vector<std::byte> payload;
  };
  struct Lane {
    uint64_t step = 0;
    uint64_t generation = 0;
    size_t num_tokens = 0;
    size_t num_decodes = 0;
    size_t num_q_rows = 0;
    bool takes_turns = false;
    StepTimes times;
    Clock::time_point computing_since;  // the turn, or the output of the layer before
    Clock::time_point turn_began, turn_ended;
    std::vector<TokenRange> q_tokens;
    std::deque<uint32_t> posted_layers;  // that an output is owed for
    std::deque<Reply> inbox;             // replies that the other lane's thread took off the channel
    size_t num_context_rows() const { return num_q_rows - num_decodes; }
  };

  Lane& lane_at(uint32_t lane);
  void send(FrameHeader header, const void* payload, Deadline deadline);
  void deliver(const Lane& lane, const FrameHeader& header, const std::byte* payload, Rows out,
               std::byte* context_out, std::byte* context_lse) const;
  bool is_current(const FrameHeader& header) const;

  const std::unique_ptr<Channel> channel_;
  const ModelGeometry geometry_;
  Turns turns_;
  std::mutex send_mutex_;  // orders the lanes' frames

  mutable std::mutex mutex_;  // guards the rest
  std::condition_variable reply_taken_;
  bool receiving_ = false;  // a thread is at the channel's receiving end
  uint64_t generation_ = 0;
  std::array<Lane, kMaxLanes> lanes_;
};

}  // namespace lamina
