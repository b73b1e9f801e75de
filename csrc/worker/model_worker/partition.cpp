#include "worker/model_worker/partition.h"

#include <algorithm>
#include <cstring>
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

bool SplitStep::takes_part(size_t worker) const {
  return std::any_of(groups.begin(), groups.end(),
                     [&](const SplitGroup& group) { return group.part(worker).takes_part(); });
}

size_t SplitStep::payload_bytes(size_t worker) const {
  size_t bytes = sizeof(uint64_t);
  for (const SplitGroup& group : groups) bytes += group.part(worker).section_bytes();
  return bytes;
}

void SplitStep::write(size_t worker, std::byte* payload) const {
  const uint64_t num_groups = groups.size();
  std::memcpy(payload, &num_groups, sizeof num_groups);
  payload += sizeof num_groups;
  for (const SplitGroup& group : groups) payload = group.part(worker).write(payload);
}

Partition::Partition(ModelGeometry geometry, size_t num_workers) : geometry_(std::move(geometry)) {
  std::vector<Heads> all;
  for (const LayerGeometry& layer : geometry_.layers()) all.push_back({layer.rows, {}});
  heads_.assign(num_workers, all);
}

Partition Partition::by_heads(ModelGeometry geometry, const std::vector<std::vector<int32_t>>& heads) {
  Partition partition(std::move(geometry), heads.size());
  const auto& caches = partition.geometry_.caches();
  for (const auto& by_cache : heads) {
    if (by_cache.size() != caches.size()) {
      throw std::invalid_argument("an attention worker has heads of " + std::to_string(by_cache.size()) +
                                  " caches, the model " + std::to_string(caches.size()));
    }
  }
  for (size_t l = 0; l < partition.geometry_.layers().size(); ++l) {
    const LayerGeometry& layer = partition.geometry_.layers()[l];
    const bool latent = layer.attention.latent;
    const char* what = latent ? "query head" : "KV head";
    const int32_t whole = latent ? layer.num_heads : layer.attention.num_kv_heads;
    std::vector<int32_t> shares;
    for (const auto& by_cache : heads) shares.push_back(by_cache[static_cast<size_t>(layer.cache)]);
    require_positive(shares, what);
    if (std::accumulate(shares.begin(), shares.end(), int64_t{0}) != whole) {
      throw std::invalid_argument(std::string("the attention workers' ") + what + "s do not add up to the model's " +
                                  std::to_string(whole));
    }
    LayerRows next;
    for (size_t w = 0; w < heads.size(); ++w) {
      AttentionGeometry part = layer.attention;
      if (!latent) part.num_kv_heads = shares[w];
      part.num_heads = static_cast<int32_t>(int64_t{layer.num_heads} * shares[w] / whole);
      Heads& mine = partition.heads_[w][l];
      mine = {LayerRows(part, layer.stores), next};
      next += mine.rows;
      if (latent) next.k = 0;
    }
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
  view.validate(geometry_);
  into.groups.resize(geometry_.groups().size());
  for (size_t g = 0; g < into.groups.size(); ++g) {
    SplitGroup& group = into.groups[g];
    group.parts.resize(divides_blocks() ? num_workers() : 1);
    for (WorkerStep& part : group.parts) {
      part.clear();
      part.has_positions = geometry_.groups()[g].has_positions;
    }
    group.merged.clear();
    group.num_merge_rows = group.num_q_rows = group.num_context_rows = 0;
    if (divides_blocks()) {
      split_by_blocks(view, g, group);
    } else {
      split_by_heads(view, g, group);
    }
  }
}

void Partition::split_by_heads(const StepView& view, size_t g, SplitGroup& into) const {
  const GroupGeometry& group = geometry_.groups()[g];
  WorkerStep& part = into.parts.front();
  const auto num_decodes = static_cast<size_t>(view.num_decodes);
  size_t token = 0;
  for (size_t i = 0; i < view.query_lens.size(); token += view.query_lens[i++]) {
    const Attended attended = view.attended(i, view.groups[g], group);
    if (attended.num_rows == 0) continue;
    part.query_lens.push_back(attended.num_rows);
    part.kv_lens.push_back(attended.kv_len);
    part.block_ids.insert(part.block_ids.end(), attended.blocks.begin(), attended.blocks.end());
    if (group.has_positions) {
      part.positions.push_back(view.context_lens[i]);
      for (size_t b = 0; b < attended.blocks.size(); ++b) {
        part.block_positions.push_back(attended.first_position + static_cast<int32_t>(b) * group.block_size);
      }
    }
    add(part.q_tokens, token, attended.num_rows);
    part.num_rows += attended.num_rows;
  }
  part.num_rows_without_lse = num_decodes;
  const auto& slot_mapping = view.groups[g].slot_mapping;
  part.slot_mapping.assign(slot_mapping.begin(), slot_mapping.end());
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
void Partition::split_by_blocks(const StepView& view, size_t g, SplitGroup& into) const {
  const GroupGeometry& group = geometry_.groups()[g];
  const auto num_decodes = static_cast<size_t>(view.num_decodes);
  std::vector<size_t> shared;
  for (size_t i = 0; i < num_decodes; ++i) {
    if (owner(view.attended(i, view.groups[g], group).blocks) == kSeveral) {
      shared.push_back(i);
    } else {
      add_request(view, g, i, i, into);
    }
  }
  for (WorkerStep& part : into.parts) part.num_rows_without_lse = part.num_rows;
  for (const size_t i : shared) add_request(view, g, i, i, into);
  size_t token = num_decodes;
  for (size_t i = num_decodes; i < view.query_lens.size(); token += view.query_lens[i++]) {
    add_request(view, g, i, token, into);
  }
  const auto& slot_mapping = view.groups[g].slot_mapping;
  for (size_t t = 0; t < slot_mapping.size(); ++t) {
    const int64_t slot = slot_mapping[t];
    if (slot < 0) continue;
    const Place at = place(slot / group.block_size);
    WorkerStep& part = into.parts[at.worker];
    part.slot_mapping.push_back(int64_t{at.block} * group.block_size + slot % group.block_size);
    add(part.kv_tokens, t, 1);
  }
}

// Adds the request, whose query begins at `token`, to the step of every worker that holds some of its blocks. Each
// worker's blocks are a sequence of their own; where the order among the tokens matters, the positions say it.
void Partition::add_request(const StepView& view, size_t g, size_t request, size_t token, SplitGroup& into) const {
  using To = Delivery::To;
  const GroupGeometry& group = geometry_.groups()[g];
  const Attended attended = view.attended(request, view.groups[g], group);
  if (attended.num_rows == 0) return;
  const auto count = static_cast<size_t>(attended.num_rows);
  std::vector<int32_t> kv_lens(num_workers(), 0);
  int32_t left = attended.kv_len, position = attended.first_position;
  for (const int32_t block : attended.blocks) {
    const Place at = place(block);
    WorkerStep& part = into.parts[at.worker];
    part.block_ids.push_back(at.block);
    if (group.has_positions) part.block_positions.push_back(position);
    kv_lens[at.worker] += std::min(left, group.block_size);
    left -= group.block_size;
    position += group.block_size;
  }

  const bool decodes = view.decodes(request);
  const To to = decodes ? To::kOut : To::kContext;
  const size_t first = decodes ? token : into.num_context_rows;
  const bool alone = std::count_if(kv_lens.begin(), kv_lens.end(), [](int32_t n) { return n > 0; }) == 1;
  bool begun = false;
  for (size_t w = 0; w < num_workers(); ++w) {
    if (kv_lens[w] == 0) continue;
    WorkerStep& part = into.parts[w];
    part.query_lens.push_back(attended.num_rows);
    part.kv_lens.push_back(kv_lens[w]);
    if (group.has_positions) part.positions.push_back(view.context_lens[request]);
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
