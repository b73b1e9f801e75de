// Divides one attend call evenly over the threads: split-KV for decode, row tiles for prefill over context.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel/attention.h"

namespace lamina {

// A tile of query rows of one request and KV head, with all the request's KV blocks to visit.
struct RowItem {
  int32_t request;
  int32_t kv_head;
  int32_t row_begin;  // row = query token * group size + head within the group
  int32_t rows;
  int32_t num_blocks;
  int64_t block_cost;  // relative cost of one block
  int64_t cost_begin;  // of this item in the flattened list
};

// Blocks block_begin .. block_end - 1 of one item.
struct WorkSlice {
  int32_t item;
  int32_t block_begin;
  int32_t block_end;
};

class AttendPlan {
 public:
  // Flattens (request, KV head, row tile); requests without KV are left out.
  AttendPlan(const AttentionGeometry& geometry, const AttendRequest* requests, int32_t num_requests,
             int32_t max_rows);

  const std::vector<RowItem>& items() const { return items_; }
  int32_t widest_tile() const { return widest_tile_; }
  bool empty() const { return items_.empty(); }

  // The work of one thread: a contiguous piece of the flattened list of (item, block), so at most its first and its
  // last slice hold only a part of their item. All pieces together are the whole list.
  void slices(int thread, int num_threads, std::vector<WorkSlice>& out) const;

 private:
  std::vector<RowItem> items_;
  int64_t total_cost_ = 0;
  int32_t widest_tile_ = 0;
};

}  // namespace lamina
