#include "worker/model_worker/attention_client.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

namespace lamina {
namespace {

// Copies rows into contiguous memory; one memcpy where they are contiguous already.
std::byte* pack(std::byte* to, ConstRows from, RowRange rows, size_t row_bytes) {
  const std::byte* row = from.data + static_cast<int64_t>(rows.first) * from.stride;
  if (from.stride == static_cast<int64_t>(row_bytes)) {
    std::memcpy(to, row, rows.count * row_bytes);
    return to + rows.count * row_bytes;
  }
  for (size_t i = 0; i < rows.count; ++i, row += from.stride, to += row_bytes) std::memcpy(to, row, row_bytes);
  return to;
}

void unpack(Rows to, RowRange rows, const std::byte* from, size_t row_bytes) {
  std::byte* row = to.data + static_cast<int64_t>(rows.first) * to.stride;
  if (to.stride == static_cast<int64_t>(row_bytes)) {
    std::memcpy(row, from, rows.count * row_bytes);
    return;
  }
  for (size_t i = 0; i < rows.count; ++i, row += to.stride, from += row_bytes) std::memcpy(row, from, row_bytes);
}

ConstRows columns(ConstRows rows, size_t offset) { return {rows.data + offset, rows.stride}; }
Rows columns(Rows rows, size_t offset) { return {rows.data + offset, rows.stride}; }

uint64_t nanoseconds(Clock::time_point time) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count());
}

}  // namespace

AttentionClient::AttentionClient(const std::vector<std::shared_ptr<Channel>>& channels, Partition partition)
    : partition_(std::move(partition)) {
  if (channels.size() != partition_.num_workers()) {
    throw std::invalid_argument(std::to_string(channels.size()) + " channels for a partition over " +
                                std::to_string(partition_.num_workers()) + " attention workers");
  }
  for (const auto& channel : channels) links_.push_back(std::make_unique<WorkerLink>(channel));
  lanes_.resize(kMaxLanes);
}

AttentionClient::Lane& AttentionClient::lane_at(uint32_t lane) {
  if (lane >= kMaxLanes) {
    throw std::invalid_argument("lane " + std::to_string(lane) + " of at most " + std::to_string(kMaxLanes));
  }
  return lanes_[lane];
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

std::vector<AttentionClient::StepRows> AttentionClient::begin_step(uint32_t lane_id, const StepView& view,
                                                                   Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  partition_.split(view, lane.next);
  FrameHeader header;
  header.type = FrameType::kStep;
  header.lane = lane_id;
  header.step = ++lane.step;
  header.generation = lane.generation = generation_;
  header.began_ns = nanoseconds(lane.computing_since);
  header.posted_ns = nanoseconds(lane.turn_ended);
  std::swap(lane.split, lane.next);
  lane.times = {};
  lane.computing_since = lane.takes_turns ? lane.turn_began : Clock::now();
  lane.posted_layers.clear();
  lane.num_replies = 0;
  lane.slowest = {};
  lane.failure.reset();
  for (size_t w = 0; w < links_.size(); ++w) {
    links_[w]->open_step(lane_id, lane.generation, lane.step);
    Channel& channel = links_[w]->channel();
    size_t bytes = 0;
    for (uint32_t l = 0; l < partition_.geometry().layers().size(); ++l) {
      bytes = std::max(bytes, split_of(lane, l).part(w).attend_layout(partition_.heads(w, l).rows).bytes);
    }
    if (sizeof(FrameHeader) + bytes > channel.send_memory().size()) {
      throw FrameTooLarge("one layer of a step of " + std::to_string(view.groups.front().slot_mapping.size()) +
                          " tokens takes " + std::to_string(bytes) + " bytes, the channel's ring holds " +
                          std::to_string(channel.send_memory().size()) +
                          "; raise ring_bytes or lower max_num_batched_tokens");
    }
    // A step that waits for nothing of this worker would not notice otherwise.
    if (lane.split.takes_part(w) && channel.peer_closed()) lane.failure = "the attention worker is gone";
  }
  try_send(lane, [&] {
    for (size_t w = 0; w < links_.size(); ++w) {
      if (!lane.split.takes_part(w)) continue;
      header.payload_bytes = lane.split.payload_bytes(w);
      links_[w]->send(header, deadline, [&](std::byte* payload) { lane.split.write(w, payload); });
    }
  });
  std::vector<StepRows> rows;
  for (const SplitGroup& group : lane.split.groups) rows.push_back({group.num_q_rows, group.num_context_rows});
  return rows;
}

template <class Send>
void AttentionClient::try_send(Lane& lane, Send&& send) {
  if (lane.failure) return;
  try {
    send();
  } catch (const ChannelClosed& error) {
    lane.failure = error.what();
  } catch (const ChannelTimeout& error) {
    lane.failure = error.what();
  }
}

void AttentionClient::post(uint32_t lane_id, uint32_t layer, ConstRows q, ConstRows k, ConstRows v,
                           Deadline deadline) {
  Lane& lane = lane_at(lane_id);
  if (layer >= partition_.geometry().layers().size()) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " does not exist");
  }
  if (lane.split.groups.empty()) throw std::invalid_argument("lane " + std::to_string(lane_id) + " is in no step");
  const SplitGroup& split = split_of(lane, layer);
  FrameHeader header = attend_header(lane_id, layer);
  header.began_ns = nanoseconds(lane.computing_since);
  try_send(lane, [&] {
    for (size_t w = 0; w < links_.size(); ++w) {
      const WorkerStep& part = split.part(w);
      const auto& [row, offset] = partition_.heads(w, layer);
      if (!part.takes_part(row)) continue;
      const AttendLayout layout = part.attend_layout(row);
      header.payload_bytes = layout.bytes;
      links_[w]->send(header, deadline, [&](std::byte* payload) {
        const auto pack_all = [](std::byte* to, ConstRows from, const std::vector<RowRange>& ranges, size_t bytes) {
          for (const RowRange& rows : ranges) to = pack(to, from, rows, bytes);
        };
        pack_all(payload, columns(q, offset.q), part.q_tokens, row.q);
        if (row.k > 0) {
          pack_all(payload + layout.k, columns(k, offset.k), part.kv_tokens, row.k);
          if (row.v > 0) pack_all(payload + layout.v, columns(v, offset.v), part.kv_tokens, row.v);
        }
        header.posted_ns = nanoseconds(Clock::now());
      });
    }
  });
  if (split.num_q_rows > 0) lane.posted_layers.push_back(layer);
}

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
  if (lane.failure) throw ChannelClosed(*lane.failure);
  const auto& layers = partition_.geometry().layers();
  if (lane.split.groups.empty() || (layer < layers.size() && split_of(lane, layer).num_q_rows == 0)) return;
  if (lane.posted_layers.empty() || lane.posted_layers.front() != layer) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " of lane " + std::to_string(lane_id) +
                                " is not the oldest that was posted and not collected");
  }
  const SplitGroup& split = split_of(lane, layer);
  if (split.num_context_rows > 0 && (context_out == nullptr || context_lse == nullptr)) {
    throw std::invalid_argument(
        "the step has prefill rows with context: context_out and context_lse are required");
  }
  const LayerGeometry& shape = layers[layer];
  const Destination to{out,
                       {context_out, static_cast<int64_t>(shape.rows.out)},
                       {context_lse, static_cast<int64_t>(shape.rows.lse)}};
  if (split.num_merge_rows > 0 && lane.num_replies == 0) {
    lane.merge.reset(split.num_merge_rows, shape.attention.dtype, shape.num_heads, shape.attention.head_size_v);
  }
  const Clock::time_point idle_since = Clock::now();
  // The workers attend at the same time; their answers are taken one after the other. A wait that ends by its deadline may
  // be repeated: it goes on where it was.
  for (; lane.num_replies < links_.size(); ++lane.num_replies) {
    const size_t worker = lane.num_replies;
    if (split.part(worker).num_rows == 0) continue;
    const auto take = [&](const FrameHeader& header, const std::byte* payload) {
      deliver(lane, worker, header, payload, to);
    };
    links_[worker]->receive(lane_id, deadline, std::ref(take));  // by reference: nothing to allocate
  }
  deliver_merged(lane, layer, to);
  lane.times.attention += std::exchange(lane.slowest, {});
  lane.times.waits.add(Clock::now() - idle_since);
  lane.num_replies = 0;
  lane.posted_layers.pop_front();
}

void AttentionClient::deliver(Lane& lane, size_t worker, const FrameHeader& header, const std::byte* payload,
                              const Destination& to) const {
  const auto fail = [&](const std::string& what) {
    lane.posted_layers.clear();  // the step cannot be completed
    throw AttentionWorkerError(what);
  };
  if (header.type == FrameType::kError) {
    fail("the attention worker dropped a frame: " +
         std::string(reinterpret_cast<const char*>(payload), header.payload_bytes));
  }
  const uint32_t layer = lane.posted_layers.front();
  const WorkerStep& part = split_of(lane, layer).part(worker);
  const auto& [row, offset] = partition_.heads(worker, layer);
  const OutputLayout layout = part.output_layout(row);
  if (header.payload_bytes != layout.bytes || header.layer != layer) {
    fail("the attention worker's output does not fit the step");
  }
  lane.slowest = std::max(lane.slowest, std::chrono::nanoseconds(header.service_ns));
  for (const Delivery& rows : part.deliveries) {
    const RowRange target{rows.first, rows.count};
    const std::byte* from = payload + rows.row * row.out;
    if (rows.to == Delivery::To::kOut) {
      unpack(columns(to.out, offset.out), target, from, row.out);
      continue;
    }
    const std::byte* lse = payload + layout.lse + (rows.row - part.num_rows_without_lse) * row.lse;
    const auto* lse_values = reinterpret_cast<const float*>(lse);
    switch (rows.to) {
      case Delivery::To::kContext:
        unpack(columns(to.context_out, offset.out), target, from, row.out);
        unpack(columns(to.context_lse, offset.lse), target, lse, row.lse);
        break;
      case Delivery::To::kFirst:
        lane.merge.begin(rows.first, rows.count, from, lse_values);
        break;
      default:
        lane.merge.add(rows.first, rows.count, from, lse_values);
    }
  }
}

void AttentionClient::deliver_merged(const Lane& lane, uint32_t layer, const Destination& to) const {
  const auto& sinks = partition_.geometry().layers()[layer].rule.sinks;
  for (const MergedRows& rows : split_of(lane, layer).merged) {
    const bool decodes = rows.to == Delivery::To::kOut;
    const Rows& target = decodes ? to.out : to.context_out;
    for (size_t i = 0; i < rows.count; ++i) {
      const auto row = static_cast<int64_t>(rows.first + i);
      auto* lse = decodes ? nullptr : reinterpret_cast<float*>(to.context_lse.data + row * to.context_lse.stride);
      // Those of prefill chunks are counted where the chunk attends itself.
      lane.merge.finish(rows.row + i, target.data + row * target.stride, lse,
                        decodes && !sinks.empty() ? sinks.data() : nullptr);
    }
  }
}

void AttentionClient::send_blocks(FrameType type, const std::vector<std::vector<int32_t>>& parts,
                                  Deadline deadline) {
  for (size_t w = 0; w < links_.size(); ++w) {
    const auto& ids = parts[w];
    if (ids.empty()) continue;
    FrameHeader header;
    header.type = type;
    header.generation = generation_;
    header.payload_bytes = ids.size() * sizeof(int32_t);
    links_[w]->send(header, deadline,
                    [&](std::byte* payload) { std::memcpy(payload, ids.data(), ids.size() * sizeof(int32_t)); });
  }
}

void AttentionClient::zero_blocks(std::span<const int32_t> block_ids, Deadline deadline) {
  send_blocks(FrameType::kZeroBlocks, partition_.split_blocks(block_ids), deadline);
}

void AttentionClient::copy_blocks(std::span<const int32_t> pairs, Deadline deadline) {
  send_blocks(FrameType::kCopyBlocks, partition_.split_copies(pairs), deadline);
}

FrameHeader AttentionClient::attend_header(uint32_t lane_id, uint32_t layer) {
  const Lane& lane = lane_at(lane_id);
  FrameHeader header;
  header.type = FrameType::kAttend;
  header.generation = lane.generation;
  header.step = lane.step;
  header.lane = lane_id;
  header.layer = layer;
  return header;
}

bool AttentionClient::is_current(const FrameHeader& header) {
  const Lane& lane = lane_at(header.lane);
  return header.generation == lane.generation && (header.type == FrameType::kError || header.step == lane.step);
}

void AttentionClient::add_times(uint32_t lane_id, std::chrono::nanoseconds waited, std::chrono::nanoseconds attention) {
  StepTimes& times = lane_at(lane_id).times;
  times.waiting += waited;
  times.attention += attention;
  times.waits.add(waited);
}

void AttentionClient::fail_step(uint32_t lane, const std::string& why) { lane_at(lane).failure = why; }

std::vector<uint32_t> AttentionClient::failed_workers() const {
  std::vector<uint32_t> failed;
  for (uint32_t w = 0; w < links_.size(); ++w) {
    if (links_[w]->failed()) failed.push_back(w);
  }
  return failed;
}

void AttentionClient::replace_channel(uint32_t worker, std::shared_ptr<Channel> channel) {
  links_.at(worker) = std::make_unique<WorkerLink>(std::move(channel));
}

}  // namespace lamina
