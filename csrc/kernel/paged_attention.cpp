// The paged driver of all variants: addresses blocks, divides the work, merges partial results by LSE.
#include "kernel/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/round_up.h"
#include "kernel/attend_plan.h"
#include "kernel/attend_workspace.h"
#include "kernel/thread_pool.h"

namespace lamina {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// One attend call; `run` for every piece on some thread, then `merge` on the caller's.
class Attend {
 public:
  Attend(const AttentionGeometry& geometry, const BlockShape& shape, const RowOps& ops, LayerPool layer,
         const void* q, const AttendRequest* requests, const ScoreRule& rule, int32_t num_complete_tokens,
         void* out, float* lse)
      : geometry_(geometry),
        shape_(shape),
        ops_(ops),
        group_(geometry.num_heads / geometry.num_kv_heads),
        q_row_bytes_(static_cast<size_t>(geometry.head_size) * shape.element_size),
        out_row_bytes_(static_cast<size_t>(geometry.head_size_v) * shape.element_size),
        layer_(layer),
        q_(static_cast<const std::byte*>(q)),
        requests_(requests),
        rule_(rule),
        num_complete_rows_(static_cast<size_t>(rule.sinks.empty() ? 0 : num_complete_tokens) *
                           geometry.num_heads),
        scale_log2_(rule.scale * kLog2E),
        out_(static_cast<std::byte*>(out)),
        lse_(lse) {}

  void run(const AttendPlan& plan, int32_t piece, ThreadScratch& thread, Partials& partials,
           ThreadPool& threads, int thread_index) const {
    plan.slices(piece, thread.slices);
    const auto& slices = thread.slices;
    int next_partial = 0;
    for (size_t s = 0; s < slices.size(); ++s) {
      const WorkSlice& slice = slices[s];
      const RowItem& item = plan.items()[slice.item];
      const bool whole = slice.block_begin == 0 && slice.block_end == item.num_blocks;
      Accumulator& acc = whole ? thread.whole : partials.part[next_partial++];
      acc.item = slice.item;
      begin_tiles(item, acc, thread);
      ops_.begin(thread.tiles[0]);
      const std::byte* block = regions(item, slice.block_begin);
      for (int32_t b = slice.block_begin; b < slice.block_end; ++b) {
        const std::byte* next_block =
            b + 1 < slice.block_end ? regions(item, b + 1)
            : s + 1 < slices.size() ? regions(plan.items()[slices[s + 1].item], slices[s + 1].block_begin)
                                    : block;
        const AttendRequest& request = requests_[item.request];
        const int32_t index = item.first_block + b;
        const int32_t tokens = std::min(request.kv_len - index * geometry_.block_size, geometry_.block_size);
        const int32_t position =
            rule_.needs_positions() ? block_position(request, index, geometry_.block_size) : 0;
        for (int32_t head = 0; head < item.num_kv_heads; ++head) {
          const std::byte* region = block + head * shape_.region_bytes();
          thread.tiles[head].block_position = position;
          const bool last = head + 1 == item.num_kv_heads;
          ops_.attend_block(thread.tiles[head], region, last ? next_block : region + shape_.region_bytes(),
                            tokens);
        }
        block = next_block;
        threads.advance(thread_index);
        if (threads.cancelled()) break;
      }
      ops_.end();
      if (threads.cancelled()) return;
      if (whole) write(item, acc);
    }
  }

  void merge(const AttendPlan& plan, std::vector<Partials>& pieces) const {
    Accumulator* open = nullptr;  // the parts of an item follow one another in the order of the pieces
    const auto close = [&] {
      if (open != nullptr) write(plan.items()[open->item], *open);
    };
    for (Partials& piece : pieces) {
      for (Accumulator& part : piece.part) {
        if (part.item < 0) continue;
        if (open != nullptr && open->item == part.item) {
          merge_rows(plan.items()[part.item], *open, part);
        } else {
          close();
          open = &part;
        }
      }
    }
    close();
  }

  // An item whose rows see nothing.
  void write_empty(const RowItem& item) const {
    for_each_row(item, [&](size_t row, size_t) {
      std::memset(out_ + row * out_row_bytes_, 0, out_row_bytes_);
      if (lse_ == nullptr) return;
      lse_[row] = row < num_complete_rows_ ? rule_.sinks[row % geometry_.num_heads] : kNegInf;
    });
  }

 private:
  // The item's first region of one of its blocks; those of its other KV heads follow.
  const std::byte* regions(const RowItem& item, int32_t block) const {
    return layer_.block(requests_[item.request].block_table[item.first_block + block]) +
           item.kv_head_begin * shape_.region_bytes();
  }

  // Index of an item's row among the [tokens, heads] of q, out and lse.
  size_t row_index(const RowItem& item, int32_t head, int32_t row) const {
    const int32_t r = item.row_begin + row;
    return static_cast<size_t>(requests_[item.request].query_start + r / group_) * geometry_.num_heads +
           (item.kv_head_begin + head) * group_ + r % group_;
  }

  // First row of a KV head in the item's state: every head begins on the variant's granule.
  size_t state_row(const RowItem& item, int32_t head) const {
    return static_cast<size_t>(head) *
           ((item.rows + ops_.row_granule - 1) / ops_.row_granule * ops_.row_granule);
  }

  void begin_tiles(const RowItem& item, const Accumulator& acc, ThreadScratch& thread) const {
    const size_t width = shape_.stored_head_size, width_v = shape_.stored_head_size_v;
    if (rule_.needs_positions()) place_rows(item, thread);
    thread.tiles.clear();
    for (int32_t head = 0; head < item.num_kv_heads; ++head) {
      const size_t first = state_row(item, head);
      std::byte* queries = thread.queries + first * width * ops_.query_bytes;
      for (int32_t r = 0; r < item.rows; ++r)
        ops_.pack_row(q_ + row_index(item, head, r) * q_row_bytes_, geometry_.head_size, scale_log2_,
                      queries + r * width * ops_.query_bytes);
      float* out = acc.out + first * width_v;
      std::memset(out, 0, item.rows * width_v * sizeof(float));
      std::fill_n(acc.max + first, item.rows, kNegInf);
      std::fill_n(acc.sum + first, item.rows, 0.0f);
      thread.tiles.push_back({item.rows, shape_.stored_head_size, shape_.stored_head_size_v,
                              shape_.stored_block_size, scale_log2_, shape_.latent, shape_.key_bytes(),
                              shape_.region_bytes(), queries, thread.weights, thread.values, out,
                              acc.max + first, acc.sum + first, row_rule(item, head, thread), 0});
    }
  }

  // Where an item's rows are, what they see and how steeply their scores fall.
  void place_rows(const RowItem& item, ThreadScratch& thread) const {
    thread.positions.clear();
    thread.first_seen.clear();
    thread.slopes_log2.clear();
    for (int32_t r = 0; r < item.rows; ++r) {
      const int64_t position = int64_t{requests_[item.request].position} + (item.row_begin + r) / group_;
      thread.positions.push_back(static_cast<int32_t>(position));
      thread.first_seen.push_back(static_cast<int32_t>(rule_.first_seen(position)));
    }
    if (rule_.alibi_slopes.empty()) return;
    for (int32_t head = 0; head < item.num_kv_heads; ++head)
      for (int32_t r = 0; r < item.rows; ++r)
        thread.slopes_log2.push_back(kLog2E *
                                     rule_.alibi_slopes[row_index(item, head, r) % geometry_.num_heads]);
  }

  RowRule row_rule(const RowItem& item, int32_t head, const ThreadScratch& thread) const {
    const float* slopes = thread.slopes_log2.data() + static_cast<size_t>(head) * item.rows;
    return {.plain = rule_.soft_cap == 0 && !rule_.needs_positions(),
            .soft_cap_log2 = rule_.soft_cap * kLog2E,
            .positions = thread.positions.data(),
            .first_seen = rule_.hides() ? thread.first_seen.data() : nullptr,
            .slopes_log2 = rule_.alibi_slopes.empty() ? nullptr : slopes};
  }

  template <class Function>
  void for_each_row(const RowItem& item, Function function) const {
    for (int32_t head = 0; head < item.num_kv_heads; ++head)
      for (int32_t r = 0; r < item.rows; ++r) function(row_index(item, head, r), state_row(item, head) + r);
  }

  // Log-sum-exp merge: rescale both parts to the larger maximum and add.
  void merge_rows(const RowItem& item, Accumulator& into, const Accumulator& from) const {
    const size_t width = shape_.stored_head_size_v;
    for_each_row(item, [&](size_t, size_t r) {
      const float max = std::max(into.max[r], from.max[r]);
      const float reference = max == kNegInf ? 0.0f : max;
      const float a = std::exp2(into.max[r] - reference), b = std::exp2(from.max[r] - reference);
      into.max[r] = max;
      into.sum[r] = into.sum[r] * a + from.sum[r] * b;
      float* x = into.out + r * width;
      const float* y = from.out + r * width;
      for (size_t d = 0; d < width; ++d) x[d] = x[d] * a + y[d] * b;
    });
  }

  void write(const RowItem& item, const Accumulator& acc) const {
    for_each_row(item, [&](size_t row, size_t r) {
      float max = acc.max[r], sum = acc.sum[r], shrink = 1.0f;
      if (row < num_complete_rows_) {
        const float sink = rule_.sinks[row % geometry_.num_heads] * kLog2E;
        const float larger = std::max(max, sink);
        shrink = std::exp2(max - larger);
        sum = sum * shrink + std::exp2(sink - larger);
        max = larger;
      }
      // A sum of 0 is a row whose every score is -inf.
      const float factor = sum == 0.0f ? 0.0f : shrink / sum;
      ops_.store_row(acc.out + r * shape_.stored_head_size_v, geometry_.head_size_v, factor,
                     out_ + row * out_row_bytes_);
      if (lse_ != nullptr) lse_[row] = (max + std::log2(sum)) * kLn2;
    });
  }

  const AttentionGeometry& geometry_;
  const BlockShape& shape_;
  const RowOps& ops_;
  const int32_t group_;
  const size_t q_row_bytes_, out_row_bytes_;
  const LayerPool layer_;
  const std::byte* q_;
  const AttendRequest* requests_;
  const ScoreRule& rule_;
  const size_t num_complete_rows_;  // of [tokens, heads], whose sinks are counted here; 0 without sinks
  const float scale_log2_;
  std::byte* out_;
  float* lse_;
};

BlockShape make_shape(const AttentionGeometry& geometry, BlockLayout layout, const RowOps& ops) {
  return {layout,
          element_size(geometry.dtype),
          geometry.head_size,
          geometry.head_size_v,
          round_up(geometry.head_size, ops.size_granule),
          round_up(geometry.head_size_v, ops.size_granule),
          round_up(geometry.block_size, ops.size_granule),
          geometry.latent};
}

// A row of K, V and state of this many elements in all is what a variant's max_rows is for.
constexpr int32_t kUsualWidth = 512;

int32_t most_rows(const BlockShape& shape, const RowOps& ops) {
  // Wider rows are worth it where all query heads share what is read, and repacked, once for each tile.
  if (shape.latent) return ops.max_rows;
  const int32_t width = std::max(kUsualWidth, shape.stored_head_size + shape.stored_head_size_v);
  return ops.max_rows * kUsualWidth / width / ops.row_granule * ops.row_granule;
}

}  // namespace

PagedAttention::PagedAttention(const AttentionGeometry& geometry, Isa isa, BlockLayout layout,
                               const RowOps& ops)
    : geometry_(geometry),
      isa_(isa),
      shape_(make_shape(geometry, layout, ops)),
      max_rows_(most_rows(shape_, ops)),
      ops_(ops) {}

void PagedAttention::append(LayerPool layer, const void* k, const void* v, const int64_t* slot_mapping,
                            int32_t num_tokens, ThreadPool& threads) const {
  const int64_t block_size = geometry_.block_size;
  const size_t k_bytes = geometry_.head_size * shape_.element_size;
  const size_t v_bytes = shape_.latent ? 0 : geometry_.head_size_v * shape_.element_size;
  const size_t k_stride = k_bytes * geometry_.num_kv_heads, v_stride = v_bytes * geometry_.num_kv_heads;
  const auto num_threads = static_cast<uint32_t>(threads.size());
  const auto* keys = static_cast<const std::byte*>(k);
  const auto* values = static_cast<const std::byte*>(v);
  threads.run([&](int thread) {
    for (int32_t t = 0; t < num_tokens;) {
      const int64_t slot = slot_mapping[t];
      if (slot < 0) {
        ++t;
        continue;
      }
      const int64_t block = slot / block_size;
      const auto offset = static_cast<int32_t>(slot % block_size);
      int32_t count = 1;  // tokens that lie one after another in this block
      while (t + count < num_tokens && slot_mapping[t + count] == slot + count && offset + count < block_size)
        ++count;
      std::byte* region = layer.block(block);
      for (int32_t head = 0; head < geometry_.num_kv_heads; ++head, region += shape_.region_bytes()) {
        // A region always belongs to the same thread, so zeroing it cannot race with other tokens of the
        // block.
        const uint32_t owner =
            static_cast<uint32_t>(block * geometry_.num_kv_heads + head) * 0x9E3779B1u >> 16;
        if (owner % num_threads != static_cast<uint32_t>(thread)) continue;
        if (offset == 0) std::memset(region, 0, shape_.region_bytes());
        store_tokens(shape_, region, offset, count, {keys + t * k_stride + head * k_bytes, k_stride},
                     {values + t * v_stride + head * v_bytes, v_stride});
      }
      t += count;
      threads.advance(thread);
    }
  });
}

void PagedAttention::attend(LayerPool layer, const void* q, const AttendRequest* requests,
                            int32_t num_requests, const ScoreRule& rule, int32_t num_complete_tokens,
                            void* out, float* lse, ThreadPool& threads) const {
  const Attend attend(geometry_, shape_, ops_, layer, q, requests, rule, num_complete_tokens, out, lse);
  const int num_threads = threads.size();
  const AttendPlan plan(geometry_, requests, num_requests, rule, num_threads, max_rows_, ops_.row_granule);
  for (const RowItem& item : plan.items())
    if (item.num_blocks == 0) attend.write_empty(item);
  if (plan.empty()) return;
  static thread_local Workspace workspace;  // the caller's; the pool's threads work in it
  Workspace& shared = workspace;
  shared.prepare(ops_, num_threads, plan, shape_);
  std::atomic<int32_t> next_piece{0};
  threads.run([&](int thread) {
    int32_t piece;
    while ((piece = next_piece.fetch_add(1, std::memory_order_relaxed)) < plan.num_pieces())
      attend.run(plan, piece, shared.threads[thread], shared.pieces[piece], threads, thread);
  });
  attend.merge(plan, shared.pieces);
}

}  // namespace lamina
