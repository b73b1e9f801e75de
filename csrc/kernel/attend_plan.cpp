// Divides one attend call over the threads: split-KV for decode, row tiles for prefill over context.
#include "kernel/attend_plan.h"

#include <algorithm>

#include "base/round_up.h"

namespace lamina {
namespace {

// Reading a block costs about as much as computing this many rows of it; only the balance depends on it.
constexpr int64_t kRowsPerBlockRead = 16;
// KV heads are taken together only while this many blocks remain for each thread to share.
constexpr int64_t kBlocksPerThread = 8;
// Every round gives each thread a piece and leaves half of the work; the last takes the rest. The state of a
// partial item has to be kept until the merge, so wide items are cut into fewer pieces.
constexpr int kRounds = 5, kRoundsWide = 2;
constexpr int32_t kWideRows = 128;

struct BlockRange {
  int32_t first, count;
};

// The blocks of a request but those before the first that a query token, counted from the request's first,
// sees. Later query tokens see none of these either.
BlockRange seen_blocks(const AttendRequest& request, int32_t query_token, const ScoreRule& rule,
                       int32_t block_size) {
  // In 64 bits: a length may be close to the largest 32-bit one.
  const auto blocks = static_cast<int32_t>((int64_t{request.kv_len} + block_size - 1) / block_size);
  if (!rule.hides()) return {0, blocks};
  const int64_t first_seen = rule.first_seen(int64_t{request.position} + query_token);
  int32_t first = 0;
  for (; first < blocks; ++first) {
    const int32_t tokens = std::min(block_size, request.kv_len - first * block_size);
    if (int64_t{block_position(request, first, block_size)} + tokens > first_seen) break;
  }
  return {first, blocks - first};
}

}  // namespace

AttendPlan::AttendPlan(const AttentionGeometry& geometry, const AttendRequest* requests, int32_t num_requests,
                       const ScoreRule& rule, int num_threads, int32_t max_rows, int32_t row_granule) {
  add_items(geometry, requests, num_requests, rule, num_threads, max_rows, row_granule);
  cut(num_threads);
}

void AttendPlan::add_items(const AttentionGeometry& geometry, const AttendRequest* requests,
                           int32_t num_requests, const ScoreRule& rule, int num_threads, int32_t max_rows,
                           int32_t row_granule) {
  const int32_t group = geometry.num_heads / geometry.num_kv_heads;
  int64_t all_blocks = 0;
  for (int32_t r = 0; r < num_requests; ++r)
    all_blocks += seen_blocks(requests[r], 0, rule, geometry.block_size).count;
  const int64_t wanted = kBlocksPerThread * num_threads;
  const int64_t divisor =
      num_threads == 1 ? 1 : std::max<int64_t>(1, wanted / std::max<int64_t>(1, all_blocks));
  const int32_t most_heads = std::max<int32_t>(1, geometry.num_kv_heads / divisor);

  for (int32_t r = 0; r < num_requests; ++r) {
    const AttendRequest& request = requests[r];
    const int32_t rows = request.query_len * group;
    const int32_t tile_rows = std::min(rows, max_rows), padded = round_up(tile_rows, row_granule);
    const int32_t heads = std::clamp(max_rows / padded, 1, most_heads);
    widest_item_ = std::max(widest_item_, heads * padded);
    for (int32_t head = 0; head < geometry.num_kv_heads; head += heads) {
      for (int32_t begin = 0; begin < rows; begin += tile_rows) {
        const int32_t item_heads = std::min(heads, geometry.num_kv_heads - head);
        const int32_t item_rows = std::min(tile_rows, rows - begin);
        const int64_t cost = item_heads * (kRowsPerBlockRead + item_rows);
        const BlockRange blocks = seen_blocks(request, begin / group, rule, geometry.block_size);
        items_.push_back(
            {r, head, item_heads, begin, item_rows, blocks.first, blocks.count, cost, total_cost_});
        total_cost_ += cost * blocks.count;
      }
    }
  }
}

void AttendPlan::cut(int num_threads) {
  piece_begin_.push_back(0);
  if (num_threads > 1) {
    int64_t left = total_cost_;
    for (int round = widest_item_ > kWideRows ? kRoundsWide : kRounds; round > 1; --round) {
      const int64_t size = left / (2 * num_threads);
      for (int thread = 0; thread < num_threads; ++thread) piece_begin_.push_back(piece_begin_.back() + size);
      left -= size * num_threads;
    }
    for (int thread = 1; thread < num_threads; ++thread)
      piece_begin_.push_back(piece_begin_.back() + left / num_threads);
  }
  piece_begin_.push_back(total_cost_);
}

void AttendPlan::slices(int32_t piece, std::vector<WorkSlice>& out) const {
  out.clear();
  const int64_t begin = piece_begin_[piece], end = piece_begin_[piece + 1];
  // A block belongs to the piece in whose range its first unit of cost lies.
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
