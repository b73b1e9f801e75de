// The order in which the lanes of one rank of a tensor-parallel model took their turns, for the other ranks to take them
// in the same order: a lane's turn is full of collective operations, and ranks that ran lanes in different orders would wait
// for each other for ever.
//
// It lies in memory that the ranks of one host share. The first rank writes what it decides; each other rank reads at
// its own pace.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "transport/channel.h"

namespace lamina {

class TurnLog {
 public:
  // Makes the memory of a log, which vanishes with its last user. The caller owns the descriptor.
  static int create();

  // Maps `memory_fd` (borrowed) as the given rank. Throws ChannelError for memory that does not hold a log.
  TurnLog(int memory_fd, int rank);
  ~TurnLog();
  TurnLog(const TurnLog&) = delete;
  TurnLog& operator=(const TurnLog&) = delete;

  bool leads() const { return rank_ == 0; }

  // Rank 0: the lane takes the next turn. Throws ChannelTimeout where another rank has fallen a whole log behind.
  void write(int lane);
  // Other ranks: waits until the next turn is the lane's and `take` succeeds, which is tried whenever something may have
  // changed. Threads of several lanes may wait. Throws ChannelTimeout.
  void follow(int lane, Deadline deadline, const std::function<bool()>& take);
  // Lets waiting threads try again.
  void wake();

 private:
  struct Memory;

  Memory* memory_ = nullptr;
  int rank_;
};

}  // namespace lamina
