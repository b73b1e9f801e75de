#include "worker/attention_worker/step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "wire/step_part.h"

namespace lamina {
namespace {

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

}  // namespace

void Step::clear() {
  num_q_rows_ = num_rows_without_lse_ = 0;
  requests_.clear();
  slot_mapping_.clear();
}

void Step::read(std::span<const std::byte> payload, const AttentionGeometry& geometry, int32_t num_blocks) {
  try {
    parse(payload, geometry, num_blocks);
  } catch (const MalformedFrame&) {
    clear();
    throw;
  }
}

void Step::parse(std::span<const std::byte> payload, const AttentionGeometry& geometry, int32_t num_blocks) {
  clear();
  StepCounts counts;
  require(payload.size() >= sizeof counts, "a STEP is shorter than its counts");
  std::memcpy(&counts, payload.data(), sizeof counts);
  const StepLayout layout(counts.num_requests, counts.num_block_ids, counts.num_tokens);
  require(layout.bytes == payload.size(), "a STEP's size does not fit its counts");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require(counts.num_tokens <= kMax, "a STEP has too many tokens");

  // Everything is copied before it is checked: the frame lies in memory that the peer can still write.
  const size_t num_requests = counts.num_requests;
  copy_in(lens_, payload.data() + layout.query_lens, 2 * num_requests);
  copy_in(block_ids_, payload.data() + layout.block_ids, counts.num_block_ids);
  copy_in(slot_mapping_, payload.data() + layout.slot_mapping, counts.num_tokens);

  const int32_t* query_lens = lens_.data();
  const int32_t* kv_lens = lens_.data() + num_requests;
  const int32_t* table = block_ids_.data();
  // The kernel counts rows of q for each KV head.
  const int64_t group = geometry.num_heads / geometry.num_kv_heads;
  int64_t num_q_rows = 0;
  int64_t blocks_left = counts.num_block_ids;
  for (size_t i = 0; i < num_requests; ++i) {
    require(query_lens[i] >= 1 && kv_lens[i] >= 1, "a STEP has a request of invalid length");
    const int64_t blocks = num_blocks_of(kv_lens[i], geometry.block_size);
    require(blocks <= blocks_left, "a STEP has too few block ids");
    requests_.push_back({static_cast<int32_t>(num_q_rows), query_lens[i], kv_lens[i], table});
    num_q_rows += query_lens[i];
    require(num_q_rows * group <= kMax, "a STEP has too many rows");
    blocks_left -= blocks;
    table += blocks;
  }
  require(blocks_left == 0, "a STEP has too many block ids");
  require(counts.num_rows_without_lse <= num_q_rows, "a STEP has more rows without LSE than rows");
  require(std::all_of(block_ids_.begin(), block_ids_.end(),
                      [=](int32_t id) { return id >= 0 && id < num_blocks; }),
          "a STEP names a block outside the pool");
  const int64_t num_slots = static_cast<int64_t>(num_blocks) * geometry.block_size;
  require(std::all_of(slot_mapping_.begin(), slot_mapping_.end(),
                      [=](int64_t slot) { return slot >= -1 && slot < num_slots; }),
          "a STEP names a slot outside the pool");
  num_q_rows_ = static_cast<int32_t>(num_q_rows);
  num_rows_without_lse_ = static_cast<int32_t>(counts.num_rows_without_lse);
}

}  // namespace lamina
