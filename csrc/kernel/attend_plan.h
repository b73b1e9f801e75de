// Divides one attend call over the threads: split-KV for decode, row tiles for prefill over context.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel/attention.h"

namespace lamina {

// A tile of query rows of one request, for one or several KV heads, with the KV blocks to visit: all of the
// request's but those at the front that none of the rows sees.
//
// Decode has few rows per head and takes as many heads together as it can: a block is then read from front to
// back. (Measured: a core reads 18 GB/s linearly, 14 in chunks of 64 KiB, in random order on huge pages.)
struct RowItem {
  int32_t request;
  int32_t kv_head_begin;
  int32_t num_kv_heads;
  int32_t row_begin;  // row = query token * group size + head within the group
  int32_t rows;       // for each KV head
  int32_t first_block;
  int32_t num_blocks;  // 0: the rows see nothing
  int64_t block_cost;  // relative cost of one block
  int64_t cost_begin;  // of this item in the flattened list
};

// Blocks block_begin .. block_end - 1 of one item, counted from its first.
struct WorkSlice {
  int32_t item;
  int32_t block_begin;
  int32_t block_end;
};

class AttendPlan {
 public:
  // Flattens (request, KV heads, row tile). An item has at most `max_rows` rows over all its KV heads, where
  // those of each head count in multiples of `row_granule`.
  AttendPlan(const AttentionGeometry& geometry, const AttendRequest* requests, int32_t num_requests,
             const ScoreRule& rule, int num_threads, int32_t max_rows, int32_t row_granule);

  const std::vector<RowItem>& items() const { return items_; }
  // No item has a block.
  bool empty() const { return total_cost_ == 0; }
  // Most rows of one item over all its KV heads, with the padding.
  int32_t widest_item() const { return widest_item_; }

  // Threads take pieces one after another, the large ones first: who is disturbed takes fewer.
  int32_t num_pieces() const { return static_cast<int32_t>(piece_begin_.size()) - 1; }
  // A piece is a contiguous part of the flattened list of (item, block), so at most its first and its last
  // slice hold only a part of their item. All pieces together are the whole list.
  void slices(int32_t piece, std::vector<WorkSlice>& out) const;

 private:
  void add_items(const AttentionGeometry& geometry, const AttendRequest* requests, int32_t num_requests,
                 const ScoreRule& rule, int num_threads, int32_t max_rows, int32_t row_granule);
  void cut(int num_threads);

  std::vector<RowItem> items_;
  std::vector<int64_t> piece_begin_;  // in units of cost, and the end of the last piece
  int64_t total_cost_ = 0;
  int32_t widest_item_ = 0;
};

// Position of the first token of one of a request's blocks.
inline int32_t block_position(const AttendRequest& request, int32_t block, int32_t block_size) {
  return request.block_positions != nullptr ? request.block_positions[block] : block * block_size;
}

}  // namespace lamina
