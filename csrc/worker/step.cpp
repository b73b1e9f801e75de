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
  size_t query_lens = sizeof(StepCounts), context_lens, block_ids, slot_mapping, bytes;
  StepLayout(size_t num_requests, size_t num_block_ids, size_t num_tokens)
      : context_lens(query_lens + 4 * num_requests),
        block_ids(context_lens + 4 * num_requests),
        slot_mapping(align_to(block_ids + 4 * num_block_ids, 8)),
        bytes(slot_mapping + 8 * num_tokens) {}
};

template <typename T>
void copy_in(std::vector<T>& to, const std::byte* from, size_t count) {
  to.resize(count);
  if (count > 0) std::memcpy(to.data(), from, count * sizeof(T));
}

void require(bool condition, const char* what) {
  if (!condition) throw MalformedFrame(what);
}

}  // namespace

size_t StepView::validate(int32_t block_size) const {
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
  size_t num_block_ids = 0;
  for (size_t i = 0; i < query_lens.size(); ++i) {
    const int64_t length = static_cast<int64_t>(query_lens[i]) + context_lens[i];
    if (query_lens[i] < 1) fail(i, "has no query tokens");
    if (i < static_cast<size_t>(num_decodes) && query_lens[i] != 1) fail(i, "decodes more than one token");
    if (context_lens[i] < 0) fail(i, "has a negative context length");
    if (length > std::numeric_limits<int32_t>::max()) fail(i, "is too long");
    const int64_t blocks = num_blocks_of(length, block_size);
    if (blocks > block_table_width) fail(i, "needs more blocks than its block table has");
    num_tokens += query_lens[i];
    num_block_ids += static_cast<size_t>(blocks);
  }
  if (num_tokens != static_cast<int64_t>(slot_mapping.size())) {
    throw std::invalid_argument("slot_mapping has " + std::to_string(slot_mapping.size()) + " entries for " +
                                std::to_string(num_tokens) + " query tokens");
  }
  return num_block_ids;
}

size_t StepView::payload_bytes(size_t num_block_ids) const {
  return StepLayout(query_lens.size(), num_block_ids, slot_mapping.size()).bytes;
}

void StepView::write(std::byte* payload, size_t num_block_ids, int32_t block_size) const {
  const StepLayout layout(query_lens.size(), num_block_ids, slot_mapping.size());
  const StepCounts counts{static_cast<uint32_t>(query_lens.size()), static_cast<uint32_t>(num_decodes),
                          static_cast<uint32_t>(slot_mapping.size()), static_cast<uint32_t>(num_block_ids)};
  std::memcpy(payload, &counts, sizeof counts);
  std::copy(query_lens.begin(), query_lens.end(), reinterpret_cast<int32_t*>(payload + layout.query_lens));
  std::copy(context_lens.begin(), context_lens.end(),
            reinterpret_cast<int32_t*>(payload + layout.context_lens));
  auto* ids = reinterpret_cast<int32_t*>(payload + layout.block_ids);
  for (size_t i = 0; i < query_lens.size(); ++i) {
    const int64_t blocks = num_blocks_of(static_cast<int64_t>(query_lens[i]) + context_lens[i], block_size);
    ids = std::copy_n(block_table + static_cast<int64_t>(i) * block_table_stride, blocks, ids);
  }
  std::copy(slot_mapping.begin(), slot_mapping.end(),
            reinterpret_cast<int64_t*>(payload + layout.slot_mapping));
}

void Step::clear() {
  num_decodes_ = 0;
  num_q_rows_ = 0;
  requests_.clear();
  slot_mapping_.clear();
}

void Step::read(std::span<const std::byte> payload, int32_t block_size, int32_t num_blocks) {
  try {
    parse(payload, block_size, num_blocks);
  } catch (const MalformedFrame&) {
    clear();
    throw;
  }
}

void Step::parse(std::span<const std::byte> payload, int32_t block_size, int32_t num_blocks) {
  clear();
  StepCounts counts;
  require(payload.size() >= sizeof counts, "a STEP is shorter than its counts");
  std::memcpy(&counts, payload.data(), sizeof counts);
  const StepLayout layout(counts.num_requests, counts.num_block_ids, counts.num_tokens);
  require(layout.bytes == payload.size(), "a STEP's size does not fit its counts");
  require(counts.num_decodes <= counts.num_requests, "a STEP has more decodes than requests");
  require(counts.num_tokens <= static_cast<uint32_t>(std::numeric_limits<int32_t>::max()),
          "a STEP has too many tokens");

  // Everything is copied before it is checked: the frame lies in memory that the peer can still write.
  const size_t num_requests = counts.num_requests;
  copy_in(lens_, payload.data() + layout.query_lens, 2 * num_requests);
  copy_in(block_ids_, payload.data() + layout.block_ids, counts.num_block_ids);
  copy_in(slot_mapping_, payload.data() + layout.slot_mapping, counts.num_tokens);

  const int32_t* query_lens = lens_.data();
  const int32_t* context_lens = lens_.data() + num_requests;
  const int32_t* table = block_ids_.data();
  int64_t num_tokens = 0;
  int64_t num_q_rows = 0;
  int64_t blocks_left = counts.num_block_ids;
  for (size_t i = 0; i < num_requests; ++i) {
    const int64_t length = static_cast<int64_t>(query_lens[i]) + context_lens[i];
    const bool decodes = i < counts.num_decodes;
    require(query_lens[i] >= 1 && context_lens[i] >= 0 && length <= std::numeric_limits<int32_t>::max(),
            "a STEP has a request of invalid length");
    require(!decodes || query_lens[i] == 1, "a STEP has a decode of more than one token");
    const int64_t blocks = num_blocks_of(length, block_size);
    require(blocks <= blocks_left, "a STEP has too few block ids");
    // A decode attends its own token too, which is appended first. A prefill chunk attends its context only;
    // the model worker attends within the chunk.
    const int32_t kv_len = decodes ? static_cast<int32_t>(length) : context_lens[i];
    if (kv_len > 0) {
      requests_.push_back({static_cast<int32_t>(num_q_rows), query_lens[i], kv_len, table});
      num_q_rows += query_lens[i];
    }
    num_tokens += query_lens[i];
    require(num_tokens <= counts.num_tokens, "a STEP's query lengths exceed its tokens");
    blocks_left -= blocks;
    table += blocks;
  }
  require(num_tokens == counts.num_tokens, "a STEP's query lengths do not add up to its tokens");
  require(blocks_left == 0, "a STEP has too many block ids");
  require(std::all_of(block_ids_.begin(), block_ids_.end(),
                      [=](int32_t id) { return id >= 0 && id < num_blocks; }),
          "a STEP names a block outside the pool");
  const int64_t num_slots = static_cast<int64_t>(num_blocks) * block_size;
  require(std::all_of(slot_mapping_.begin(), slot_mapping_.end(),
                      [=](int64_t slot) { return slot >= -1 && slot < num_slots; }),
          "a STEP names a slot outside the pool");
  num_decodes_ = static_cast<int32_t>(counts.num_decodes);
  num_q_rows_ = static_cast<int32_t>(num_q_rows);
}

}  // namespace lamina
