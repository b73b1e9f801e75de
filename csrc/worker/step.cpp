#include "worker/step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "transport/wire.h"

namespace lamina {
namespace {

int64_t num_blocks_of(int64_t num_tokens, int32_t block_size) {
  return (num_tokens + block_size - 1) / block_size;
}

// Byte offsets within a STEP payload.
struct StepLayout {
  size_t query_lens = sizeof(StepCounts), kv_lens, block_ids, slot_mapping, bytes;
  StepLayout(size_t num_requests, size_t num_block_ids, size_t num_tokens)
      : kv_lens(query_lens + 4 * num_requests),
        block_ids(kv_lens + 4 * num_requests),
        slot_mapping(align_to(block_ids + 4 * num_block_ids, 8)),
        bytes(slot_mapping + 8 * num_tokens) {}
};

template <typename T>
void copy_in(std::vector<T>& to, const std::byte* from, size_t count) {
  to.resize(count);
  if (count > 0) std::memcpy(to.data(), from, count * sizeof(T));
}

template <typename T>
void copy_out(std::byte* to, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

void require(bool condition, const char* what) {
  if (!condition) throw MalformedFrame(what);
}

}  // namespace

void StepView::validate(int32_t block_size) const {
  const auto fail = [](size_t request, const std::string& what) {
    throw std::invalid_argument("request " + std::to_string(request) + " of the step " + what);
  };
  if (context_lens.size() != query_lens.size()) {
    throw std::invalid_argument("query_lens and context_lens differ in length");
  }
  if (num_decodes < 0 || static_cast<size_t>(num_decodes) > query_lens.size()) {
    throw std::invalid_argument("num_decodes is " + std::to_string(num_decodes) + " of " +
                                std::to_string(query_lens.size()) + " requests");
  }
  int64_t num_tokens = 0;
  for (size_t i = 0; i < query_lens.size(); ++i) {
    const int64_t length = static_cast<int64_t>(query_lens[i]) + context_lens[i];
    if (query_lens[i] < 1) fail(i, "has no query tokens");
    if (decodes(i) && query_lens[i] != 1) fail(i, "decodes more than one token");
    if (context_lens[i] < 0) fail(i, "has a negative context length");
    if (length > std::numeric_limits<int32_t>::max()) fail(i, "is too long");
    if (num_blocks_of(length, block_size) > block_table_width) {
      fail(i, "needs more blocks than its block table has");
    }
    num_tokens += query_lens[i];
  }
  if (num_tokens != static_cast<int64_t>(slot_mapping.size())) {
    throw std::invalid_argument("slot_mapping has " + std::to_string(slot_mapping.size()) + " entries for " +
                                std::to_string(num_tokens) + " query tokens");
  }
}

size_t StepPart::payload_bytes() const {
  return StepLayout(query_lens.size(), block_ids.size(), slot_mapping.size()).bytes;
}

void StepPart::write(std::byte* payload) const {
  const StepLayout layout(query_lens.size(), block_ids.size(), slot_mapping.size());
  const StepCounts counts{
      static_cast<uint32_t>(query_lens.size()), static_cast<uint32_t>(num_rows_without_lse),
      static_cast<uint32_t>(slot_mapping.size()), static_cast<uint32_t>(block_ids.size())};
  std::memcpy(payload, &counts, sizeof counts);
  copy_out(payload + layout.query_lens, query_lens);
  copy_out(payload + layout.kv_lens, kv_lens);
  copy_out(payload + layout.block_ids, block_ids);
  copy_out(payload + layout.slot_mapping, slot_mapping);
}

void StepPart::clear() {
  query_lens.clear();
  kv_lens.clear();
  block_ids.clear();
  slot_mapping.clear();
  num_rows = num_rows_without_lse = 0;
}

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
