// What both ends of the exchange must know of the model's attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernel/attention_geometry.h"
#include "kernel/score_rule.h"

namespace lamina {

// What a layer keeps of a token.
struct CacheSpec {
  int32_t block_size, num_kv_heads, head_size, head_size_v;
  DType dtype;
  bool latent = false;  // v is the first head_size_v elements of k, which alone is kept; one KV head
};

// One attention layer.
struct LayerSpec {
  int32_t cache;     // its CacheSpec, among those of the model
  int32_t group;     // layers of a group have one block table per request
  int32_t position;  // within the group; layers of several groups at one position overlay the same memory
  int32_t num_heads;
  ScoreRule rule;
  bool stores = true;  // false: it attends what the layer of its group and position stores
};

// Bytes of one token's rows in one layer.
struct LayerRows {
  size_t q = 0, k = 0, v = 0, out = 0, lse = 0;  // k and v: 0 where the layer does not store; v: 0 of a latent cache
  LayerRows() = default;
  LayerRows(const AttentionGeometry& geometry, bool stores);
  LayerRows& operator+=(const LayerRows& other) {
    q += other.q, k += other.k, v += other.v, out += other.out, lse += other.lse;
    return *this;
  }
};

// How much of a request's context the layers of a group see together. A query at position p sees no key before
// first_seen(p).
struct Reach {
  int32_t window = 0, chunk = 0;  // 0: no limit
  int32_t first_seen(int32_t position) const {
    const int32_t by_window = window == 0 ? 0 : std::max(0, position - window + 1);
    return std::max(by_window, chunk == 0 ? 0 : position / chunk * chunk);
  }
  // Of the query tokens of a prefill chunk behind this much context, how many see some of it: the first ones.
  int32_t context_rows(int32_t context_len, int32_t query_len) const {
    if (context_len == 0) return 0;
    int64_t rows = query_len;
    if (window > 0) rows = std::min<int64_t>(rows, window - 1);
    if (chunk > 0) rows = std::min(rows, (int64_t{context_len} + chunk - 1) / chunk * chunk - context_len);
    return static_cast<int32_t>(rows);
  }
};

struct LayerGeometry : LayerSpec {
  AttentionGeometry attention;
  LayerRows rows;
};

struct GroupGeometry {
  int32_t block_size = 0;
  Reach reach;
  bool has_positions = false;     // a layer's rule needs them
  int32_t heads_per_kv_head = 1;  // in the layer that has the most
};

class ModelGeometry {
 public:
  // Throws std::invalid_argument, naming value and limit, for what does not fit together. Shapes that no kernel serves
  // are refused by make_attention_kernel().
  ModelGeometry(std::vector<CacheSpec> caches, std::vector<LayerSpec> layers);

  const std::vector<CacheSpec>& caches() const { return caches_; }
  const std::vector<LayerGeometry>& layers() const { return layers_; }
  const std::vector<GroupGeometry>& groups() const { return groups_; }
  int32_t num_layers() const { return static_cast<int32_t>(layers_.size()); }
  int32_t num_positions() const { return num_positions_; }

 private:
  void check_places() const;

  std::vector<CacheSpec> caches_;
  std::vector<LayerGeometry> layers_;
  std::vector<GroupGeometry> groups_;
  int32_t num_positions_ = 0;
};

}  // namespace lamina
