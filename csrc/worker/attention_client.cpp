#include "worker/attention_client.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace lamina {
namespace {

// Copies rows into contiguous memory; one memcpy where they are contiguous already.
std::byte* pack(std::byte* to, ConstRows from, size_t first, size_t count, size_t row_bytes) {
  const std::byte* row = from.data + static_cast<int64_t>(first) * from.stride;
  if (from.stride == static_cast<int64_t>(row_bytes)) {
    std::memcpy(to, row, count * row_bytes);
    return to + count * row_bytes;
  }
  for (size_t i = 0; i < count; ++i, row += from.stride, to += row_bytes) std::memcpy(to, row, row_bytes);
  return to;
}

void unpack(Rows to, const std::byte* from, size_t count, size_t row_bytes) {
  if (to.stride == static_cast<int64_t>(row_bytes)) {
    std::memcpy(to.data, from, count * row_bytes);
    return;
  }
  for (size_t i = 0; i < count; ++i, from += row_bytes) {
    std::memcpy(to.data + static_cast<int64_t>(i) * to.stride, from, row_bytes);
  }
}

uint64_t nanoseconds(Clock::time_point time) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

}  // namespace

AttentionClient::AttentionClient(std::unique_ptr<Channel> channel, ModelGeometry geometry)
    : channel_(std::move(channel)), geometry_(std::move(geometry)) {}

AttentionClient::Lane& AttentionClient::lane_at(uint32_t lane) {
  if (lane >= kMaxLanes) {
    throw std::invalid_argument("lane " + std::to_string(lane) + " of at most " + std::to_string(kMaxLanes));
  }
  return lanes_[lane];
}

void AttentionClient::set_generation(uint64_t generation) {
  const std::lock_guard lock(mutex_);
  generation_ = generation;
}

uint64_t AttentionClient::generation() const {
  const std::lock_guard lock(mutex_);
  return generation_;
}

AttentionClient::StepTimes AttentionClient::step_times(uint32_t lane) { return lane_at(lane).times; }

void AttentionClient::join_turn(uint32_t lane_id) {
  lane_at(lane_id);
  turns_.join(static_cast<int>(lane_id));
}

void AttentionClient::begin_turn(uint32_t lane_id, Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  turns_.begin(static_cast<int>(lane_id), deadline);
  lane.takes_turns = true;
  lane.turn_began = Clock::now();
}

void AttentionClient::end_turn(uint32_t lane_id) {
  Lane& lane = lane_at(lane_id);
  lane.takes_turns = false;
  lane.turn_ended = Clock::now();
  turns_.end(static_cast<int>(lane_id));
}

AttentionClient::StepRows AttentionClient::begin_step(uint32_t lane_id, const StepView& view,
                                                      Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  const int32_t block_size = geometry_.attention.block_size;
  const size_t num_block_ids = view.validate(block_size);

  FrameHeader header;
  {
    const std::lock_guard lock(mutex_);
    ++lane.step;
    lane.times = {};
    header.began_ns = nanoseconds(lane.computing_since);
    header.posted_ns = nanoseconds(lane.turn_ended);
    lane.computing_since = lane.takes_turns ? lane.turn_began : Clock::now();
    lane.generation = generation_;
    lane.posted_layers.clear();
    // Outputs of the old step are stale; an error is not, for the KV it tells of is still missing.
    std::erase_if(lane.inbox, [&](const Reply& reply) { return !is_current(reply.header); });
    lane.num_tokens = view.slot_mapping.size();
    lane.num_decodes = static_cast<size_t>(view.num_decodes);
    lane.num_q_rows = lane.num_decodes;
    lane.q_tokens.assign(1, {0, lane.num_decodes});
    size_t token = lane.num_decodes;
    for (size_t i = lane.num_decodes; i < view.query_lens.size(); ++i) {
      const auto count = static_cast<size_t>(view.query_lens[i]);
      if (view.context_lens[i] > 0) {
        lane.q_tokens.push_back({token, count});
        lane.num_q_rows += count;
      }
      token += count;
    }
    header.step = lane.step;
    header.generation = lane.generation;
  }
  const AttendLayout attend(lane.num_q_rows * geometry_.q_row_bytes(),
                            lane.num_tokens * geometry_.kv_row_bytes());
  if (sizeof(FrameHeader) + attend.bytes > channel_->max_frame_bytes()) {
    throw FrameTooLarge("one layer of a step of " + std::to_string(lane.num_tokens) + " tokens takes " +
                        std::to_string(attend.bytes) + " bytes, the channel's ring holds " +
                        std::to_string(channel_->max_frame_bytes()) +
                        "; raise ring_bytes or lower max_num_batched_tokens");
  }
  header.type = FrameType::kStep;
  header.lane = lane_id;
  header.payload_bytes = view.payload_bytes(num_block_ids);
  // A step without q rows waits for nothing, and would not notice otherwise.
  if (channel_->peer_closed()) throw ChannelClosed("the attention worker is gone");
  const std::lock_guard lock(send_mutex_);
  const auto frame = channel_->reserve(sizeof header + header.payload_bytes, deadline);
  view.write(write_header(frame, header), num_block_ids, block_size);
  channel_->post();
  return {lane.num_q_rows, lane.num_context_rows()};
}

void AttentionClient::post(uint32_t lane_id, uint32_t layer, ConstRows q, ConstRows k, ConstRows v,
                           Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  if (layer >= geometry_.scales.size()) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " does not exist");
  }
  const size_t q_row = geometry_.q_row_bytes();
  const size_t kv_row = geometry_.kv_row_bytes();
  const AttendLayout layout(lane.num_q_rows * q_row, lane.num_tokens * kv_row);
  FrameHeader header;
  header.type = FrameType::kAttend;
  header.generation = lane.generation;
  header.step = lane.step;
  header.payload_bytes = layout.bytes;
  header.lane = lane_id;
  header.layer = layer;
  header.began_ns = nanoseconds(lane.computing_since);
  {
    const std::lock_guard lock(send_mutex_);
    const auto frame = channel_->reserve(sizeof header + layout.bytes, deadline);
    std::byte* payload = frame.data() + sizeof header;
    std::byte* to = payload;
    for (const auto& range : lane.q_tokens) to = pack(to, q, range.first, range.count, q_row);
    pack(payload + layout.k, k, 0, lane.num_tokens, kv_row);
    pack(payload + layout.v, v, 0, lane.num_tokens, kv_row);
    header.posted_ns = nanoseconds(Clock::now());
    write_header(frame, header);
    channel_->post();
  }
  if (lane.num_q_rows > 0) lane.posted_layers.push_back(layer);
}

// Errors count by generation alone: a frame of an earlier step that was dropped has lost KV that later steps
// rely on.
bool AttentionClient::is_current(const FrameHeader& header) const {
  const Lane& lane = lanes_[header.lane];
  if (header.generation != lane.generation) return false;
  return header.type == FrameType::kError || (header.type == FrameType::kOutput && header.step == lane.step);
}

// Threads of several lanes may wait here. One of them is at the channel and takes whatever comes; a reply for
// another lane goes to that lane's inbox. Whoever leaves the channel wakes the others, one of whom takes its
// place.
void AttentionClient::collect(uint32_t lane_id, uint32_t layer, Rows out, std::byte* context_out,
                              std::byte* context_lse, Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  const struct Waiting {
    Lane& lane;
    Clock::time_point begin = Clock::now();
    ~Waiting() {
      lane.computing_since = Clock::now();
      lane.times.waiting += lane.computing_since - begin;
    }
  } waiting{lane};
  if (lane.takes_turns) {
    turns_.yield(static_cast<int>(lane_id));
    turns_.acquire(static_cast<int>(lane_id), deadline);
  }
  if (lane.num_q_rows == 0) return;
  if (lane.posted_layers.empty() || lane.posted_layers.front() != layer) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " of lane " + std::to_string(lane_id) +
                                " is not the oldest that was posted and not collected");
  }
  if (lane.num_context_rows() > 0 && (context_out == nullptr || context_lse == nullptr)) {
    throw std::invalid_argument(
        "the step has prefill rows with context: context_out and context_lse are required");
  }
  std::unique_lock lock(mutex_);
  while (true) {
    if (!lane.inbox.empty()) {
      const Reply reply = std::move(lane.inbox.front());
      lane.inbox.pop_front();
      lock.unlock();
      lane.posted_layers.pop_front();
      lane.times.attention += std::chrono::nanoseconds(reply.header.service_ns);
      return deliver(lane, reply.header, reply.payload.data(), out, context_out, context_lse);
    }
    if (receiving_) {
      if (reply_taken_.wait_until(lock, deadline) == std::cv_status::timeout) {
        throw ChannelTimeout("the attention worker's output did not come in time");
      }
      continue;
    }
    receiving_ = true;
    lock.unlock();
    // Gives the place at the channel, and the frame, back on every way out of this round.
    struct Turn {
      AttentionClient& client;
      std::unique_lock<std::mutex>& lock;
      bool has_frame = false;
      ~Turn() {
        if (has_frame) client.channel_->release();
        if (!lock.owns_lock()) lock.lock();
        client.receiving_ = false;
        client.reply_taken_.notify_all();
      }
    } turn{*this, lock};

    const auto frame = channel_->receive(deadline);
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
    lane.posted_layers.pop_front();
    lane.times.attention += std::chrono::nanoseconds(header->service_ns);
    return deliver(lane, *header, payload, out, context_out, context_lse);
  }
}

void AttentionClient::deliver(const Lane& lane, const FrameHeader& header, const std::byte* payload, Rows out,
                              std::byte* context_out, std::byte* context_lse) const {
  if (header.type == FrameType::kError) {
    throw AttentionWorkerError("the attention worker dropped a frame: " +
                               std::string(reinterpret_cast<const char*>(payload), header.payload_bytes));
  }
  const size_t row = geometry_.q_row_bytes();
  const size_t context_rows = lane.num_context_rows();
  const OutputLayout layout(lane.num_q_rows * row, context_rows * geometry_.lse_row_bytes());
  if (header.payload_bytes != layout.bytes) {
    throw AttentionWorkerError("the output's size does not fit the step");
  }
  if (lane.num_decodes > 0) unpack(out, payload, lane.num_decodes, row);
  if (context_rows > 0) {
    std::memcpy(context_out, payload + lane.num_decodes * row, context_rows * row);
    std::memcpy(context_lse, payload + layout.lse, context_rows * geometry_.lse_row_bytes());
  }
}

void AttentionClient::send(FrameHeader header, const void* payload, Deadline deadline) {
  header.generation = generation();
  const std::lock_guard lock(send_mutex_);
  const auto frame = channel_->reserve(sizeof header + header.payload_bytes, deadline);
  std::memcpy(write_header(frame, header), payload, header.payload_bytes);
  channel_->post();
}

void AttentionClient::zero_blocks(std::span<const int32_t> block_ids, Deadline deadline) {
  if (block_ids.empty()) return;
  FrameHeader header;
  header.type = FrameType::kZeroBlocks;
  header.payload_bytes = block_ids.size_bytes();
  send(header, block_ids.data(), deadline);
}

void AttentionClient::copy_blocks(std::span<const int32_t> pairs, Deadline deadline) {
  if (pairs.empty()) return;
  FrameHeader header;
  header.type = FrameType::kCopyBlocks;
  header.payload_bytes = pairs.size_bytes();
  send(header, pairs.data(), deadline);
}

}  // namespace lamina
