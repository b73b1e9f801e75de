// How K and V lie inside a KV block, and how tokens get there.
#include "kernel/block_layout.h"

#include <algorithm>
#include <cstring>

namespace lamina {
namespace {

// dst[i][column + t] = src[t][i] for t < tokens: a [length][16] panel from tokens that are `stride` bytes
// apart.
template <class Element>
void store_columns(Element* panel, int32_t column, int32_t tokens, const std::byte* src, size_t stride,
                   int32_t length) {
  if (tokens == 16) {  // a whole panel: in squares that stay in registers and in the L1 cache
    for (int32_t i0 = 0; i0 < length; i0 += 8) {
      for (int32_t t = 0; t < 16; ++t) {
        Element row[8];
        std::memcpy(row, src + t * stride + i0 * sizeof(Element), sizeof(row));
        for (int32_t i = 0; i < 8; ++i) panel[(i0 + i) * 16 + t] = row[i];
      }
    }
    return;
  }
  for (int32_t t = 0; t < tokens; ++t) {
    const std::byte* token = src + t * stride;
    for (int32_t i = 0; i < length; ++i)
      std::memcpy(panel + i * 16 + column + t, token + i * sizeof(Element), sizeof(Element));
  }
}

template <class Element>
void store_panels(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens, TokenRows k,
                  TokenRows v) {
  auto* keys = reinterpret_cast<Element*>(region);
  auto* values = reinterpret_cast<Element*>(region + shape.key_bytes());
  for (int32_t t = 0; t < num_tokens;) {
    const int32_t column = (offset + t) % 16, count = std::min(16 - column, num_tokens - t);
    store_columns(keys + static_cast<size_t>(offset + t - column) * shape.head_size, column, count,
                  k.token(t), k.stride, shape.head_size);
    t += count;
  }
  for (int32_t t = 0; t < num_tokens; ++t)
    for (int32_t d = 0; d < shape.head_size_v; d += 16)
      std::memcpy(values + static_cast<size_t>(d) * shape.stored_block_size + (offset + t) * 16,
                  v.token(t) + d * sizeof(Element), 16 * sizeof(Element));
}

void store_tiles(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens, TokenRows k,
                 TokenRows v) {
  constexpr int32_t kTileDwords = 256;
  const int32_t padded = shape.stored_head_size, pairs = shape.head_size / 2;
  auto* keys = reinterpret_cast<uint32_t*>(region);
  for (int32_t t = 0; t < num_tokens;) {
    const int32_t token = offset + t, column = token % 16, count = std::min(16 - column, num_tokens - t);
    for (int32_t pair = 0; pair < pairs; pair += 16) {
      const int32_t tile = (token / 32 * (padded / 32) + pair / 16) * 2 + token / 16 % 2;
      store_columns(keys + tile * kTileDwords, column, count, k.token(t) + pair * sizeof(uint32_t), k.stride,
                    std::min(16, pairs - pair));
    }
    t += count;
  }
  if (shape.latent) return;
  auto* values = reinterpret_cast<uint16_t*>(region + shape.key_bytes());
  for (int32_t t = 0; t < num_tokens;) {
    const int32_t token = offset + t;
    const bool both = token % 2 == 0 && t + 1 < num_tokens;
    for (int32_t d = 0; d < shape.head_size_v; d += 16) {
      const int32_t tile = (d / 32 * (shape.stored_block_size / 32) + token / 32) * 2 + d / 16 % 2;
      uint16_t* row = values + tile * kTileDwords * 2 + token % 32 / 2 * 32;
      uint16_t even[16], odd[16];
      std::memcpy(even, v.token(t) + d * sizeof(uint16_t), sizeof(even));
      if (both) {
        std::memcpy(odd, v.token(t + 1) + d * sizeof(uint16_t), sizeof(odd));
        for (int32_t i = 0; i < 16; ++i) {
          row[2 * i] = even[i];
          row[2 * i + 1] = odd[i];
        }
      } else {
        for (int32_t i = 0; i < 16; ++i) row[2 * i + token % 2] = even[i];
      }
    }
    t += both ? 2 : 1;
  }
}

void store_rows(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens, TokenRows k) {
  const size_t row_bytes = shape.head_size * shape.element_size;
  for (int32_t t = 0; t < num_tokens; ++t)
    std::memcpy(region + (offset + t) * row_bytes, k.token(t), row_bytes);
}

}  // namespace

void store_tokens(const BlockShape& shape, std::byte* region, int32_t offset, int32_t num_tokens, TokenRows k,
                  TokenRows v) {
  if (shape.layout == BlockLayout::kTiles)
    store_tiles(shape, region, offset, num_tokens, k, v);
  else if (shape.latent)
    store_rows(shape, region, offset, num_tokens, k);
  else if (shape.element_size == 4)
    store_panels<uint32_t>(shape, region, offset, num_tokens, k, v);
  else
    store_panels<uint16_t>(shape, region, offset, num_tokens, k, v);
}

}  // namespace lamina
