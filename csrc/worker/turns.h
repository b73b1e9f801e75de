// Whose turn it is to use the compute device, of several lanes that run their steps in strict rotation.
//
// A lane takes part from begin() to end(). Within a step it gives its turn away at every wait (yield) and goes on when
// the turn comes round (acquire). No lane gets two turns while another one that takes part has had none: a lane that
// began later never passes one that began earlier, layer by layer. What a later step may read of an earlier one, a prefix
// block that is still being filled say, has therefore been sent before, in every layer.
#pragma once

#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "transport/channel.h"

namespace lamina {

class Turns {
 public:
  // Joins the rotation behind all lanes that take part, and waits for the turn.
  void begin(int lane, Deadline deadline) {
    std::unique_lock lock(mutex_);
    for (int other : rotation_)
      if (other == lane) throw std::logic_error("lane takes part already");
    // The rotation starts at the holder; its end is the place that the turn reaches last.
    rotation_.push_back(lane);
    try {
      wait_for_turn(lane, lock, deadline);
    } catch (...) {
      leave(lane);
      throw;
    }
  }

  // Hands the turn to the next lane, if there is one.
  void yield(int lane) {
    std::lock_guard lock(mutex_);
    require_turn(lane);
    rotation_.erase(rotation_.begin());
    rotation_.push_back(lane);
    changed_.notify_all();
  }

  // Waits for the turn after a yield. A lane whose wait ends by the deadline must call end().
  void acquire(int lane, Deadline deadline) {
    std::unique_lock lock(mutex_);
    wait_for_turn(lane, lock, deadline);
  }

  // Leaves the rotation, from wherever the step is.
  void end(int lane) {
    std::lock_guard lock(mutex_);
    leave(lane);
  }

  int num_lanes() const {
    std::lock_guard lock(mutex_);
    return static_cast<int>(rotation_.size());
  }

 private:
  void wait_for_turn(int lane, std::unique_lock<std::mutex>& lock, Deadline deadline) {
    if (!changed_.wait_until(lock, deadline, [&] { return !rotation_.empty() && rotation_.front() == lane; }))
      throw ChannelTimeout("the other lane did not hand over the compute device in time");
  }
  void require_turn(int lane) const {
    if (rotation_.empty() || rotation_.front() != lane) throw std::logic_error("it is not this lane's turn");
  }
  void leave(int lane) {
    std::erase(rotation_, lane);
    changed_.notify_all();
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> rotation_;  // lanes that take part; the first has the turn
};

}  // namespace lamina
