// The memory that attend calls work in: running softmax states, packed queries and weights of every thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "kernel/attend_plan.h"
#include "kernel/block_layout.h"
#include "kernel/row_ops.h"

namespace lamina {

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
  // By row of the item at hand, see RowRule; the first two are the same for all KV heads.
  std::vector<int32_t> positions, first_seen;
  std::vector<float> slopes_log2;
  Accumulator whole;
  std::byte* queries;
  float* weights;
  std::byte* values;
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
    const size_t rows = plan.widest_item();
    const size_t out_bytes = lines(rows * shape.stored_head_size_v * sizeof(float));
    const size_t row_bytes = lines(rows * sizeof(float));
    const size_t state_bytes = out_bytes + 2 * row_bytes;
    const size_t query_bytes = lines(rows * shape.stored_head_size * ops.query_bytes);
    const size_t weights_bytes = lines(ops.weights_bytes(shape.stored_block_size));
    const size_t values_bytes = shape.latent && ops.repacks_values
                                    ? shape.element_size * shape.stored_head_size_v * shape.stored_block_size
                                    : 0;
    const size_t thread_bytes = query_bytes + weights_bytes + values_bytes;
    threads.resize(num_threads);
    pieces.resize(plan.num_pieces());
    const size_t states = threads.size() + 2 * pieces.size();
    std::byte* at = scratch.reserve(states * state_bytes + threads.size() * thread_bytes);
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
      thread.values = take(values_bytes);
    }
    for (Partials& piece : pieces)
      for (Accumulator& part : piece.part) take_state(part);
  }
};

}  // namespace lamina
