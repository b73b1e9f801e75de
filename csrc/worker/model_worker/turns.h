// Whose turn it is to use the compute device, of several lanes that run their steps in strict rotation.
//
// A lane takes part from begin() to end(). Within a step it gives its turn away at every wait (yield) and goes on when
// the turn comes round (acquire). Steps begin in the order in which join() announced them, and no lane gets two turns
// while another one that takes part has had none: a step that was scheduled later never passes one that was scheduled
// earlier, layer by layer. What it may read of the earlier one, a prefix block that is still being filled say, has
// therefore been sent before, in every layer.
//
// On several ranks of one model the first decides, and the others take the same turns: see turn_log.h.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "transport/channel.h"
#include "worker/model_worker/turn_log.h"

namespace lamina {

class Turns {
 public:
  // Takes part in the turns of several ranks; before any lane has begun.
  void share(std::unique_ptr<TurnLog> log) { log_ = std::move(log); }

  // Announces a step: the lane's next begin() comes after that of every step announced before.
  void join(int lane) {
    if (follows()) return;
    std::lock_guard lock(mutex_);
    announced_.push_back(lane);
  }

  // Joins the rotation behind all lanes that take part, and waits for the turn. What was not announced, work that sends
  // nothing to the attention worker, begins as soon as it can.
  void begin(int lane, Deadline deadline) {
    std::unique_lock lock(mutex_);
    if (contains(rotation_, lane)) throw std::logic_error("lane takes part already");
    if (contains(announced_, lane)) {
      const bool first = changed_.wait_until(lock, deadline, [&] { return announced_.front() == lane; });
      announced_.erase(std::find(announced_.begin(), announced_.end(), lane));
      changed_.notify_all();
      if (!first) throw ChannelTimeout("the step scheduled before this one did not begin in time");
    }
    rotation_.push_back(lane);
    try {
      take_turn(lane, lock, deadline);
    } catch (...) {
      leave(lane);
      throw;
    }
  }

  // Hands the turn to the next lane. A lane that is alone leaves the turn to whoever comes first, itself or a lane that
  // begins.
  void yield(int lane) {
    std::lock_guard lock(mutex_);
    if (turn_ != lane) throw std::logic_error("it is not this lane's turn");
    pass_on(lane);
  }

  // Waits for the turn after a yield. A lane whose wait ends by the deadline must call end().
  void acquire(int lane, Deadline deadline) {
    std::unique_lock lock(mutex_);
    take_turn(lane, lock, deadline);
  }

  // Leaves the rotation, from wherever the step is.
  void end(int lane) {
    std::lock_guard lock(mutex_);
    leave(lane);
  }

 private:
  static constexpr int kNobody = -1;

  static bool contains(const std::vector<int>& lanes, int lane) {
    return std::find(lanes.begin(), lanes.end(), lane) != lanes.end();
  }

  bool follows() const { return log_ && !log_->leads(); }

  void take_turn(int lane, std::unique_lock<std::mutex>& lock, Deadline deadline) {
    if (follows()) {
      lock.unlock();
      log_->follow(lane, deadline, [&] {
        std::lock_guard taking(mutex_);
        if (turn_ != kNobody) return false;  // the lane before has not handed over yet
        turn_ = lane;
        return true;
      });
      lock.lock();
      return;
    }
    if (!changed_.wait_until(lock, deadline, [&] { return turn_ == lane || turn_ == kNobody; }))
      throw ChannelTimeout("the other lane did not hand over the compute device in time");
    turn_ = lane;
    if (log_) log_->write(lane);
  }
  void pass_on(int lane) {
    if (follows()) {
      turn_ = kNobody;
      return log_->wake();
    }
    auto place = std::find(rotation_.begin(), rotation_.end(), lane);
    auto next = std::next(place) == rotation_.end() ? rotation_.begin() : std::next(place);
    turn_ = *next == lane ? kNobody : *next;
    changed_.notify_all();
  }
  void leave(int lane) {
    if (turn_ == lane) pass_on(lane);
    std::erase(rotation_, lane);
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> announced_;  // lanes whose steps are to begin, in that order
  std::vector<int> rotation_;  // lanes that take part, in the order in which the turn goes round
  int turn_ = kNobody;
  std::unique_ptr<TurnLog> log_;
};

}  // namespace lamina
