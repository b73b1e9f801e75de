// Divides one attend call evenly over the threads: split-KV for decode, row tiles for prefill over context.
#include "kernel/attend_plan.h"

#include <algorithm>

namespace lamina {
namespace {

// Reading a block costs about as much as computing this many rows of it (measured: a float32 row is dearer, a bf16
// row on AMX cheaper). Only the balance between threads depends on it.
constexpr int64_t kRowsPerBlockRead = 16;

}  // namespace

AttendPlan::AttendPlan(const AttentionGeometry& geometry, const AttendRequest* requests, int32_t num_requests,
                       int32_t max_rows) {
  const int32_t group = geometry.num_heads / geometry.num_kv_heads;
  for (int32_t r = 0; r < num_requests; ++r) {
    const AttendRequest& request = requests[r];
    if (request.kv_len <= 0) continue;
    const int32_t num_blocks = (request.kv_len + geometry.block_size - 1) / geometry.block_size;
    const int32_t rows = request.query_len * group;
    for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
      for (int32_t begin = 0; begin < rows; begin += max_rows) {
        const int32_t tile = std::min(max_rows, rows - begin);
        const int64_t cost = kRowsPerBlockRead + tile;
        items_.push_back({r, head, begin, tile, num_blocks, cost, total_cost_});
        total_cost_ += cost * num_blocks;
        widest_tile_ = std::max(widest_tile_, tile);
      }
    }
  }
}

void AttendPlan::slices(int thread, int num_threads, std::vector<WorkSlice>& out) const {
  out.clear();
  const int64_t begin = total_cost_ * thread / num_threads, end = total_cost_ * (thread + 1) / num_threads;
  // A block belongs to the thread in whose range its first unit of cost lies.
  const auto first_block_from = [](const RowItem& item, int64_t cost) {
    const int64_t block = (cost - item.cost_begin + item.block_cost - 1) / item.block_cost;
    return static_cast<int32_t>(std::clamp<int64_t>(block, 0, item.num_blocks));
  };
  auto item = std::upper_bound(items_.begin(), items_.end(), begin,
                               [](int64_t cost, const RowItem& i) { return cost < i.cost_begin; });
  if (item != items_.begin()) --item;
  for (; item != items_.end() && item->cost_begin < end; ++item) {
    const int32_t from = first_block_from(*item, begin), to = first_block_from(*item, end);
    if (from < to) out.push_back({static_cast<int32_t>(item - items_.begin()), from, to});
  }
}

}  // namespace lamina
