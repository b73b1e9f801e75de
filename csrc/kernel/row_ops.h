// The seam between the paged driver and an instruction set: what a variant does to rows and one KV block.
//
// Plain data and function pointers only: the files in isa/ are compiled with flags of their own, and any
// inline function or template with external linkage that they shared with the rest could be the copy that the
// linker keeps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

// What scores undergo after the scale, by row: see ScoreRule. In units of log2, as all that follows.
struct RowRule {
  bool plain;                 // nothing: the rest is unused
  float soft_cap_log2;        // soft-cap * log2(e), or 0
  const int32_t* positions;   // [rows], of the query token
  const int32_t* first_seen;  // [rows], position of the first key that the row sees; or null: all
  const float* slopes_log2;   // [rows], ALiBi slope * log2(e); or null
};

// Query rows of one KV head on their way over the KV blocks. A row is one (query token, query head of the
// group). The running maximum and everything derived from it is in units of log2, so that exponentials are
// powers of two.
struct RowTile {
  int32_t rows;
  int32_t head_size, head_size_v, block_size;  // as stored: padded where the variant pads
  float scale_log2;     // softmax scale * log2(e), where the variant does not put it into the packed rows
  bool latent;          // V is the first elements of K, which alone is kept: see block_layout.h
  size_t key_bytes;     // of K of one (block, KV head), which V follows unless it is latent
  size_t region_bytes;  // of one (block, KV head)
  void* queries;        // [rows rounded up to row_granule, head_size], packed by the variant
  float* weights;       // scratch of weights_bytes()
  std::byte* values;    // scratch for V of a latent block, where the variant repacks it
  float* out;           // [rows rounded up to row_granule, head_size_v], not normalised
  float* max;           // [rows]
  float* sum;           // [rows], softmax denominator relative to max
  RowRule rule;
  int32_t block_position;  // of the first token of the block at hand, where the rule needs positions
};

struct RowOps {
  int32_t row_granule;   // rows are allocated in multiples of this
  int32_t max_rows;      // most rows of one tile: its state and one KV block stay in the L2 cache
  int32_t size_granule;  // head sizes and the block size are padded to multiples of this
  size_t query_bytes;    // of one element of a packed row
  bool repacks_values;   // of a latent block, all of V
  size_t (*weights_bytes)(int32_t block_size);
  // Packs one row of q, [head_size] in the KV dtype, padding included.
  void (*pack_row)(const void* q, int32_t head_size, float scale_log2, void* packed);
  // Writes factor * row, [head_size_v], in the KV dtype.
  void (*store_row)(const float* row, int32_t head_size_v, float factor, void* out);
  // Bracket all attend_block calls of one tile on one thread.
  void (*begin)(const RowTile& tile);
  void (*end)();
  // Folds the first num_tokens (>= 1) tokens of a block into the tile. `next` is the region that follows on
  // this thread, for prefetching.
  void (*attend_block)(const RowTile& tile, const std::byte* region, const std::byte* next,
                       int32_t num_tokens);
};

}  // namespace lamina
