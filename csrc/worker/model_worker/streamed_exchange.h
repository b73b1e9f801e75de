// The exchange of lanes whose layers run on a device's streams.
//
// The host enqueues a step's layers ahead of the device and waits for none. For each layer a stream writes q, k, v into
// frames, which lie at fixed places of the channels' memory, and counts it in the word `packed`; a thread of this
// class, the proxy, sends the frames. The stream waits for the word `replied`, reads the reply where it arrived, and
// counts that in `taken`. So no host is in the middle of a step, and nothing is copied on this side.
//
// A frame of a layer is sent after those of the same layer of all steps that were announced before: what a step reads of
// an earlier one, a prefix block that is still being filled say, is then there, in every layer.
//
// Layers differ in the bytes of their rows, and by their group in who gets and answers what of them. The places for frames
// are as large as the largest layer's.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "worker/model_worker/attention_client.h"

namespace lamina {

class StreamedExchange {
 public:
  // In `free` and `replied`: the step failed, and a stream that waits goes on. It runs to its end for nothing.
  static constexpr int32_t kPoison = std::numeric_limits<int32_t>::max();
  // Layers whose frames may be in flight of one lane: when the second is written, the first was answered.
  static constexpr uint32_t kFrames = 2;
  static constexpr size_t kMaxWorkers = 16;

  // What a stream and the host share of a lane, each word in cache lines of its own. They count layers of the lane's step.
  struct Words {
    alignas(128) std::atomic<int32_t> packed;   // by the device: their frames are written
    alignas(128) std::atomic<int32_t> taken;    // by the device: their replies were read
    alignas(128) std::atomic<int32_t> free;     // their frames may be written
    alignas(128) std::atomic<int32_t> replied;  // their replies are there, see `replies`, or nobody owes one
    alignas(128) std::array<std::atomic<uint64_t>, kMaxWorkers> replies;  // by worker: the address of the reply's payload
  };

  // The client's channels, which have carried nothing yet, with room for a layer of `max_tokens` tokens for each lane. The
  // client's post(), collect() and turns are not used any more. Waits of the proxy poll for `spin_us`, then sleep. Without
  // it there is no proxy: who decides what happens next, a test, calls serve_once().
  StreamedExchange(AttentionClient& client, uint32_t num_lanes, size_t max_tokens, std::optional<int> spin_us);
  ~StreamedExchange();
  StreamedExchange(const StreamedExchange&) = delete;
  StreamedExchange& operator=(const StreamedExchange&) = delete;

  // What `max_tokens` and the lanes add to the ring of a worker with this geometry.
  static size_t memory_bytes(const ModelGeometry& geometry, uint32_t num_lanes, size_t max_tokens);

  struct Memory {
    const std::byte* data;
    size_t bytes;
  };
  // What a device has to reach: the words with the copies of replies, then each worker's frames and its replies.
  std::vector<Memory> memories() const;
  Words& words(uint32_t lane) const { return words_[lane]; }
  // Where the payload of a layer's frame for a worker begins.
  std::byte* payload(uint32_t lane, uint32_t worker, uint32_t layer) const;

  // Announces the lane's next step: it comes after all that were announced before.
  void announce(uint32_t lane);
  // Opens the announced step: tells the attention workers, and lets the proxy serve its layers. A worker that is lost
  // fails the step, which finish_step() says. Throws as AttentionClient::begin_step().
  std::vector<AttentionClient::StepRows> begin_step(uint32_t lane, const StepView& step, Deadline deadline);
  // What of the lane's step concerns a worker in the layers of a group.
  const WorkerStep& part(uint32_t lane, uint32_t worker, uint32_t group) const {
    return client_.split(lane).groups.at(group).part(worker);
  }
  // Waits until all layers of the step are sent and answered, or it failed: why, if it did. The stream may still read the
  // last reply; before the lane's next step begins it must have come to the end. A step that was only announced, and
  // does not begin, is over at once. Throws ChannelTimeout if a layer takes the device longer than `timeout` seconds.
  std::optional<std::string> finish_step(uint32_t lane, double timeout);
  // Lets a step run to its end for nothing.
  void fail_step(uint32_t lane, const std::string& why);
  // Gives a worker's part to whoever serves `channel`; no lane may be in a step. What memories() returns is other memory
  // afterwards.
  void replace_channel(uint32_t worker, std::shared_ptr<Channel> channel);
  // A round of the proxy: sends what is packed, shows what came. Whether there was anything.
  bool serve_once();
  // How long an attention worker may take for one layer.
  void set_timeout(double seconds) { timeout_ = seconds; }

 private:
  struct Worker {
    size_t frames_at = 0;  // in the send memory
    size_t frame_bytes = 0;
    std::optional<uint32_t> held_by;  // the lane whose reply, the channel's received frame, is being read
    int32_t held_until = 0;           // the lane has taken so many layers
  };
  struct Lane {
    uint64_t ordinal = 0;  // of its step among all that were announced; 0: there is none
    bool begun = false;
    std::optional<std::string> failure;
    int32_t free = 0, posted = 0, replied = 0;  // layers
    std::vector<size_t> num_owed;               // by group: workers that answer a layer
    std::bitset<kMaxWorkers> answered;          // by worker, for the oldest layer that is not replied
    Clock::time_point since;                    // that layer was sent
    Clock::time_point room_wanted;              // for the next layer's frames, at the latest
    std::chrono::nanoseconds slowest{0};        // of its workers, as they say themselves
    // By worker: the number of the frame that lay last in each place, until it is consumed.
    std::vector<std::array<std::optional<uint64_t>, kFrames>> sent;
    std::vector<std::byte*> copies;  // of replies, by worker, where there are several: behind the words
  };
  // The mutex, before the proxy's next round.
  struct Entry {
    explicit Entry(StreamedExchange& exchange) {
      ++exchange.num_entering_;
      lock = std::unique_lock(exchange.mutex_);
      --exchange.num_entering_;
    }
    std::unique_lock<std::mutex> lock;
  };

  uint32_t group_of(int32_t layer) const;
  const WorkerStep& part_of(uint32_t lane, uint32_t worker, int32_t layer) const {
    return part(lane, worker, group_of(layer));
  }
  const LayerRows& rows(uint32_t worker, int32_t layer) const {
    return client_.partition().heads(worker, static_cast<uint32_t>(layer)).rows;
  }
  size_t most_bytes(uint32_t worker, size_t (*bytes)(const LayerRows&, size_t)) const;
  size_t frame_at(uint32_t lane, uint32_t worker, uint32_t layer) const;
  void attach(uint32_t worker);
  void run();
  bool serve();
  bool serve_lane(uint32_t lane);
  bool receive(uint32_t worker);
  void replied(uint32_t lane);
  bool pass_unanswered(uint32_t lane);
  void look();
  void post_layer(uint32_t lane);
  bool may_post(const Lane& lane) const;
  bool wants_room(const Lane& lane) const;
  bool has_room(Lane& lane, uint32_t worker);
  bool free_one(uint32_t lane);
  void fail(uint32_t lane, const std::string& why);
  void let_go(uint32_t worker);

  AttentionClient& client_;
  const size_t max_tokens_;
  const std::chrono::microseconds spin_;
  Words* words_ = nullptr;
  size_t words_bytes_ = 0;  // with the copies of replies
  std::atomic<double> timeout_{60.0};
  std::atomic<int> num_entering_{0};

  std::mutex mutex_;  // guards what follows; the proxy holds it for a round
  std::condition_variable begun_;  // a step
  std::condition_variable progress_;  // of a step
  bool stopping_ = false;
  uint64_t num_announced_ = 0;
  std::vector<Worker> workers_;
  std::vector<Lane> lanes_;
  std::thread proxy_;
};

}  // namespace lamina
