#include "ping_pong.h"

#include <cstring>

namespace lamina {
namespace {

uint64_t sum_words(std::span<const std::byte> frame) {
  uint64_t sum = 0;
  for (size_t i = 0; i + 8 <= frame.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, frame.data() + i, 8);
    sum += word;
  }
  return sum;
}

}  // namespace

void echo_until_closed(Channel& channel) {
  try {
    while (true) {
      const auto frame = channel.receive(Clock::now() + std::chrono::hours(1));
      const uint64_t sum = sum_words(frame);
      const size_t bytes = frame.size();
      // Given back before the answer is posted, so that the peer finds its ring empty and reuses the same
      // memory.
      channel.release();
      const auto answer = channel.reserve(bytes, Clock::now() + std::chrono::minutes(1));
      std::memset(answer.data(), static_cast<int>(sum & 0xff), bytes);
      channel.post();
    }
  } catch (const ChannelClosed&) {
  }
}

std::vector<int64_t> ping_pong(Channel& channel, size_t bytes, int count, Deadline deadline) {
  std::vector<int64_t> round_trips;
  round_trips.reserve(static_cast<size_t>(count));
  std::vector<std::byte> message(bytes);
  for (int i = 0; i < count; ++i) {
    const auto expected = static_cast<uint64_t>(i % 251);
    std::memcpy(message.data(), &expected, 8);
    const auto begin = Clock::now();
    const auto frame = channel.reserve(bytes, deadline);
    std::memcpy(frame.data(), message.data(), bytes);
    channel.post();
    const auto answer = channel.receive(deadline);
    const uint64_t sum = sum_words(answer);
    const auto words = static_cast<uint64_t>(answer.size() / 8);
    channel.release();
    round_trips.push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
    if (sum != words * (expected * 0x0101010101010101ULL)) throw ChannelError("the echo sent a wrong answer");
  }
  return round_trips;
}

}  // namespace lamina
