// Round trips over a Channel, to measure and to test it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "transport/channel.h"

namespace lamina {

// Answers every frame with one of the same size, until the peer leaves: reads all of the frame in place and
// writes all of the answer in place, as an attention worker does.
void echo_until_closed(Channel& channel);

// Sends `count` frames of `bytes` (at least 8) one after the other and reads each answer in place. Returns
// the round trips in nanoseconds. Throws ChannelError, also if an answer is wrong.
std::vector<int64_t> ping_pong(Channel& channel, size_t bytes, int count, Deadline deadline);

}  // namespace lamina
