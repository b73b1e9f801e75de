// Threads at work on everything that they share: for the sanitizers, above all ThreadSanitizer. Exits with 0 if every
// frame and every output was as expected.
//
//   stress [--seconds N]
//
// Both ends of a channel are in this process, and each maps the channel's memory. ThreadSanitizer knows memory by its
// address: of two mappings it would see two memories, no race between them and no synchronisation either. So mmap() is
// wrapped (see CMakeLists.txt) to give the second mapping of a memfd the address of the first.
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "transport/shm_channel.h"
#include "uniform_geometry.h"
#include "worker/model_worker/attention_client.h"
#include "worker/attention_worker/attention_worker.h"

extern "C" {
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);
}

namespace {

struct Mapping {
  ino_t file;
  int users;
};
std::mutex mappings_mutex;
std::map<void*, Mapping> mappings;

}  // namespace

extern "C" void* __wrap_mmap(void* where, size_t bytes, int protection, int flags, int fd, off_t offset) {
  struct stat status {};
  if (fd < 0 || (flags & MAP_SHARED) == 0 || fstat(fd, &status) != 0)
    return __real_mmap(where, bytes, protection, flags, fd, offset);
  const std::lock_guard lock(mappings_mutex);
  for (auto& [address, mapping] : mappings) {
    if (mapping.file != status.st_ino) continue;
    ++mapping.users;
    return address;
  }
  void* address = __real_mmap(where, bytes, protection, flags, fd, offset);
  if (address != MAP_FAILED) mappings[address] = {status.st_ino, 1};
  return address;
}

extern "C" int __wrap_munmap(void* address, size_t bytes) {
  const std::lock_guard lock(mappings_mutex);
  const auto found = mappings.find(address);
  if (found != mappings.end()) {
    if (--found->second.users > 0) return 0;
    mappings.erase(found);
  }
  return __real_munmap(address, bytes);
}

namespace {

using namespace lamina;
using std::chrono::seconds;

constexpr seconds kDeadline{60};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "stress: %s\n", what.c_str());
  std::exit(1);
}

Deadline deadline() { return Clock::now() + kDeadline; }

// Both ends of a channel.
struct Pair {
  int memory_fd;
  int sockets[2];
  std::shared_ptr<ShmChannel> client, worker;

  Pair(size_t ring_bytes, int spin_us) : memory_fd(create_shm_memory(ring_bytes)) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) fail("socketpair");
    client = std::make_shared<ShmChannel>(memory_fd, sockets[0], ShmEnd::kClient, spin_us);
    worker = std::make_shared<ShmChannel>(memory_fd, sockets[1], ShmEnd::kWorker, spin_us);
  }
  ~Pair() {
    client.reset();
    worker.reset();
    for (const int socket : sockets) ::close(socket);
    ::close(memory_fd);
  }
};

// One thread sends frames of every size, and another one takes and checks them; in both directions at once.
uint64_t stress_channel(int spin_us, Clock::time_point end) {
  Pair pair(1 << 16, spin_us);
  std::atomic<uint64_t> num_frames{0};
  constexpr uint64_t kLast = ~0ull;
  const auto send = [&](Channel& channel, uint64_t seed) {
    std::mt19937_64 random(seed);
    for (uint64_t number = 0;; ++number) {
      const bool last = Clock::now() >= end;
      const size_t words = 2 + random() % (random() % 8 == 0 ? 3000 : 60);
      const auto frame = channel.reserve(8 * words, deadline());
      const uint64_t value = last ? kLast : number;
      for (size_t i = 0; i < words; ++i) std::memcpy(frame.data() + 8 * i, &value, 8);
      channel.post();
      if (last) return;
    }
  };
  const auto receive = [&](Channel& channel) {
    for (uint64_t number = 0;; ++number) {
      const auto frame = channel.receive(deadline());
      uint64_t value = 0;
      for (size_t at = 0; at < frame.size(); at += 8) {
        std::memcpy(&value, frame.data() + at, 8);
        if (value != number && value != kLast) fail("a frame does not hold what was sent");
      }
      channel.release();
      num_frames.fetch_add(1, std::memory_order_relaxed);
      if (value == kLast) return;
    }
  };
  std::thread threads[] = {std::thread([&] { send(*pair.client, 1); }),
                           std::thread([&] { receive(*pair.worker); }),
                           std::thread([&] { send(*pair.worker, 2); }),
                           std::thread([&] { receive(*pair.client); })};
  for (std::thread& thread : threads) thread.join();
  return num_frames.load();
}

// Two lanes of one client in turns, over two workers that divide the heads; another thread looks at everything that a
// control thread looks at. Each lane decodes over tokens that are all alike, so that the output is their v.
uint64_t stress_lanes(Clock::time_point end) {
  constexpr int kLanes = 2, kLayers = 3, kBlocks = 8, kHeads = 4, kKvHeads = 2, kSize = 32, kBlockSize = 32;
  const std::vector<float> scales{0.1f, 0.2f, 0.3f};
  const auto geometry = fuzz::uniform_geometry({DType::kFloat32, kHeads, kKvHeads, kSize, kBlockSize, kSize}, scales);
  const auto share = fuzz::uniform_geometry({DType::kFloat32, kHeads / 2, kKvHeads / 2, kSize, kBlockSize, kSize}, scales);
  const Partition partition = Partition::by_heads(geometry, {{1}, {1}});
  Pair pairs[] = {Pair(1 << 20, 20), Pair(1 << 20, 20)};
  std::vector<std::unique_ptr<AttentionWorker>> workers;
  std::vector<std::shared_ptr<Channel>> channels;
  for (size_t i = 0; i < 2; ++i) {
    workers.push_back(std::make_unique<AttentionWorker>(share, kBlocks, 2, std::vector<int>(), 20));
    workers[i]->serve(pairs[i].worker);
    channels.push_back(pairs[i].client);
  }
  AttentionClient client(channels, partition);
  std::atomic<uint64_t> steps{0};
  std::atomic<bool> done{false};

  const auto run_lane = [&](uint32_t lane) {
    const int32_t first_block = static_cast<int32_t>(lane) * 2;
    std::vector<float> q(kHeads * kSize, 0.5f), k(kKvHeads * kSize, 0.25f), v(kKvHeads * kSize), out(q.size());
    for (int32_t context = 0; Clock::now() < end; context = (context + 1) % (2 * kBlockSize)) {
      const float value = static_cast<float>(lane + 1);
      std::fill(v.begin(), v.end(), value);
      const int32_t query_len = 1;
      const int32_t table[] = {first_block, first_block + 1};
      const int64_t slot = static_cast<int64_t>(first_block) * kBlockSize + context;
      client.join_turn(lane);
      client.begin_turn(lane, deadline());
      const StepView step{1, {&query_len, 1}, {&context, 1}, {{table, 2, 2, {&slot, 1}}}};
      client.begin_step(lane, step, deadline());
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        const auto row = [](auto& tensor) {
          return ConstRows{reinterpret_cast<const std::byte*>(tensor.data()),
                           static_cast<int64_t>(tensor.size() * sizeof(float))};
        };
        client.post(lane, layer, row(q), row(k), row(v), deadline());
        client.collect(lane, layer,
                       {reinterpret_cast<std::byte*>(out.data()), static_cast<int64_t>(out.size() * sizeof(float))},
                       nullptr, nullptr, deadline());
        for (const float x : out)
          if (std::abs(x - value) > 1e-4f) fail("an output is not what the lane's tokens hold");
      }
      client.end_turn(lane);
      client.step_times(lane);
      steps.fetch_add(1, std::memory_order_relaxed);
    }
  };
  std::thread watcher([&] {
    uint64_t sum = 0;
    while (!done.load()) {
      for (auto& worker : workers) {
        sum += worker->progress() + worker->counters().messages.load(std::memory_order_relaxed);
        worker->start_trace();
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        sum += worker->take_trace().size();
      }
      sum += pairs[0].client->peer_closed() + pairs[0].client->num_bad_descriptors() + client.generation();
    }
    if (sum == 0) fail("nothing to see");
  });
  std::vector<std::thread> lanes;
  for (uint32_t lane = 0; lane < kLanes; ++lane) lanes.emplace_back(run_lane, lane);
  for (std::thread& lane : lanes) lane.join();
  done = true;
  watcher.join();
  // As a control thread does when an engine is lost: stopped from elsewhere, with a frame in hand perhaps.
  for (auto& worker : workers) worker->stop();
  for (auto& pair : pairs) pair.client->close();
  return steps.load();
}

}  // namespace

int main(int argc, char** argv) {
  double total = 12;
  if (argc == 3 && std::strcmp(argv[1], "--seconds") == 0) total = std::atof(argv[2]);
  const auto part = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(total / 4));
  uint64_t frames = 0;
  for (const int spin_us : {0, 50}) frames += stress_channel(spin_us, Clock::now() + part);
  const uint64_t steps = stress_lanes(Clock::now() + 2 * part);
  std::printf("stress: %llu frames, %llu steps of two lanes over two workers\n", static_cast<unsigned long long>(frames),
              static_cast<unsigned long long>(steps));
}
