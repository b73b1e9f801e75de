// How the KV cache is divided over several attention workers, and what that makes of a step.
#pragma once

#include <cstdint>
#include <vector>

#include "wire/model_geometry.h"
#include "wire/step_part.h"
#include "worker/model_worker/step_view.h"

namespace lamina {

struct RowRange {
  size_t first, count;
};

// Where rows of a worker's OUTPUT go.
struct Delivery {
  enum class To {
    kOut,      // as they are, to the rows of these tokens
    kContext,  // as they are, with their LSE, to rows of prefill chunks with context
    kFirst,    // to rows of the merge, as the first of several workers that attended them
    kMerge,    // to rows of the merge, as a later one
  };
  To to;
  size_t row;    // in the OUTPUT
  size_t first;  // at the destination
  size_t count;
};

// Rows that several workers attended, and where they go when all have answered: to kOut or to kContext.
struct MergedRows {
  Delivery::To to;
  size_t row;    // in the merge
  size_t first;  // at the destination
  size_t count;
};

// One worker's part of a step in the layers of a group.
struct WorkerStep : StepPart {
  std::vector<RowRange> q_tokens;   // tokens whose q the worker gets, in the order of its rows
  std::vector<RowRange> kv_tokens;  // tokens whose k, v it gets
  std::vector<Delivery> deliveries;
  bool takes_part() const { return num_rows > 0 || num_tokens() > 0; }
  // Of a layer of the group, at a worker with these rows. A layer without k and v takes no part without rows of q.
  bool takes_part(const LayerRows& rows) const { return num_rows > 0 || (num_tokens() > 0 && rows.k > 0); }
  AttendLayout attend_layout(const LayerRows& rows) const {
    return {num_rows * rows.q, num_tokens() * rows.k, num_tokens() * rows.v};
  }
  OutputLayout output_layout(const LayerRows& rows) const {
    return {num_rows * rows.out, (num_rows - num_rows_without_lse) * rows.lse};
  }
  void clear();
};

// A step in the layers of a group.
struct SplitGroup {
  // One for each worker, or a single one that is the same for all.
  std::vector<WorkerStep> parts;
  std::vector<MergedRows> merged;
  size_t num_merge_rows = 0;
  size_t num_q_rows = 0;  // that anybody attends
  size_t num_context_rows = 0;  // of these, prefill rows
  const WorkerStep& part(size_t worker) const { return parts[parts.size() == 1 ? 0 : worker]; }
};

struct SplitStep {
  std::vector<SplitGroup> groups;
  bool takes_part(size_t worker) const;
  // Of the worker's STEP frame.
  size_t payload_bytes(size_t worker) const;
  void write(size_t worker, std::byte* payload) const;
};

class Partition {
 public:
  // Worker w holds heads[w][c] KV heads of all tokens in cache c, with their query heads, in the model's order of
  // heads; the numbers add up to the cache's KV heads. A latent cache has one KV head, which all workers hold: of it
  // they are query heads, and add up to those of each layer. Blocks have the same ids everywhere.
  static Partition by_heads(ModelGeometry geometry, const std::vector<std::vector<int32_t>>& heads);
  // Worker w holds all heads of num_blocks[w] blocks: those that follow the blocks of the workers before it.
  static Partition by_blocks(ModelGeometry geometry, const std::vector<int32_t>& num_blocks);

  // What a worker has of a layer's heads: its rows, and where they begin in the model's (bytes).
  struct Heads {
    LayerRows rows;
    LayerRows offset;
  };
  size_t num_workers() const { return heads_.size(); }
  const Heads& heads(size_t worker, uint32_t layer) const { return heads_[worker][layer]; }
  const ModelGeometry& geometry() const { return geometry_; }

  // Throws std::invalid_argument for a step that does not add up or, by blocks, names a block that does not exist.
  void split(const StepView& view, SplitStep& into) const;

  // What each worker has to zero, by its own block ids. Throws std::invalid_argument as above.
  std::vector<std::vector<int32_t>> split_blocks(std::span<const int32_t> block_ids) const;
  // What each worker has to copy: source, destination, source, ... Also throws for a pair on two workers: KV blocks do not
  // travel between workers.
  std::vector<std::vector<int32_t>> split_copies(std::span<const int32_t> pairs) const;

 private:
  struct Place {
    size_t worker;
    int32_t block;  // of the worker
  };

  Partition(ModelGeometry geometry, size_t num_workers);
  bool divides_blocks() const { return !first_block_.empty(); }
  Place place(int64_t block) const;
  void split_by_heads(const StepView& view, size_t group, SplitGroup& into) const;
  void split_by_blocks(const StepView& view, size_t group, SplitGroup& into) const;
  size_t owner(std::span<const int32_t> blocks) const;
  void add_request(const StepView& view, size_t group, size_t request, size_t token, SplitGroup& into) const;

  ModelGeometry geometry_;
  std::vector<std::vector<Heads>> heads_;  // by worker and layer
  std::vector<int64_t> first_block_;  // of each worker, and the number of all; empty where the heads are divided
};

}  // namespace lamina
