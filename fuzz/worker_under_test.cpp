#include "worker_under_test.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "wire/step_part.h"

namespace lamina::fuzz {
namespace {

constexpr size_t kRingBytes = 1 << 20;
constexpr std::chrono::seconds kDeadline{60};  // of any single wait: sanitizers are slow, a hang lasts for ever

// The step whose attention is known beforehand: a prefill chunk, and rows that attend it.
constexpr uint64_t kKnownStep = 0x5afe;
constexpr int kTokens = 5, kRows = 2;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: INVARIANT BROKEN: %s\n", what.c_str());
  std::abort();
}

void require(bool condition, const std::string& otherwise) {
  if (!condition) fail(otherwise);
}

}  // namespace

struct WorkerUnderTest::Connection {
  int memory_fd;
  int sockets[2];
  std::unique_ptr<RawSender> sender;
  std::unique_ptr<ShmChannel> client;
  std::unique_ptr<AttentionWorker> worker;
  uint64_t received = 0;

  Connection(const ModelGeometry& geometry, int32_t num_blocks, int num_threads)
      : memory_fd(create_shm_memory(kRingBytes)) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) fail("socketpair");
    sender = std::make_unique<RawSender>(memory_fd, kRingBytes);
    client = std::make_unique<ShmChannel>(memory_fd, sockets[0], ShmEnd::kClient, 0);
    worker = std::make_unique<AttentionWorker>(geometry, num_blocks, num_threads, std::vector<int>(), 0);
    worker->serve(std::make_shared<ShmChannel>(memory_fd, sockets[1], ShmEnd::kWorker, 0));
  }

  ~Connection() {
    worker.reset();
    client.reset();
    sender.reset();
    for (const int socket : sockets) ::close(socket);
    ::close(memory_fd);
  }
};

WorkerUnderTest::WorkerUnderTest(ModelGeometry geometry, int32_t num_blocks, int num_threads)
    : geometry_(std::move(geometry)), num_blocks_(num_blocks), num_threads_(num_threads) {
  connect();
}

WorkerUnderTest::~WorkerUnderTest() = default;

void WorkerUnderTest::connect() {
  connection_.reset();
  connection_ = std::make_unique<Connection>(geometry_, num_blocks_, num_threads_);
  rejected_ = 0;
}

std::vector<std::byte> WorkerUnderTest::receive() {
  std::vector<std::byte> frame;
  try {
    const auto received = connection_->client->receive(Clock::now() + kDeadline);
    frame.assign(received.begin(), received.end());
  } catch (const ChannelError& error) {
    fail(std::string("an answer is missing: ") + error.what());
  }
  connection_->client->release();
  ++connection_->received;
  return frame;
}

void WorkerUnderTest::send(const Sent& sent, FrameJudge& judge, std::vector<Verdict>& verdicts,
                           Totals& totals) {
  RawSender& sender = *connection_->sender;
  ++totals.frames;
  const RawSender::Lie* lie = sent.lie ? &*sent.lie : nullptr;
  const auto ring = sender.ring();
  const bool fits = lie != nullptr && lie->bytes > 0 && lie->bytes <= ring.size() &&
                    lie->offset <= ring.size() - lie->bytes && lie->offset % 64 == 0;
  // The worker then sees some other part of the ring, into which nothing may be on its way.
  if (fits) require(sender.drained(kDeadline), "the worker does not take frames");
  require(sender.send(sent.frame, lie, kDeadline), "the worker does not take frames");
  if (fits) require(sender.drained(kDeadline), "the worker does not take frames");
  std::span<const std::byte> seen = sent.frame;
  if (lie != nullptr) seen = fits ? ring.subspan(lie->offset, lie->bytes) : ring.first(0);
  if (seen.empty()) {
    ++rejected_, ++totals.rejected, ++totals.bad_descriptors;
    return;
  }
  const Verdict verdict = judge.judge(seen);
  if (std::getenv("LAMINA_FUZZ_VERBOSE") != nullptr) {
    std::fprintf(stderr, "fuzz: frame of %zu bytes%s, type %d, lane %u, layer %u, step %llu, generation %llu: %s\n", seen.size(),
                 lie != nullptr ? " (a lie)" : "", static_cast<int>(verdict.header.type), verdict.header.lane, verdict.header.layer,
                 static_cast<unsigned long long>(verdict.header.step),
                 static_cast<unsigned long long>(verdict.header.generation),
                 verdict.accepted ? "accept" : "reject");
  }
  (verdict.accepted ? totals.accepted : totals.rejected) += 1;
  if (!verdict.accepted) ++rejected_;
  if (verdict.answer) verdicts.push_back(verdict);
}

void WorkerUnderTest::check_answers(const std::vector<Verdict>& verdicts, Totals& totals) {
  for (const Verdict& verdict : verdicts) {
    const auto answer = receive();
    const auto header = read_header(answer);
    require(header.has_value(), "an answer has no valid header");
    if (header->type != *verdict.answer) {
      fail("an answer is of type " + std::to_string(static_cast<int>(header->type)) + ", not " +
           std::to_string(static_cast<int>(*verdict.answer)) + ": " +
           std::string(reinterpret_cast<const char*>(answer.data()) + sizeof(FrameHeader),
                       header->type == FrameType::kError ? answer.size() - sizeof(FrameHeader) : 0));
    }
    require(header->step == verdict.header.step && header->generation == verdict.header.generation &&
                header->lane == verdict.header.lane && header->layer == verdict.header.layer,
            "an answer echoes step " + std::to_string(header->step) + ", generation " +
                std::to_string(header->generation) + ", lane " + std::to_string(header->lane) + ", layer " +
                std::to_string(header->layer) + " for step " + std::to_string(verdict.header.step) +
                ", generation " + std::to_string(verdict.header.generation) + ", lane " +
                std::to_string(verdict.header.lane) + ", layer " + std::to_string(verdict.header.layer));
    if (header->type == FrameType::kOutput) {
      ++totals.outputs;
      require(header->payload_bytes == verdict.answer_payload, "an OUTPUT has the wrong size");
    } else {
      ++totals.errors;
    }
  }
}

WorkerUnderTest::Known WorkerUnderTest::send_known() {
  const AttentionGeometry& shape = geometry_.layers()[0].attention;
  require(shape.dtype == DType::kFloat32, "the check is written for float32");
  const int32_t block = num_blocks_ - 1;
  // Layer 0 attends plainly; in other groups there is nothing.
  std::vector<StepPart> sections(geometry_.groups().size());
  for (size_t g = 0; g < sections.size(); ++g) sections[g].has_positions = geometry_.groups()[g].has_positions;
  StepPart& part = sections[0];
  part.query_lens = {kRows};
  part.kv_lens = {kTokens};
  part.block_ids = {block};
  part.num_rows = part.num_rows_without_lse = kRows;
  for (int t = 0; t < kTokens; ++t) part.slot_mapping.push_back(int64_t{block} * shape.block_size + t);
  FrameHeader header;
  header.lane = kMaxLanes - 1;
  header.step = kKnownStep;
  header.type = FrameType::kStep;
  require(connection_->sender->send(frame_of(header, step_payload(sections)), nullptr, kDeadline), "no room for a STEP");

  const LayerRows& row = geometry_.layers()[0].rows;
  const AttendLayout layout(kRows * row.q, kTokens * row.k, kTokens * row.v);
  std::vector<std::byte> attend(layout.bytes);
  const int heads = shape.num_heads, kv_heads = shape.num_kv_heads, size = shape.head_size;
  const auto at = [&](size_t begin) { return reinterpret_cast<float*>(attend.data() + begin); };
  float *q = at(0), *k = at(layout.k), *v = at(layout.v);
  for (int i = 0; i < kRows * heads * size; ++i) q[i] = std::sin(0.37f * i);
  for (int i = 0; i < kTokens * kv_heads * size; ++i) k[i] = std::cos(0.11f * i), v[i] = std::sin(0.23f * i + 1);
  header.type = FrameType::kAttend;
  header.layer = 0;
  require(connection_->sender->send(frame_of(header, attend), nullptr, kDeadline), "no room for an ATTEND");
  return {{q, q + kRows * heads * size}, {k, k + kTokens * kv_heads * size}, {v, v + kTokens * kv_heads * size}};
}

void WorkerUnderTest::check_known(const Known& known) {
  const AttentionGeometry& shape = geometry_.layers()[0].attention;
  const int heads = shape.num_heads, kv_heads = shape.num_kv_heads, size = shape.head_size;
  const auto &q = known.q, &k = known.k, &v = known.v;
  const auto answer = receive();
  const auto answered = read_header(answer);
  require(answered && answered->type == FrameType::kOutput && answered->step == kKnownStep,
          "a valid step got no OUTPUT after the program");
  const auto* out = reinterpret_cast<const float*>(answer.data() + sizeof(FrameHeader));
  for (int row = 0; row < kRows; ++row) {
    for (int head = 0; head < heads; ++head) {
      const int kv_head = head / (heads / kv_heads);
      double weights[kTokens], sum = 0;
      for (int t = 0; t < kTokens; ++t) {
        double score = 0;
        for (int d = 0; d < size; ++d)
          score += static_cast<double>(q[(row * heads + head) * size + d]) * k[(t * kv_heads + kv_head) * size + d];
        sum += weights[t] = std::exp(score * geometry_.layers()[0].rule.scale);
      }
      for (int d = 0; d < size; ++d) {
        double want = 0;
        for (int t = 0; t < kTokens; ++t) want += weights[t] / sum * v[(t * kv_heads + kv_head) * size + d];
        require(std::abs(out[(row * heads + head) * size + d] - want) < 1e-4,
                "attention is wrong after the program");
      }
    }
  }
}

void WorkerUnderTest::run(std::span<const uint8_t> bytes, Totals& totals) {
  ++totals.programs;
  FrameJudge judge(geometry_, num_blocks_);
  std::vector<Verdict> verdicts;
  // Every program begins with no lane in a step.
  for (uint32_t lane = 0; lane < kMaxLanes; ++lane) {
    FrameHeader header;
    header.type = FrameType::kStep;
    header.lane = lane;
    send({frame_of(header, {}), std::nullopt}, judge, verdicts, totals);
  }
  FrameProgram program(bytes, geometry_, num_blocks_);
  while (const auto sent = program.next(judge)) send(*sent, judge, verdicts, totals);
  // All of it is sent before anything is received: fewer switches between the threads.
  const Known known = send_known();
  check_answers(verdicts, totals);
  check_known(known);
  require(connection_->sender->drained(kDeadline), "the worker does not give frames back");
  const uint64_t counted = connection_->worker->counters().rejected_frames.load();
  require(counted == rejected_, "rejected_frames is " + std::to_string(counted) + ", not " + std::to_string(rejected_));
}

void WorkerUnderTest::run_and_claim(std::span<const uint8_t> bytes, uint64_t consumed, Totals& totals) {
  run(bytes, totals);
  connection_->sender->claim_consumed(consumed);
  // Answered with an ERROR, for which the worker looks at what was consumed.
  ++totals.frames, ++totals.rejected;
  FrameHeader header;
  header.type = FrameType::kStep;
  require(connection_->sender->send(frame_of(header, {}), nullptr, kDeadline), "the worker does not take frames");
  if (consumed > connection_->received) {
    const auto end = Clock::now() + kDeadline;
    while (!connection_->client->peer_closed()) {
      require(Clock::now() < end, "the worker trusts a peer that received frames which were never sent");
      usleep(100);
    }
    ++totals.channels_ended;
  }
  connect();
}

}  // namespace lamina::fuzz
