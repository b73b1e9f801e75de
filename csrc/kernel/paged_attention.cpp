// The paged driver of all variants: addresses blocks, divides the work, merges partial results by LSE.
#include "kernel/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "kernel/attend_plan.h"
#include "kernel/thread_pool.h"

namespace lamina {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Cache-line aligned scratch that only grows, so that a decode step allocates nothing. It starts with
// arbitrary bytes: rows of padding are computed with and thrown away.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  std::byte* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
      size_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }

  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Running softmax state of one item, KV head after KV head; `item` < 0 while unused.
struct Accumulator {
  int32_t item = -1;
  float* out;
  float* max;
  float* sum;
};

// What one thread works in. An item that lies wholly within a piece uses `whole`.
struct alignas(64) ThreadScratch {
  std::vector<WorkSlice> slices;
  std::vector<RowTile> tiles;
  Accumulator whole;
  std::byte* queries;
  float* weights;
};

// Only the first and the last item of a piece can be partial; they wait here for the merge.
struct Partials {
  Accumulator part[2];
};

struct Workspace {
  Scratch scratch;
  std::vector<ThreadScratch> threads;
  std::vector<Partials> pieces;

  void prepare(const RowOps& ops, int num_threads, const AttendPlan& plan, const BlockShape& shape) {
    const auto lines = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const size_t rows = plan.widest_item(), width = shape.stored_head_size;
    const size_t out_bytes = lines(rows * width * sizeof(float)), row_bytes = lines(rows * sizeof(float));
    const size_t state_bytes = out_bytes + 2 * row_bytes;
    const size_t query_bytes = lines(rows * width * ops.query_bytes);
    const size_t weights_bytes = lines(ops.weights_bytes(shape.block_size));
    threads.resize(num_threads);
    pieces.resize(plan.num_pieces());
    const size_t states = threads.size() + 2 * pieces.size();
    std::byte* at = scratch.reserve(states * state_bytes + threads.size() * (query_bytes + weights_bytes));
    const auto take = [&at](size_t bytes) {
      std::byte* taken = at;
      at += bytes;
      return taken;
    };
    const auto take_state = [&](Accumulator& a) {
      a = {-1, reinterpret_cast<float*>(take(out_bytes)), reinterpret_cast<float*>(take(row_bytes)),
           reinterpret_cast<float*>(take(row_bytes))};
    };
    for (ThreadScratch& thread : threads) {
      take_state(thread.whole);
      thread.queries = take(query_bytes);
      thread.weights = reinterpret_cast<float*>(take(weights_bytes));
    }
    for (Partials& piece : pieces)
      for (Accumulator& part : piece.part) take_state(part);
  }
};

// One attend call; `run` for every piece on some thread, then `merge` on the caller's.
class Attend {
 public:
  Attend(const AttentionGeometry& geometry, const BlockShape& shape, const RowOps& ops,
         LayerPool layer, const void* q, const AttendRequest* requests, float scale, void* out,
         float* lse)
      : geometry_(geometry),
        shape_(shape),
        ops_(ops),
        group_(geometry.num_heads / geometry.num_kv_heads),
        row_bytes_(static_cast<size_t>(geometry.head_size) * shape.element_size),
        block_bytes_(layer.stride),
        layer_(layer.data),
        q_(static_cast<const std::byte*>(q)),
        requests_(requests),
        scale_log2_(scale * kLog2E),
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
        const int32_t left = requests_[item.request].kv_len - b * geometry_.block_size;
        const int32_t tokens = std::min(left, geometry_.block_size);
        for (int32_t head = 0; head < item.num_kv_heads; ++head) {
          const std::byte* region = block + head * shape_.region_bytes();
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

  // A request without KV: output 0, LSE -inf.
  void write_empty(const AttendRequest& request) const {
    const size_t first = static_cast<size_t>(request.query_start) * geometry_.num_heads;
    const size_t rows = static_cast<size_t>(request.query_len) * geometry_.num_heads;
    std::memset(out_ + first * row_bytes_, 0, rows * row_bytes_);
    if (lse_ != nullptr) std::fill_n(lse_ + first, rows, kNegInf);
  }

 private:
  // The item's first region of one of its blocks; those of its other KV heads follow.
  const std::byte* regions(const RowItem& item, int32_t block) const {
    return layer_ + static_cast<size_t>(requests_[item.request].block_table[block]) * block_bytes_ +
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
    const size_t width = shape_.stored_head_size;
    thread.tiles.clear();
    for (int32_t head = 0; head < item.num_kv_heads; ++head) {
      const size_t first = state_row(item, head);
      std::byte* queries = thread.queries + first * width * ops_.query_bytes;
      for (int32_t r = 0; r < item.rows; ++r)
        ops_.pack_row(q_ + row_index(item, head, r) * row_bytes_, geometry_.head_size, scale_log2_,
                      queries + r * width * ops_.query_bytes);
      float* out = acc.out + first * width;
      std::memset(out, 0, item.rows * width * sizeof(float));
      std::fill_n(acc.max + first, item.rows, kNegInf);
      std::fill_n(acc.sum + first, item.rows, 0.0f);
      thread.tiles.push_back({item.rows, shape_.stored_head_size, shape_.block_size, scale_log2_,
                              shape_.region_bytes(), queries, thread.weights, out, acc.max + first,
                              acc.sum + first});
    }
  }

  template <class Function>
  void for_each_row(const RowItem& item, Function function) const {
    for (int32_t head = 0; head < item.num_kv_heads; ++head)
      for (int32_t r = 0; r < item.rows; ++r) function(row_index(item, head, r), state_row(item, head) + r);
  }

  // Log-sum-exp merge: rescale both parts to the larger maximum and add.
  void merge_rows(const RowItem& item, Accumulator& into, const Accumulator& from) const {
    const size_t width = shape_.stored_head_size;
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
      // A sum of 0 is a row whose every score is -inf.
      const float factor = acc.sum[r] == 0.0f ? 0.0f : 1.0f / acc.sum[r];
      ops_.store_row(acc.out + r * shape_.stored_head_size, geometry_.head_size, factor,
                     out_ + row * row_bytes_);
      if (lse_ != nullptr) lse_[row] = (acc.max[r] + std::log2(acc.sum[r])) * kLn2;
    });
  }

  const AttentionGeometry& geometry_;
  const BlockShape& shape_;
  const RowOps& ops_;
  const int32_t group_;
  const size_t row_bytes_;
  const size_t block_bytes_;
  const std::byte* layer_;
  const std::byte* q_;
  const AttendRequest* requests_;
  const float scale_log2_;
  std::byte* out_;
  float* lse_;
};

BlockShape make_shape(const AttentionGeometry& geometry, BlockLayout layout, const RowOps& ops) {
  const int32_t stored = (geometry.head_size + ops.head_granule - 1) / ops.head_granule * ops.head_granule;
  return {layout, element_size(geometry.dtype), geometry.head_size, stored, geometry.block_size};
}

}  // namespace

PagedAttention::PagedAttention(const AttentionGeometry& geometry, Isa isa, BlockLayout layout,
                               const RowOps& ops)
    : geometry_(geometry), isa_(isa), shape_(make_shape(geometry, layout, ops)), ops_(ops) {}

void PagedAttention::append(LayerPool layer, const void* k, const void* v, const int64_t* slot_mapping,
                            int32_t num_tokens, ThreadPool& threads) const {
  const int64_t block_size = geometry_.block_size;
  const size_t head_bytes = geometry_.head_size * shape_.element_size;
  const size_t token_bytes = head_bytes * geometry_.num_kv_heads;
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
      std::byte* region = layer.data + block * layer.stride;
      for (int32_t head = 0; head < geometry_.num_kv_heads; ++head, region += shape_.region_bytes()) {
        // A region always belongs to the same thread, so zeroing it cannot race with other tokens of the
        // block.
        const uint32_t owner =
            static_cast<uint32_t>(block * geometry_.num_kv_heads + head) * 0x9E3779B1u >> 16;
        if (owner % num_threads != static_cast<uint32_t>(thread)) continue;
        if (offset == 0) std::memset(region, 0, shape_.region_bytes());
        store_tokens(shape_, region, offset, count, keys + t * token_bytes + head * head_bytes,
                     values + t * token_bytes + head * head_bytes, token_bytes);
      }
      t += count;
      threads.advance(thread);
    }
  });
}

void PagedAttention::attend(LayerPool layer, const void* q, const AttendRequest* requests,
                            int32_t num_requests, const ScoreRule& rule, int32_t, void* out, float* lse,
                            ThreadPool& threads) const {
  const Attend attend(geometry_, shape_, ops_, layer, q, requests, rule.scale, out, lse);
  for (int32_t r = 0; r < num_requests; ++r)
    if (requests[r].kv_len <= 0) attend.write_empty(requests[r]);
  const int num_threads = threads.size();
  const AttendPlan plan(geometry_, requests, num_requests, num_threads, ops_.max_rows, ops_.row_granule);
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
