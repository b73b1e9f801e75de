#include "worker/model_worker/partition.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

namespace lamina {
namespace {

constexpr size_t kSeveral = std::numeric_limits<size_t>::max();

// Appends, or lengthens the last where this one follows it.
void add(std::vector<RowRange>& ranges, size_t first, size_t count) {
  if (!ranges.empty() && ranges.back().first + ranges.back().count == first) {
    ranges.back().count += count;
  } else {
    ranges.push_back({first, count});
  }
}

template <class Rows>  // Delivery, MergedRows
void add(std::vector<Rows>& list, const Rows& rows) {
  if (!list.empty()) {
    Rows& last = list.back();
    if (last.to == rows.to && last.row + last.count == rows.row && last.first + last.count == rows.first) {
      last.count += rows.count;
      return;
    }
  }
  list.push_back(rows);
}

void require_positive(const std::vector<int32_t>& shares, const char* what) {
  if (shares.empty() || std::any_of(shares.begin(), shares.end(), [](int32_t n) { return n < 1; })) {
    throw std::invalid_argument(std::string("each attention worker needs at least one ") + what);
  }
}

}  // namespace

void WorkerStep::clear() {
  StepPart::clear();
  q_tokens.clear();
  kv_tokens.clear();
  deliveries.clear();
}

Partition::Partition(ModelGeometry geometry, size_t num_workers)
    : geometry_(std::move(geometry)), heads_(num_workers, Heads{geometry_}) {}

Partition Partition::by_heads(ModelGeometry geometry, const std::vector<std::vector<int32_t>>& by_cache) {
  std::vector<int32_t> kv_heads;
  for (const auto& heads : by_cache) kv_heads.push_back(heads.at(0));
  require_positive(kv_heads, "KV head");
  Partition partition(std::move(geometry), kv_heads.size());
  const AttentionGeometry& all = partition.geometry_.attention;
  if (std::accumulate(kv_heads.begin(), kv_heads.end(), int64_t{0}) != all.num_kv_heads) {
    throw std::invalid_argument("the attention workers' KV heads do not add up to the model's " +
                                std::to_string(all.num_kv_heads));
  }
  const int32_t group = all.num_heads / all.num_kv_heads;
  size_t q = 0, kv = 0, lse = 0;
  for (size_t w = 0; w < kv_heads.size(); ++w) {
    Heads& heads = partition.heads_[w];
    heads.geometry.attention.num_kv_heads = kv_heads[w];
    heads.geometry.attention.num_heads = kv_heads[w] * group;
    heads.q_offset = std::exchange(q, q + heads.geometry.q_row_bytes());
    heads.kv_offset = std::exchange(kv, kv + heads.geometry.kv_row_bytes());
    heads.lse_offset = std::exchange(lse, lse + heads.geometry.lse_row_bytes());
  }
  return partition;
}

Partition Partition::by_blocks(ModelGeometry geometry, const std::vector<int32_t>& num_blocks) {
  require_positive(num_blocks, "KV block");
  Partition partition(std::move(geometry), num_blocks.size());
  partition.first_block_.assign(1, 0);
  for (const int32_t count : num_blocks) {
    partition.first_block_.push_back(partition.first_block_.back() + count);
  }
  return partition;
}

Partition::Place Partition::place(int64_t block) const {
  if (block < 0 || block >= first_block_.back()) {
    throw std::invalid_argument("block " + std::to_string(block) + " is outside the attention workers' " +
                                std::to_string(first_block_.back()) + " blocks");
  }
  const auto after = std::upper_bound(first_block_.begin(), first_block_.end(), block);
  const auto worker = static_cast<size_t>(after - first_block_.begin()) - 1;
  return {worker, static_cast<int32_t>(block - first_block_[worker])};
}

void Partition::split(const StepView& view, SplitStep& into) const {
  view.validate(geometry_.attention.block_size);
  into.parts.resize(divides_blocks() ? num_workers() : 1);
  for (WorkerStep& part : into.parts) part.clear();
  into.merged.clear();
  into.num_merge_rows = into.num_q_rows = into.num_context_rows = 0;
  if (divides_blocks()) {
    split_by_blocks(view, into);
  } else {
    split_by_heads(view, into);
  }
}

void Partition::split_by_heads(const StepView& view, SplitStep& into) const {
  const int32_t block_size = geometry_.attention.block_size;
  WorkerStep& part = into.parts.front();
  const auto num_decodes = static_cast<size_t>(view.num_decodes);
  size_t token = 0;
  for (size_t i = 0; i < view.query_lens.size(); token += view.query_lens[i++]) {
    const int32_t kv_len = view.kv_len(i);
    if (kv_len == 0) continue;
    const auto blocks = view.blocks(i, block_size);
    part.query_lens.push_back(view.query_lens[i]);
    part.kv_lens.push_back(kv_len);
    part.block_ids.insert(part.block_ids.end(), blocks.begin(), blocks.end());
    add(part.q_tokens, token, view.query_lens[i]);
    part.num_rows += view.query_lens[i];
  }
  part.num_rows_without_lse = num_decodes;
  part.slot_mapping.assign(view.slot_mapping.begin(), view.slot_mapping.end());
  if (token > 0) part.kv_tokens.push_back({0, token});
  into.num_q_rows = part.num_rows;
  into.num_context_rows = part.num_rows - num_decodes;
  if (num_decodes > 0) part.deliveries.push_back({Delivery::To::kOut, 0, 0, num_decodes});
  if (into.num_context_rows > 0) {
    part.deliveries.push_back({Delivery::To::kContext, num_decodes, 0, into.num_context_rows});
  }
}

// The worker that holds all of the blocks, or kSeveral.
size_t Partition::owner(std::span<const int32_t> blocks) const {
  const size_t first = place(blocks.front()).worker;
  const bool alone = std::all_of(blocks.begin(), blocks.end(), [&](int32_t block) {
    return block >= first_block_[first] && block < first_block_[first + 1];
  });
  return alone ? first : kSeveral;
}

// A worker's rows without LSE come first: the decodes that it attends alone, then those that are merged, then the
// prefill chunks.
void Partition::split_by_blocks(const StepView& view, SplitStep& into) const {
  const int32_t block_size = geometry_.attention.block_size;
  const auto num_decodes = static_cast<size_t>(view.num_decodes);
  std::vector<size_t> shared;
  for (size_t i = 0; i < num_decodes; ++i) {
    if (owner(view.blocks(i, block_size)) == kSeveral) {
      shared.push_back(i);
    } else {
      add_request(view, i, i, into);
    }
  }
  for (WorkerStep& part : into.parts) part.num_rows_without_lse = part.num_rows;
  for (const size_t i : shared) add_request(view, i, i, into);
  size_t token = num_decodes;
  for (size_t i = num_decodes; i < view.query_lens.size(); token += view.query_lens[i++]) {
    if (view.kv_len(i) > 0) add_request(view, i, token, into);
  }
  for (size_t t = 0; t < view.slot_mapping.size(); ++t) {
    const int64_t slot = view.slot_mapping[t];
    if (slot < 0) continue;
    const Place at = place(slot / block_size);
    WorkerStep& part = into.parts[at.worker];
    part.slot_mapping.push_back(int64_t{at.block} * block_size + slot % block_size);
    add(part.kv_tokens, t, 1);
  }
}

// Adds the request, whose query begins at `token`, to the step of every worker that holds some of its blocks. Attention
// asks for no order among the tokens that are attended: each worker's blocks are a sequence of their own.
void Partition::add_request(const StepView& view, size_t request, size_t token, SplitStep& into) const {
  using To = Delivery::To;
  const int32_t block_size = geometry_.attention.block_size;
  const auto count = static_cast<size_t>(view.query_lens[request]);
  const auto blocks = view.blocks(request, block_size);
  std::vector<int32_t> kv_lens(num_workers(), 0);
  int32_t left = view.kv_len(request);
  for (const int32_t block : blocks) {
    const Place at = place(block);
    into.parts[at.worker].block_ids.push_back(at.block);
    kv_lens[at.worker] += std::min(left, block_size);
    left -= block_size;
  }

  const bool decodes = view.decodes(request);
  const To to = decodes ? To::kOut : To::kContext;
  const size_t first = decodes ? token : into.num_context_rows;
  const bool alone = std::count_if(kv_lens.begin(), kv_lens.end(), [](int32_t n) { return n > 0; }) == 1;
  bool begun = false;
  for (size_t w = 0; w < num_workers(); ++w) {
    if (kv_lens[w] == 0) continue;
    WorkerStep& part = into.parts[w];
    part.query_lens.push_back(static_cast<int32_t>(count));
    part.kv_lens.push_back(kv_lens[w]);
    add(part.q_tokens, token, count);
    if (alone) {
      add(part.deliveries, Delivery{to, part.num_rows, first, count});
    } else {
      const To merge = std::exchange(begun, true) ? To::kMerge : To::kFirst;
      add(part.deliveries, Delivery{merge, part.num_rows, into.num_merge_rows, count});
    }
    part.num_rows += count;
  }
  if (!alone) {
    add(into.merged, MergedRows{to, into.num_merge_rows, first, count});
    into.num_merge_rows += count;
  }
  into.num_q_rows += count;
  if (!decodes) into.num_context_rows += count;
}

std::vector<std::vector<int32_t>> Partition::split_blocks(std::span<const int32_t> block_ids) const {
  if (!divides_blocks()) return {num_workers(), {block_ids.begin(), block_ids.end()}};
  std::vector<std::vector<int32_t>> parts(num_workers());
  for (const int32_t block : block_ids) {
    const Place at = place(block);
    parts[at.worker].push_back(at.block);
  }
  return parts;
}

std::vector<std::vector<int32_t>> Partition::split_copies(std::span<const int32_t> pairs) const {
  if (!divides_blocks()) return {num_workers(), {pairs.begin(), pairs.end()}};
  std::vector<std::vector<int32_t>> parts(num_workers());
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
    const Place from = place(pairs[i]), to = place(pairs[i + 1]);
    if (from.worker != to.worker) {
      throw std::invalid_argument("block " + std::to_string(pairs[i]) + " cannot be copied to block " +
                                  std::to_string(pairs[i + 1]) + ", which is on another attention worker");
    }
    parts[from.worker].insert(parts[from.worker].end(), {from.block, to.block});
  }
  return parts;
}

}  // namespace lamina
