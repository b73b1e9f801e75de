#include "worker/attention_worker/attention_worker.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

namespace lamina {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using std::chrono::seconds;

// How soon a sleeping loop notices stop(), and how often it counts as progress.
constexpr milliseconds kStopInterval{50};
constexpr seconds kRejectedLogInterval{1};
constexpr size_t kMaxTraceEvents = 1 << 18;

uint64_t steady_now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<nanoseconds>(Clock::now().time_since_epoch()).count());
}

// Adds the time since construction.
class Timer {
 public:
  explicit Timer(std::atomic<uint64_t>& counter) : counter_(counter), begin_(Clock::now()) {}
  ~Timer() {
    const auto elapsed = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin_);
    counter_.fetch_add(static_cast<uint64_t>(elapsed.count()), std::memory_order_relaxed);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<uint64_t>& counter_;
  Clock::time_point begin_;
};

size_t pool_bytes(const AttentionKernel& kernel, int32_t num_blocks, size_t num_layers) {
  size_t bytes = kernel.block_bytes();
  if (__builtin_mul_overflow(bytes, static_cast<size_t>(num_blocks), &bytes) ||
      __builtin_mul_overflow(bytes, num_layers, &bytes)) {
    throw std::bad_alloc();
  }
  return bytes;
}

void add(std::atomic<uint64_t>& counter, uint64_t value) {
  counter.fetch_add(value, std::memory_order_relaxed);
}

}  // namespace

size_t kv_block_bytes(const ModelGeometry& geometry) {
  return make_attention_kernel(geometry.attention)->block_bytes() * geometry.scales.size();
}

AttentionWorker::AttentionWorker(ModelGeometry geometry, int32_t num_blocks, int num_threads,
                                 std::vector<int> cpus, int spin_us)
    : geometry_(std::move(geometry)),
      num_blocks_(
          num_blocks > 0 && !geometry_.scales.empty()
              ? num_blocks
              : throw std::invalid_argument("an attention worker needs at least one layer and one block")),
      kernel_(make_attention_kernel(geometry_.attention)),
      arena_(pool_bytes(*kernel_, num_blocks, geometry_.scales.size())),
      threads_(num_threads, std::move(cpus), spin_us) {}

AttentionWorker::~AttentionWorker() { stop(); }

void AttentionWorker::serve(std::shared_ptr<Channel> channel) {
  if (channel_) throw std::logic_error("the attention worker serves already");
  channel_ = std::move(channel);
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "lamina-serve");
}

void AttentionWorker::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  threads_.cancel();
  if (thread_.joinable()) thread_.join();
}

void AttentionWorker::run() {
  try {
    threads_.pin_caller();
    loop();
  } catch (const ChannelClosed&) {
  } catch (const std::exception& error) {
    std::fprintf(stderr, "vllm-lamina attention worker: serving ended: %s\n", error.what());
  }
  channel_->close();
}

void AttentionWorker::loop() {
  while (!stopping_.load(std::memory_order_relaxed)) {
    advance();
    std::span<const std::byte> frame;
    try {
      const Timer timer(any_in_flight() ? counters_.ns_waiting : counters_.ns_idle);
      frame = channel_->receive(Clock::now() + kStopInterval);
    } catch (const ChannelTimeout&) {
      continue;
    }
    received_ = true;
    for (; bad_descriptors_ < channel_->num_bad_descriptors(); ++bad_descriptors_) {
      reject("a frame is said to lie outside the channel");
    }
    add(counters_.messages, 1);
    add(counters_.bytes_in, frame.size());
    handle(frame);
    release();
  }
}

void AttentionWorker::start_trace() {
  const std::lock_guard lock(trace_mutex_);
  trace_.clear();
  trace_.reserve(kMaxTraceEvents);
  tracing_.store(true, std::memory_order_relaxed);
}

std::vector<TraceEvent> AttentionWorker::take_trace() {
  tracing_.store(false, std::memory_order_relaxed);
  const std::lock_guard lock(trace_mutex_);
  return std::exchange(trace_, {});
}

void AttentionWorker::record(const FrameHeader& header, uint64_t received) {
  const std::lock_guard lock(trace_mutex_);
  if (trace_.size() >= kMaxTraceEvents) return;
  const auto tokens = static_cast<uint64_t>(lanes_[header.lane].step.num_tokens());
  trace_.push_back({static_cast<uint64_t>(header.type), header.lane, header.layer, tokens, header.began_ns,
                    header.posted_ns, received, steady_now()});
}

void AttentionWorker::handle(std::span<const std::byte> frame) {
  const auto header = read_header(frame);
  if (!header) return reject("a frame has no valid header");
  const auto payload = frame.subspan(sizeof(FrameHeader), header->payload_bytes);
  const bool traced = tracing_.load(std::memory_order_relaxed);
  const uint64_t received = traced ? steady_now() : 0;
  try {
    if (header->lane >= kMaxLanes)
      throw MalformedFrame("lane " + std::to_string(header->lane) + " does not exist");
    switch (header->type) {
      case FrameType::kStep:
        begin_step(*header, payload);
        if (traced) record(*header, received);
        return;
      case FrameType::kAttend:
        attend(*header, payload);
        if (traced) record(*header, received);
        return;
      case FrameType::kZeroBlocks:
        return zero_blocks(payload);
      case FrameType::kCopyBlocks:
        return copy_blocks(payload);
      default:
        throw MalformedFrame("a frame has type " + std::to_string(static_cast<int>(header->type)) +
                             ", which an attention worker does not take");
    }
  } catch (const MalformedFrame& error) {
    reject(error.what());
    send_error(*header, error.what());
  } catch (const FrameTooLarge& error) {
    reject(error.what());
    send_error(*header, error.what());
  }
}

void AttentionWorker::begin_step(const FrameHeader& header, std::span<const std::byte> payload) {
  Lane& lane = lanes_[header.lane];
  lane.known = lane.in_flight = false;
  lane.step.read(payload, geometry_.attention, num_blocks_);
  lane.id = header.step;
  lane.generation = header.generation;
  lane.known = lane.in_flight = true;
  add(counters_.steps, 1);
}

void AttentionWorker::attend(const FrameHeader& header, std::span<const std::byte> payload) {
  const auto begin = Clock::now();
  Lane& lane = lanes_[header.lane];
  const Step& step = lane.step;
  if (!lane.known || lane.id != header.step || lane.generation != header.generation) {
    throw MalformedFrame("an ATTEND belongs to step " + std::to_string(header.step) + ", which lane " +
                         std::to_string(header.lane) + " is not in");
  }
  if (header.layer >= geometry_.scales.size()) {
    throw MalformedFrame("layer " + std::to_string(header.layer) + " does not exist");
  }
  const auto q_rows = static_cast<size_t>(step.num_q_rows());
  const auto num_tokens = static_cast<size_t>(step.num_tokens());
  const AttendLayout layout(q_rows * geometry_.q_row_bytes(), num_tokens * geometry_.kv_row_bytes());
  if (payload.size() != layout.bytes) throw MalformedFrame("an ATTEND's size does not fit its step");
  if (header.layer + 1 == geometry_.scales.size()) lane.in_flight = false;

  // Everything is appended before anything is attended: a request may find, as its cached context, a prefix
  // block that another request of this very step fills. It also lets a decode attend its own token like any
  // other.
  const LayerPool layer{layer_data(header.layer), kernel_->block_bytes()};
  if (num_tokens > 0) {
    const Timer timer(counters_.ns_appending);
    kernel_->append(layer, payload.data() + layout.k, payload.data() + layout.v, step.slot_mapping(),
                    step.num_tokens(), threads_);
    add(counters_.tokens_appended, num_tokens);
  }
  if (q_rows == 0) return;

  const auto rows_without_lse = static_cast<size_t>(step.num_rows_without_lse());
  const auto lse_rows = q_rows - rows_without_lse;
  const size_t heads = static_cast<size_t>(geometry_.attention.num_heads);
  const OutputLayout output(q_rows * geometry_.q_row_bytes(), lse_rows * geometry_.lse_row_bytes());
  const auto reply = reserve_reply(sizeof(FrameHeader) + output.bytes);
  FrameHeader reply_header = header;
  reply_header.type = FrameType::kOutput;
  reply_header.payload_bytes = output.bytes;
  std::byte* out = reply.data() + sizeof(FrameHeader);
  auto* reply_lse = reinterpret_cast<float*>(out + output.lse);
  float* lse = lse_rows == 0 ? nullptr : reply_lse;
  if (rows_without_lse > 0 && lse_rows > 0) {
    // The kernel writes LSE of all rows, and one call balances the threads better than two; so the LSE that
    // nobody needs goes to scratch.
    lse_.resize(q_rows * heads);
    lse = lse_.data();
  }
  {
    const Timer timer(counters_.ns_attending);
    kernel_->attend(layer, payload.data(), step.requests().data(),
                    static_cast<int32_t>(step.requests().size()), ScoreRule{geometry_.scales[header.layer]},
                    0, out, lse, threads_);
  }
  if (threads_.cancelled()) return;
  if (lse != nullptr && lse != reply_lse) {
    std::memcpy(reply_lse, lse + rows_without_lse * heads, lse_rows * geometry_.lse_row_bytes());
  }
  reply_header.service_ns = static_cast<uint64_t>(nanoseconds(Clock::now() - begin).count());
  write_header(reply, reply_header);
  add(counters_.bytes_out, reply.size());
  // The frame is given back before its answer is sent, so that the model worker, when it has the answer,
  // finds its ring empty and packs the next layer into the same memory.
  release();
  channel_->post();
}

std::vector<int32_t> AttentionWorker::read_block_ids(std::span<const std::byte> payload) const {
  if (payload.size() % sizeof(int32_t) != 0) throw MalformedFrame("a list of block ids is cut off");
  std::vector<int32_t> ids(payload.size() / sizeof(int32_t));
  if (!ids.empty()) std::memcpy(ids.data(), payload.data(), payload.size());
  for (const int32_t id : ids) {
    if (id < 0 || id >= num_blocks_)
      throw MalformedFrame("block " + std::to_string(id) + " is outside the pool");
  }
  return ids;
}

void AttentionWorker::zero_blocks(std::span<const std::byte> payload) {
  const auto ids = read_block_ids(payload);
  for (uint32_t layer = 0; layer < geometry_.scales.size(); ++layer) {
    for (const int32_t id : ids) {
      if (threads_.cancelled()) return;
      kernel_->zero_block({layer_data(layer), kernel_->block_bytes()}, id);
      advance();
    }
  }
}

void AttentionWorker::copy_blocks(std::span<const std::byte> payload) {
  const auto ids = read_block_ids(payload);
  if (ids.size() % 2 != 0) throw MalformedFrame("COPY_BLOCKS has a source without a destination");
  for (uint32_t layer = 0; layer < geometry_.scales.size(); ++layer) {
    for (size_t i = 0; i < ids.size(); i += 2) {
      if (threads_.cancelled()) return;
      if (ids[i] != ids[i + 1])
        kernel_->copy_block({layer_data(layer), kernel_->block_bytes()}, ids[i], ids[i + 1]);
      advance();
    }
  }
}

// Waits for room for as long as the model worker lives: it may be slow to collect, but what it asked for is
// owed.
std::span<std::byte> AttentionWorker::reserve_reply(size_t bytes) {
  while (true) {
    advance();
    try {
      return channel_->reserve(bytes, Clock::now() + kStopInterval);
    } catch (const ChannelTimeout&) {
      if (stopping_.load(std::memory_order_relaxed)) throw ChannelClosed("stopped");
    }
  }
}

// An error is not worth waiting for room: a peer that floods us with bad frames does not collect answers
// either.
void AttentionWorker::send_error(const FrameHeader& header, const std::string& reason) {
  FrameHeader reply_header = header;
  reply_header.type = FrameType::kError;
  reply_header.payload_bytes = reason.size();
  try {
    const auto reply = channel_->reserve(sizeof(FrameHeader) + reason.size(), Clock::now());
    std::memcpy(write_header(reply, reply_header), reason.data(), reason.size());
    channel_->post();
    add(counters_.bytes_out, reply.size());
  } catch (const ChannelTimeout&) {
  } catch (const FrameTooLarge&) {
  }
}

void AttentionWorker::reject(const std::string& reason) {
  add(counters_.rejected_frames, 1);
  const auto now = Clock::now();
  if (last_rejected_log_ && now - *last_rejected_log_ < kRejectedLogInterval) {
    ++rejected_unlogged_;
    return;
  }
  last_rejected_log_ = now;
  const auto unlogged = std::exchange(rejected_unlogged_, 0);
  std::fprintf(stderr,
               "vllm-lamina attention worker: frame dropped: %s (%llu more since the last such line)\n",
               reason.c_str(), static_cast<unsigned long long>(unlogged));
}

void AttentionWorker::release() {
  if (std::exchange(received_, false)) channel_->release();
}

bool AttentionWorker::any_in_flight() const {
  return std::any_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.in_flight; });
}

}  // namespace lamina
