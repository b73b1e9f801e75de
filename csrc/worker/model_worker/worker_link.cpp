#include "worker/model_worker/worker_link.h"

#include <utility>

namespace lamina {

void WorkerLink::open_step(uint32_t lane_id, uint64_t generation, uint64_t step) {
  const std::lock_guard lock(mutex_);
  Lane& lane = lanes_[lane_id];
  lane.generation = generation;
  lane.step = step;
  std::erase_if(lane.inbox, [&](const Reply& reply) { return !is_current(reply.header); });
}

bool WorkerLink::is_current(const FrameHeader& header) const {
  const Lane& lane = lanes_[header.lane];
  if (header.generation != lane.generation) return false;
  return header.type == FrameType::kError || (header.type == FrameType::kOutput && header.step == lane.step);
}

uint64_t WorkerLink::send_at(size_t offset, const FrameHeader& header, Deadline deadline) {
  const std::lock_guard lock(send_mutex_);
  const size_t bytes = sizeof header + header.payload_bytes;
  write_header(channel_->send_memory().subspan(offset, bytes), header);
  return watched([&] { return channel_->post_at(offset, bytes, deadline); });
}

// One of the threads that wait is at the channel and takes whatever comes; a reply for another lane goes to that lane's
// inbox. Whoever leaves the channel wakes the others, one of whom takes its place.
void WorkerLink::receive(uint32_t lane_id, Deadline deadline, const Take& take) {
  Lane& lane = lanes_[lane_id];
  std::unique_lock lock(mutex_);
  while (true) {
    if (!lane.inbox.empty()) {
      const Reply reply = std::move(lane.inbox.front());
      lane.inbox.pop_front();
      lock.unlock();
      return take(reply.header, reply.payload.data());
    }
    if (receiving_) {
      if (reply_taken_.wait_until(lock, deadline) == std::cv_status::timeout) {
        failed_ = true;
        throw ChannelTimeout("the attention worker's output did not come in time");
      }
      continue;
    }
    receiving_ = true;
    lock.unlock();
    // Gives the place at the channel, and the frame, back on every way out of this round.
    struct Turn {
      WorkerLink& link;
      std::unique_lock<std::mutex>& lock;
      bool has_frame = false;
      ~Turn() {
        if (has_frame) link.channel_->release();
        if (!lock.owns_lock()) lock.lock();
        link.receiving_ = false;
        link.reply_taken_.notify_all();
      }
    } turn{*this, lock};

    const auto frame = watched([&] { return channel_->receive(deadline); });
    turn.has_frame = true;
    const auto header = read_header(frame);
    if (!header || header->lane >= kMaxLanes) continue;
    const std::byte* payload = frame.data() + sizeof(FrameHeader);
    lock.lock();
    if (!is_current(*header)) continue;
    if (header->lane != lane_id) {
      lanes_[header->lane].inbox.push_back({*header, {payload, payload + header->payload_bytes}});
      continue;
    }
    lock.unlock();
    return take(*header, payload);
  }
}

}  // namespace lamina
