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
//   The head size is padded with zeros to a multiple of 32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel/attention.h"

namespace lamina {

enum class BlockLayout : uint8_t { kPanels, kTiles };

struct BlockShape {
  BlockLayout layout;
  size_t element_size;
  int32_t head_size;         // of the model
  int32_t stored_head_size;  // with padding
  int32_t block_size;

  // Bytes of one (block, KV head).
  size_t region_bytes() const { return 2 * element_size * stored_head_size * block_size; }
};

// Writes tokens offset .. offset + num_tokens - 1 of one region. k, v: the KV head's first element of the
// first token; tokens are `token_stride` bytes apart.
void store_tokens(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens,
                  const std::byte* k, const std::byte* v, size_t token_stride);

}  // namespace lamina
