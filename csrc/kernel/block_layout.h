// How K and V lie inside a KV block, and how tokens get there.
//
// A block holds one contiguous region per KV head, K first, then V, each in the order in which attention
// reads it, so that a decode step streams through memory. Two layouts:
//
// kPanels, for vector units.
//   K: [block_size / 16][head_size][16 tokens];
//   V: [head_size / 16][block_size][16 dims].
//   Both are panels of 16 columns for the same small matrix product: scores = q K^T, then out += weights V.
// kTiles, for AMX and AVX-512 BF16. 1 KiB tiles of 16 rows x 16 dwords, each two 16-bit values of the
// reduction axis:
//   K: [block_size / 32][head_size / 32][2 tiles of 16 tokens][16 dim pairs][16 tokens][2 dims];
//   V: [head_size / 32][block_size / 32][2 tiles of 16 dims][16 token pairs][16 dims][2 tokens].
//   Head sizes and the block size are padded with zeros to multiples of 32: a block of 16 tokens takes as
//   much memory as one of 32.
// The head size is k's for K and v's for V.
//
// Of a latent cache, whose values are the first elements of its keys, only K is kept:
//   kPanels: token after token, [block_size][head_size], which either product reads as it is;
//   kTiles: K as above. Its V is made, block by block, when it is attended: many rows share that work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel/attention.h"

namespace lamina {

enum class BlockLayout : uint8_t { kPanels, kTiles };

struct BlockShape {
  BlockLayout layout;
  size_t element_size;
  int32_t head_size, head_size_v;                // of the model
  int32_t stored_head_size, stored_head_size_v;  // with padding
  int32_t stored_block_size;                     // with padding
  bool latent;

  // Bytes of K, which V follows, of one (block, KV head).
  size_t key_bytes() const { return element_size * stored_head_size * stored_block_size; }
  // Bytes of one (block, KV head).
  size_t region_bytes() const {
    return latent ? key_bytes() : key_bytes() + element_size * stored_head_size_v * stored_block_size;
  }
};

// One KV head of some tokens: its first element of the first token; tokens are `stride` bytes apart.
struct TokenRows {
  const std::byte* data;
  size_t stride;

  const std::byte* token(int32_t t) const { return data + t * stride; }
};

// Writes tokens offset .. offset + num_tokens - 1 of one region; v is not read of a latent cache.
void store_tokens(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens, TokenRows k,
                  TokenRows v);

}  // namespace lamina
