#include "worker/attention_worker/step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "wire/step_part.h"

namespace lamina {
namespace {

constexpr int64_t kMax = std::numeric_limits<int32_t>::max();

int64_t num_blocks_of(int64_t num_tokens, int32_t block_size) {
  return (num_tokens + block_size - 1) / block_size;
}

template <typename T>
void copy_in(std::vector<T>& to, const std::byte* from, size_t count) {
  to.resize(count);
  if (count > 0) std::memcpy(to.data(), from, count * sizeof(T));
}

void require(bool condition, const char* what) {
  if (!condition) throw MalformedFrame(what);
}

// Blocks lie one behind the other, and no token behind the first query row: what the kernel takes for granted.
void check_positions(const AttendRequest& request, int64_t num_blocks, int32_t block_size) {
  require(request.position >= 0 && int64_t{request.position} + request.query_len <= kMax,
          "a STEP has a request at a position out of range");
  int64_t free = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    require(request.block_positions[b] >= free, "a STEP has blocks whose positions overlap");
    free = int64_t{request.block_positions[b]} + block_size;
  }
  const int64_t num_tokens_of_last = request.kv_len - (num_blocks - 1) * block_size;
  require(free - block_size + num_tokens_of_last - 1 <= request.position, "a STEP has tokens behind their query");
}

}  // namespace

void GroupStep::clear() {
  num_q_rows_ = num_rows_without_lse_ = 0;
  requests_.clear();
  slot_mapping_.clear();
}

size_t GroupStep::read(std::span<const std::byte> payload, const GroupGeometry& group, int32_t num_blocks) {
  StepCounts counts;
  require(payload.size() >= sizeof counts, "a STEP is shorter than its counts");
  std::memcpy(&counts, payload.data(), sizeof counts);
  require(counts.has_positions == static_cast<uint32_t>(group.has_positions),
          "a STEP has positions for a group that needs none, or none for one that does");
  const StepLayout layout(counts);
  require(layout.bytes <= payload.size(), "a STEP's size does not fit its counts");
  require(counts.num_tokens <= kMax, "a STEP has too many tokens");

  // Everything is copied before it is checked: the frame lies in memory that the peer can still write.
  const size_t num_requests = counts.num_requests;
  copy_in(lens_, payload.data() + layout.query_lens, 2 * num_requests);
  copy_in(block_ids_, payload.data() + layout.block_ids, counts.num_block_ids);
  copy_in(positions_, payload.data() + layout.positions, group.has_positions ? num_requests : 0);
  copy_in(block_positions_, payload.data() + layout.block_positions, group.has_positions ? counts.num_block_ids : 0);
  copy_in(slot_mapping_, payload.data() + layout.slot_mapping, counts.num_tokens);

  const int32_t* query_lens = lens_.data();
  const int32_t* kv_lens = lens_.data() + num_requests;
  int64_t num_q_rows = 0;
  int64_t next_block = 0;
  for (size_t i = 0; i < num_requests; ++i) {
    require(query_lens[i] >= 1 && kv_lens[i] >= 1, "a STEP has a request of invalid length");
    const int64_t blocks = num_blocks_of(kv_lens[i], group.block_size);
    require(blocks <= counts.num_block_ids - next_block, "a STEP has too few block ids");
    AttendRequest request{static_cast<int32_t>(num_q_rows), query_lens[i], kv_lens[i], block_ids_.data() + next_block};
    if (group.has_positions) {
      request.position = positions_[i];
      request.block_positions = block_positions_.data() + next_block;
      check_positions(request, blocks, group.block_size);
    }
    requests_.push_back(request);
    num_q_rows += query_lens[i];
    // The kernel counts rows of q for each KV head.
    require(num_q_rows * group.heads_per_kv_head <= kMax, "a STEP has too many rows");
    next_block += blocks;
  }
  require(next_block == counts.num_block_ids, "a STEP has too many block ids");
  require(counts.num_rows_without_lse <= num_q_rows, "a STEP has more rows without LSE than rows");
  require(std::all_of(block_ids_.begin(), block_ids_.end(),
                      [=](int32_t id) { return id >= 0 && id < num_blocks; }),
          "a STEP names a block outside the pool");
  const int64_t num_slots = static_cast<int64_t>(num_blocks) * group.block_size;
  require(std::all_of(slot_mapping_.begin(), slot_mapping_.end(),
                      [=](int64_t slot) { return slot >= -1 && slot < num_slots; }),
          "a STEP names a slot outside the pool");
  num_q_rows_ = static_cast<int32_t>(num_q_rows);
  num_rows_without_lse_ = static_cast<int32_t>(counts.num_rows_without_lse);
  return layout.bytes;
}

void Step::read(std::span<const std::byte> payload, const ModelGeometry& geometry, int32_t num_blocks) {
  groups_.resize(geometry.groups().size());
  for (GroupStep& group : groups_) group.clear();
  try {
    uint64_t num_groups;
    require(payload.size() >= sizeof num_groups, "a STEP is shorter than its counts");
    std::memcpy(&num_groups, payload.data(), sizeof num_groups);
    require(num_groups == groups_.size(), "a STEP has another number of groups than the model");
    payload = payload.subspan(sizeof num_groups);
    for (size_t g = 0; g < groups_.size(); ++g) {
      payload = payload.subspan(groups_[g].read(payload, geometry.groups()[g], num_blocks));
    }
    require(payload.empty(), "a STEP's size does not fit its counts");
  } catch (const MalformedFrame&) {
    for (GroupStep& group : groups_) group.clear();
    throw;
  }
}

int32_t Step::num_tokens() const {
  int32_t most = 0;
  for (const GroupStep& group : groups_) most = std::max(most, group.num_tokens());
  return most;
}

}  // namespace lamina
