// The model worker's side of the exchange: describes steps to the attention workers, sends q, k, v, and takes and merges
// the outputs.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "transport/channel.h"
#include "wire/frames.h"
#include "worker/model_worker/lse_merge.h"
#include "worker/model_worker/partition.h"
#include "worker/model_worker/turns.h"
#include "worker/model_worker/wait_counts.h"
#include "worker/model_worker/worker_link.h"

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
  // One channel for each worker of the partition.
  AttentionClient(const std::vector<std::shared_ptr<Channel>>& channels, Partition partition);

  // Lanes that share one compute device use it in turns: between begin_turn() and end_turn(), collect() hands the device
  // to the next lane and comes back when it is this lane's turn again, see turns.h.
  // join_turn() says that the lane's next step comes after all that joined before it.
  void join_turn(uint32_t lane);
  void begin_turn(uint32_t lane, Deadline deadline);
  void end_turn(uint32_t lane);
  // Makes the lanes of all ranks of a model take the same turns; before any lane has begun.
  void share_turns(std::unique_ptr<TurnLog> log) { turns_.share(std::move(log)); }

  // Where the time of the lane's step went.
  struct StepTimes {
    std::chrono::nanoseconds waiting{0};    // in collect()
    std::chrono::nanoseconds attention{0};  // of the slowest attention worker of each layer, as it says itself
    WaitCounts waits;  // for the output of each layer, while it was this lane's turn: nobody used the compute device
  };
  StepTimes step_times(uint32_t lane);

  struct StepRows {  // in the layers of a group
    size_t q;        // rows of q that are attended
    size_t context;  // of these, prefill rows with context, which come back with LSE
  };
  // Opens the lane's next step. What the lane still had in flight is forgotten; late outputs are dropped.
  // Throws std::invalid_argument for a step that does not add up, FrameTooLarge if one layer of it exceeds
  // a channel. A worker that is lost fails the step, which collect() tells: only there do the lanes take turns, and on every
  // rank of a model each layer of a step takes as many.
  std::vector<StepRows> begin_step(uint32_t lane, const StepView& step, Deadline deadline);

  // Sends one layer's q rows and all k, v of the lane's step. q, k, v hold the step's tokens in order; k and v of a layer
  // that does not store are not read, nor v of a latent cache.
  void post(uint32_t lane, uint32_t layer, ConstRows q, ConstRows k, ConstRows v, Deadline deadline);

  // Waits for the output of the oldest layer posted and not collected, which must be `layer`; there is none
  // to wait for if the layer has no q rows. Decode rows go to rows [0, num_decodes) of out; prefill rows, in order, to
  // context_out [rows, heads, head size of v] and context_lse [rows, heads], both contiguous.
  // Throws ChannelClosed or ChannelTimeout, with the turn, if a worker is lost; the step cannot be completed then.
  void collect(uint32_t lane, uint32_t layer, Rows out, std::byte* context_out, std::byte* context_lse,
               Deadline deadline);

  // Lets what is left of the lane's step send and wait for nothing; its layers still take their turns.
  void fail_step(uint32_t lane, const std::string& why);

  // Workers that are lost, by their place in the partition.
  std::vector<uint32_t> failed_workers() const;
  // Gives a worker's part to whoever serves `channel`. No lane may be in a step.
  void replace_channel(uint32_t worker, std::shared_ptr<Channel> channel);

  // For what carries the layers of a step itself, without post() and collect(): StreamedExchange.
  WorkerLink& link(size_t worker) { return *links_[worker]; }
  const Partition& partition() const { return partition_; }
  const SplitStep& split(uint32_t lane) { return lane_at(lane).split; }
  const std::optional<std::string>& failure(uint32_t lane) { return lane_at(lane).failure; }
  FrameHeader attend_header(uint32_t lane, uint32_t layer);
  // Whether a reply, or an error, concerns the lane's step; see WorkerLink::open_step().
  bool is_current(const FrameHeader& header);
  void add_times(uint32_t lane, std::chrono::nanoseconds waited, std::chrono::nanoseconds attention);

  void zero_blocks(std::span<const int32_t> block_ids, Deadline deadline);
  // pairs: source, destination, source, ...
  void copy_blocks(std::span<const int32_t> pairs, Deadline deadline);

  // Marks all later frames. Outputs and errors of another generation are dropped.
  void set_generation(uint64_t generation) { generation_ = generation; }
  uint64_t generation() const { return generation_; }

 private:
  struct Lane {
    uint64_t step = 0;
    uint64_t generation = 0;
    SplitStep split;
    SplitStep next;  // the step that is being opened; replaces `split` if it is valid
    std::optional<std::string> failure;  // of the step
    bool takes_turns = false;
    StepTimes times;
    Clock::time_point computing_since;  // the turn, or the output of the layer before
    Clock::time_point turn_began, turn_ended;
    std::deque<uint32_t> posted_layers;  // that an output is owed for
    size_t num_replies = 0;              // workers whose part of the oldest of these is delivered, or not owed
    std::chrono::nanoseconds slowest{0};  // of these
    LseMerge merge;
  };
  // Where the rows of one layer's output go.
  struct Destination {
    Rows out;
    Rows context_out;
    Rows context_lse;
  };

  Lane& lane_at(uint32_t lane);
  // Sends; a worker that is lost fails the lane's step.
  const SplitGroup& split_of(const Lane& lane, uint32_t layer) const {
    return lane.split.groups[static_cast<size_t>(partition_.geometry().layers()[layer].group)];
  }
  template <class Send>
  static void try_send(Lane& lane, Send&& send);
  void send_blocks(FrameType type, const std::vector<std::vector<int32_t>>& parts, Deadline deadline);
  void deliver(Lane& lane, size_t worker, const FrameHeader& header, const std::byte* payload,
               const Destination& to) const;
  void deliver_merged(const Lane& lane, uint32_t layer, const Destination& to) const;

  const Partition partition_;
  std::vector<std::unique_ptr<WorkerLink>> links_;
  Turns turns_;
  std::atomic<uint64_t> generation_{0};
  std::vector<Lane> lanes_;
};

}  // namespace lamina
