#include "worker/model_worker/streamed_exchange.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <numeric>
#include <system_error>
#include <utility>

#include "base/cpu_pause.h"
#include "base/round_up.h"

namespace lamina {
namespace {

// How often the proxy looks whether a worker is lost, in rounds, and how long it sleeps once it has polled long enough.
constexpr int kRoundsPerLook = 1024;
constexpr std::chrono::microseconds kSleep{50};

size_t frame_bytes(const LayerRows& rows, size_t max_tokens) {
  const AttendLayout layout(max_tokens * rows.q, max_tokens * rows.k, max_tokens * rows.v);
  return round_up(sizeof(FrameHeader) + layout.bytes, kFrameAlignment);
}

size_t reply_bytes(const LayerRows& rows, size_t max_tokens) {
  const OutputLayout layout(max_tokens * rows.out, max_tokens * rows.lse);
  return round_up(layout.bytes, kFrameAlignment);
}

template <typename T>
void publish(std::atomic<T>& word, T value) {
  word.store(value, std::memory_order_release);
}

}  // namespace

size_t StreamedExchange::memory_bytes(const ModelGeometry& geometry, uint32_t num_lanes, size_t max_tokens) {
  size_t frame = 0;
  for (const LayerGeometry& layer : geometry.layers()) frame = std::max(frame, frame_bytes(layer.rows, max_tokens));
  return size_t{num_lanes} * kFrames * frame;
}

StreamedExchange::StreamedExchange(AttentionClient& client, uint32_t num_lanes, size_t max_tokens,
                                   std::optional<int> spin_us)
    : client_(client), max_tokens_(max_tokens), spin_(spin_us.value_or(0)) {
  const size_t num_workers = client.partition().num_workers();
  if (num_lanes == 0 || num_lanes > kMaxLanes) {
    throw std::invalid_argument(std::to_string(num_lanes) + " lanes, of at most " + std::to_string(kMaxLanes));
  }
  if (num_workers > kMaxWorkers) {
    throw std::invalid_argument("a stream takes replies of at most " + std::to_string(kMaxWorkers) +
                                " attention workers, not of " + std::to_string(num_workers));
  }
  workers_.resize(num_workers);
  lanes_.resize(num_lanes);
  for (Lane& lane : lanes_) lane.sent.resize(num_workers);
  for (uint32_t w = 0; w < num_workers; ++w) attach(w);
  // Pages of its own, which a device can register: it reads the copies of replies too.
  std::vector<size_t> copies;
  for (uint32_t w = 0; num_workers > 1 && w < num_workers; ++w) {
    copies.push_back(most_bytes(w, reply_bytes));
  }
  words_bytes_ = round_up(num_lanes * (sizeof(Words) + std::reduce(copies.begin(), copies.end())), 4096);
  void* map = mmap(nullptr, words_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "cannot map the words of the lanes");
  }
  madvise(map, words_bytes_, MADV_DONTFORK);
  words_ = static_cast<Words*>(map);
  for (uint32_t lane = 0; lane < num_lanes; ++lane) new (&words_[lane]) Words();
  auto* copy = reinterpret_cast<std::byte*>(words_ + num_lanes);
  for (Lane& lane : lanes_) {
    for (const size_t bytes : copies) lane.copies.push_back(std::exchange(copy, copy + bytes));
  }
  if (spin_us) proxy_ = std::thread([this] { run(); });
}

StreamedExchange::~StreamedExchange() {
  {
    const Entry entry(*this);
    stopping_ = true;
    begun_.notify_all();
  }
  if (proxy_.joinable()) proxy_.join();
  munmap(words_, words_bytes_);
}

uint32_t StreamedExchange::group_of(int32_t layer) const {
  return static_cast<uint32_t>(client_.partition().geometry().layers()[static_cast<size_t>(layer)].group);
}

// Of the worker's largest layer.
size_t StreamedExchange::most_bytes(uint32_t worker, size_t (*bytes)(const LayerRows&, size_t)) const {
  size_t most = 0;
  for (int32_t layer = 0; layer < client_.partition().geometry().num_layers(); ++layer) {
    most = std::max(most, bytes(rows(worker, layer), max_tokens_));
  }
  return most;
}

void StreamedExchange::attach(uint32_t w) {
  Channel& channel = client_.link(w).channel();
  const size_t frame = most_bytes(w, frame_bytes), bytes = lanes_.size() * kFrames * frame;
  const size_t memory = channel.send_memory().size();
  if (bytes + kFrameAlignment > memory) {
    throw FrameTooLarge("frames of " + std::to_string(bytes) + " bytes do not fit the channel's ring of " +
                        std::to_string(memory) + " bytes; raise ring_bytes");
  }
  channel.set_aside(bytes);
  workers_[w] = {memory - bytes, frame, std::nullopt, 0};
  for (Lane& lane : lanes_) lane.sent[w] = {};
}

void StreamedExchange::replace_channel(uint32_t worker, std::shared_ptr<Channel> channel) {
  const Entry entry(*this);
  client_.replace_channel(worker, std::move(channel));
  attach(worker);
}

std::vector<StreamedExchange::Memory> StreamedExchange::memories() const {
  std::vector<Memory> memories{{reinterpret_cast<const std::byte*>(words_), words_bytes_}};
  for (size_t w = 0; w < workers_.size(); ++w) {
    Channel& channel = client_.link(w).channel();
    memories.push_back({channel.send_memory().data(), channel.send_memory().size()});
    memories.push_back({channel.receive_memory().data(), channel.receive_memory().size()});
  }
  return memories;
}

size_t StreamedExchange::frame_at(uint32_t lane, uint32_t worker, uint32_t layer) const {
  const Worker& at = workers_.at(worker);
  return at.frames_at + (size_t{lane} * kFrames + layer % kFrames) * at.frame_bytes;
}

std::byte* StreamedExchange::payload(uint32_t lane, uint32_t worker, uint32_t layer) const {
  return client_.link(worker).channel().send_memory().data() + frame_at(lane, worker, layer) + sizeof(FrameHeader);
}

void StreamedExchange::announce(uint32_t lane_id) {
  const Entry entry(*this);
  Lane& lane = lanes_.at(lane_id);
  lane.ordinal = ++num_announced_;
  lane.posted = 0;  // from now on, also before it begins: later steps wait for its layers
}

std::vector<AttentionClient::StepRows> StreamedExchange::begin_step(uint32_t lane_id, const StepView& step,
                                                                    Deadline deadline) {
  Lane& lane = lanes_.at(lane_id);
  const size_t num_tokens = step.groups.empty() ? 0 : step.groups.front().slot_mapping.size();
  if (num_tokens > max_tokens_) {
    throw FrameTooLarge("a step of " + std::to_string(num_tokens) + " tokens, where frames hold " +
                        std::to_string(max_tokens_));
  }
  // Not under the mutex: it may wait for room. The proxy does not touch a lane whose step has not begun.
  const auto rows = client_.begin_step(lane_id, step, deadline);
  Words& words = words_[lane_id];
  for (auto* word : {&words.packed, &words.taken, &words.replied, &words.free}) word->store(0, std::memory_order_relaxed);
  for (auto& reply : words.replies) reply.store(0, std::memory_order_relaxed);
  const Entry entry(*this);
  if (lane.ordinal == 0) throw std::logic_error("a step begins that was not announced");
  lane.posted = lane.replied = lane.free = 0;
  lane.answered.reset();
  lane.room_wanted = Clock::now();
  lane.slowest = {};
  lane.failure.reset();
  lane.num_owed.assign(client_.split(lane_id).groups.size(), 0);
  for (uint32_t group = 0; group < lane.num_owed.size(); ++group) {
    for (uint32_t w = 0; w < workers_.size(); ++w) lane.num_owed[group] += part(lane_id, w, group).num_rows > 0;
  }
  lane.begun = true;
  for (uint32_t w = 0; w < workers_.size(); ++w) {
    if (workers_[w].held_by == lane_id) let_go(w);  // of a step that failed
  }
  if (client_.failure(lane_id)) {
    fail(lane_id, *client_.failure(lane_id));
  } else {
    while (free_one(lane_id)) {
    }
  }
  begun_.notify_all();
  return rows;
}

std::optional<std::string> StreamedExchange::finish_step(uint32_t lane_id, double timeout) {
  Lane& lane = lanes_.at(lane_id);
  Entry entry(*this);
  const auto is_over = [&] {
    const int32_t layers = client_.partition().geometry().num_layers();
    return !lane.begun || lane.failure || (lane.posted == layers && lane.replied == layers);
  };
  while (!is_over()) {
    const auto layers = std::pair(lane.posted, lane.replied);
    const auto goes_on = [&] { return is_over() || std::pair(lane.posted, lane.replied) != layers; };
    if (progress_.wait_until(entry.lock, deadline_after(timeout), goes_on)) continue;
    look();  // it may be a worker that keeps the device
    if (!is_over()) throw ChannelTimeout("the device did not come to the next layer in time");
  }
  lane.ordinal = 0;
  lane.begun = false;
  return std::exchange(lane.failure, std::nullopt);
}

void StreamedExchange::fail_step(uint32_t lane, const std::string& why) {
  const Entry entry(*this);
  if (lanes_.at(lane).begun) fail(lane, why);
}

// What follows is called with the mutex held.

void StreamedExchange::fail(uint32_t lane_id, const std::string& why) {
  Lane& lane = lanes_[lane_id];
  if (!lane.failure) lane.failure = why;
  publish(words_[lane_id].free, kPoison);
  publish(words_[lane_id].replied, kPoison);
  progress_.notify_all();
}

void StreamedExchange::let_go(uint32_t w) {
  workers_[w].held_by.reset();
  client_.link(w).channel().release();
}

// Of the lanes whose steps were announced before, each must have sent this layer.
bool StreamedExchange::may_post(const Lane& lane) const {
  return std::ranges::all_of(lanes_, [&](const Lane& other) {
    return other.ordinal == 0 || other.ordinal >= lane.ordinal || other.failure || other.posted > lane.posted;
  });
}

// Whether the stream may come to write one more layer's frames.
bool StreamedExchange::wants_room(const Lane& lane) const {
  const auto num_layers = client_.partition().geometry().num_layers();
  return lane.free < num_layers && lane.free < lane.posted + static_cast<int32_t>(kFrames);
}

// Whether nothing that a worker is to read lies any more where they go. One that is lost reads nothing.
bool StreamedExchange::has_room(Lane& lane, uint32_t w) {
  auto& sent = lane.sent[w][static_cast<uint32_t>(lane.free) % kFrames];
  WorkerLink& link = client_.link(w);
  try {
    if (sent && link.num_consumed() <= *sent && !link.failed()) return false;
  } catch (const ChannelError&) {
    link.set_failed();
  }
  sent.reset();
  return true;
}

bool StreamedExchange::free_one(uint32_t lane_id) {
  Lane& lane = lanes_[lane_id];
  if (!wants_room(lane)) return false;
  for (uint32_t w = 0; w < workers_.size(); ++w) {
    if (!has_room(lane, w)) return false;
  }
  lane.room_wanted = Clock::now();
  publish(words_[lane_id].free, ++lane.free);
  return true;
}

void StreamedExchange::post_layer(uint32_t lane_id) {
  Lane& lane = lanes_[lane_id];
  const auto layer = static_cast<uint32_t>(lane.posted);
  FrameHeader header = client_.attend_header(lane_id, layer);
  header.posted_ns = static_cast<uint64_t>(Clock::now().time_since_epoch().count());
  const Deadline deadline = deadline_after(timeout_);
  for (uint32_t w = 0; w < workers_.size(); ++w) {
    const WorkerStep& part = part_of(lane_id, w, lane.posted);
    if (!part.takes_part(rows(w, lane.posted))) continue;
    header.payload_bytes = part.attend_layout(rows(w, lane.posted)).bytes;
    lane.sent[w][layer % kFrames] = client_.link(w).send_at(frame_at(lane_id, w, layer), header, deadline);
  }
  if (lane.replied == lane.posted) lane.since = Clock::now();
  ++lane.posted;
  lane.room_wanted = Clock::now();
  if (pass_unanswered(lane_id)) publish(words_[lane_id].replied, lane.replied);
  progress_.notify_all();
}

// Counts layers that were sent and that nobody answers as replied, once all before them are. Whether there were any.
bool StreamedExchange::pass_unanswered(uint32_t lane_id) {
  Lane& lane = lanes_[lane_id];
  const int32_t before = lane.replied;
  while (lane.replied < lane.posted && lane.num_owed[group_of(lane.replied)] == 0) ++lane.replied;
  return lane.replied > before;
}

bool StreamedExchange::serve_lane(uint32_t lane_id) {
  Lane& lane = lanes_[lane_id];
  if (!lane.begun || lane.failure) return false;
  bool worked = false;
  try {
    while (lane.posted < words_[lane_id].packed.load(std::memory_order_acquire) && may_post(lane)) {
      post_layer(lane_id);
      worked = true;
    }
    while (free_one(lane_id)) worked = true;
  } catch (const ChannelError& error) {
    fail(lane_id, error.what());
    return true;
  }
  return worked;
}

// Takes what has come of a worker. A reply of the only worker stays in the channel until the stream has read it. Where
// there are several, two lanes could each hold what the other waits behind, so that replies are copied.
bool StreamedExchange::receive(uint32_t w) {
  Worker& worker = workers_[w];
  if (worker.held_by) {
    const uint32_t lane = *worker.held_by;
    if (words_[lane].taken.load(std::memory_order_acquire) < worker.held_until && !lanes_[lane].failure) return false;
    let_go(w);
  }
  WorkerLink& link = client_.link(w);
  if (!link.has_frame()) return false;
  const auto frame = link.channel().receive(Clock::now());
  const auto header = read_header(frame);
  const std::byte* payload = frame.data() + sizeof(FrameHeader);
  if (header && header->lane < lanes_.size() && lanes_[header->lane].begun && !lanes_[header->lane].failure &&
      client_.is_current(*header)) {
    const uint32_t lane_id = header->lane;
    Lane& lane = lanes_[lane_id];
    if (header->type == FrameType::kError) {
      fail(lane_id, "the attention worker dropped a frame: " +
                        std::string(reinterpret_cast<const char*>(payload), header->payload_bytes));
    } else if (header->type != FrameType::kOutput || lane.replied >= lane.posted || lane.answered[w] ||
               header->layer != static_cast<uint32_t>(lane.replied) ||
               header->payload_bytes !=
                   part_of(lane_id, w, lane.replied).output_layout(rows(w, lane.replied)).bytes) {
      fail(lane_id, "the attention worker's output does not fit the step");
    } else {
      lane.slowest = std::max(lane.slowest, std::chrono::nanoseconds(header->service_ns));
      if (workers_.size() == 1) {
        worker.held_by = lane_id;
        worker.held_until = lane.replied + 1;
      } else {
        payload = static_cast<const std::byte*>(std::memcpy(lane.copies[w], payload, header->payload_bytes));
      }
      words_[lane_id].replies[w].store(reinterpret_cast<uint64_t>(payload), std::memory_order_relaxed);
      lane.answered.set(w);
      if (lane.answered.count() == lane.num_owed[group_of(lane.replied)]) replied(lane_id);
    }
  }
  if (!worker.held_by) link.channel().release();
  return true;
}

// All workers have answered the oldest layer.
void StreamedExchange::replied(uint32_t lane_id) {
  Lane& lane = lanes_[lane_id];
  const auto now = Clock::now();
  client_.add_times(lane_id, now - lane.since, std::exchange(lane.slowest, {}));
  lane.since = now;
  lane.answered.reset();
  ++lane.replied;
  pass_unanswered(lane_id);
  // First: the stream does not wait for it where each layer is answered.
  while (free_one(lane_id)) {
  }
  publish(words_[lane_id].replied, lane.replied);
  progress_.notify_all();
}

// Fails the steps that a lost worker has a part in, or holds up: it does not answer, or leaves frames where they lie.
void StreamedExchange::look() {
  const Deadline oldest = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(timeout_.load()));
  for (uint32_t lane_id = 0; lane_id < lanes_.size(); ++lane_id) {
    Lane& lane = lanes_[lane_id];
    if (!lane.begun || lane.failure) continue;
    for (uint32_t w = 0; w < workers_.size(); ++w) {
      WorkerLink& link = client_.link(w);
      if (lane.replied < lane.posted && part_of(lane_id, w, lane.replied).num_rows > 0 && !lane.answered[w] &&
          lane.since < oldest && !workers_[w].held_by) {
        link.set_failed();
        fail(lane_id, "the attention worker's output did not come in time");
      } else if (client_.split(lane_id).takes_part(w) && link.failed() && !link.has_frame()) {
        fail(lane_id, "the attention worker is gone");
      } else if (wants_room(lane) && lane.room_wanted < oldest && !has_room(lane, w)) {
        link.set_failed();
        fail(lane_id, "the attention worker did not take the oldest layer in time");
      }
    }
  }
}

bool StreamedExchange::serve() {
  bool worked = false;
  for (uint32_t w = 0; w < workers_.size(); ++w) {
    try {
      worked |= receive(w);
    } catch (const ChannelError& error) {
      client_.link(w).set_failed();
    }
  }
  for (uint32_t lane = 0; lane < lanes_.size(); ++lane) worked |= serve_lane(lane);
  return worked;
}

bool StreamedExchange::serve_once() {
  const Entry entry(*this);
  look();
  return serve();
}

void StreamedExchange::run() {
  auto last_work = Clock::now();
  for (int round = 0;; ++round) {
    while (num_entering_.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
    bool worked;
    {
      std::unique_lock lock(mutex_);
      const auto has_work = [&] {
        return std::ranges::any_of(lanes_, [](const Lane& lane) { return lane.begun && !lane.failure; }) ||
               std::ranges::any_of(workers_, [](const Worker& worker) { return worker.held_by.has_value(); });
      };
      if (!stopping_ && !has_work()) {
        begun_.wait(lock, [&] { return stopping_ || has_work(); });
        last_work = Clock::now();
      }
      if (stopping_) return;
      worked = serve();
      if (round % kRoundsPerLook == 0) look();
    }
    if (worked) {
      last_work = Clock::now();
    } else if (Clock::now() - last_work > spin_) {
      round = -1;  // look after each sleep
      std::this_thread::sleep_for(kSleep);
    } else {
      cpu_pause();
    }
  }
}

}  // namespace lamina
