// Attention with AMX: bfloat16 tiles for both products, float32 sums and softmax.
#include <immintrin.h>

#include "kernel/isa/prefetch.h"
#include "kernel/isa/tile_rows.h"
#include "kernel/isa/variants.h"

namespace lamina {
namespace {

// The softmax reads no KV, yet memory must not idle meanwhile: every K tile leaves it one line to prefetch.
constexpr int kLinesPerKeyTile = kTileLines - 1;
constexpr int kTileRows = 16;              // query rows of one tile
static_assert(kRowStep == 2 * kTileRows);  // two row tiles share every K and V tile that is loaded

// Tile registers: 0..3 sums (row tile * 2 + column tile), 4..5 rows, 6..7 K or V.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not see what the tile instructions read (GCC's intrinsics are assembly without a memory
// operand): everything written through `p` has to be in memory before the first of them.
inline void finish_stores(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// A tile of few rows (decode) is configured with just these: the sums take less to load and store.
void begin(const RowTile& tile) {
  TileConfig config;
  if (tile.rows < kTileRows)
    for (int i : {0, 1, 4}) config.rows[i] = static_cast<uint8_t>(tile.rows);
  finish_stores(&config);
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// Adds one or two row tiles times two K or V tiles side by side, over the whole reduction axis.
template <int RowTiles, int PrefetchLines>
inline void multiply(const std::byte* rows, size_t row_bytes, const std::byte* tiles, int pairs,
                     Prefetcher& prefetch) {
  for (int i = 0; i < pairs; ++i) {
    const std::byte* column = tiles + i * 2 * kTileBytes;
    _tile_loadd(4, rows + i * 64, row_bytes);
    if (RowTiles == 2) _tile_loadd(5, rows + kTileRows * row_bytes + i * 64, row_bytes);
    _tile_loadd(6, column, 64);
    prefetch.advance(PrefetchLines);
    _tile_dpbf16ps(0, 4, 6);
    if (RowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, column + kTileBytes, 64);
    prefetch.advance(PrefetchLines);
    _tile_dpbf16ps(1, 4, 7);
    if (RowTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

template <int RowTiles>
inline void store_sums(float* to, size_t row_floats) {
  _tile_stored(0, to, row_floats * sizeof(float));
  _tile_stored(1, to + 16, row_floats * sizeof(float));
  if (RowTiles == 2) {
    _tile_stored(2, to + kTileRows * row_floats, row_floats * sizeof(float));
    _tile_stored(3, to + kTileRows * row_floats + 16, row_floats * sizeof(float));
  }
}

template <int RowTiles>
inline void load_sums(const float* from, size_t row_floats) {
  _tile_loadd(0, from, row_floats * sizeof(float));
  _tile_loadd(1, from + 16, row_floats * sizeof(float));
  if (RowTiles == 2) {
    _tile_loadd(2, from + kTileRows * row_floats, row_floats * sizeof(float));
    _tile_loadd(3, from + kTileRows * row_floats + 16, row_floats * sizeof(float));
  }
}

// Rows first .. first + 16 * RowTiles - 1 against one block.
template <int RowTiles, bool Prefetch>
void attend_rows(const RowTile& tile, int first, const std::byte* region, const std::byte* values,
                 int num_tokens, Prefetcher& prefetch) {
  const size_t width = tile.head_size_v, block_size = tile.block_size;
  const size_t query_bytes = tile.head_size * sizeof(BFloat16);
  const int key_pairs = tile.head_size / 32, value_pairs = tile.head_size_v / 32;
  const int token_pairs = (num_tokens + kPairTokens - 1) / kPairTokens;
  const auto* queries = static_cast<const std::byte*>(tile.queries) + first * query_bytes;
  float* scores = tile.weights;
  for (int t = 0; t < token_pairs; ++t) {
    _tile_zero(0);
    _tile_zero(1);
    if (RowTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    multiply<RowTiles, Prefetch ? kLinesPerKeyTile : 0>(
        queries, query_bytes, region + t * key_pairs * 2 * kTileBytes, key_pairs, prefetch);
    store_sums<RowTiles>(scores + t * kPairTokens, block_size);
  }

  const int rows = tile.rows - first < RowTiles * kTileRows ? tile.rows - first : RowTiles * kTileRows;
  const int spare_lines = Prefetch ? token_pairs * key_pairs * 2 * (kTileLines - kLinesPerKeyTile) : 0;
  for (int r = 0; r < rows; ++r) {
    prefetch.advance(spare_lines * (r + 1) / rows - spare_lines * r / rows);
    weigh_row(tile, first, r, num_tokens);
  }
  const std::byte* weights = bf16_weights(tile);
  const size_t weight_bytes = block_size * sizeof(BFloat16);
  finish_stores(weights);

  for (int d = 0; d < value_pairs; ++d) {
    float* out = tile.out + first * width + d * 32;
    load_sums<RowTiles>(out, width);
    multiply<RowTiles, Prefetch ? kTileLines : 0>(
        weights, weight_bytes, values + d * block_size / kPairTokens * 2 * kTileBytes, token_pairs, prefetch);
    store_sums<RowTiles>(out, width);
  }
}

void attend_block(const RowTile& tile, const std::byte* region, const std::byte* next, int32_t num_tokens) {
  Prefetcher prefetch(region, tile.region_bytes, next);
  const std::byte* values = values_of(tile, region, (num_tokens + kPairTokens - 1) / kPairTokens);
  if (tile.rows <= kTileRows) return attend_rows<1, true>(tile, 0, region, values, num_tokens, prefetch);
  attend_rows<2, true>(tile, 0, region, values, num_tokens, prefetch);
  int first = kRowStep;
  for (; first + kTileRows < tile.rows; first += kRowStep)
    attend_rows<2, false>(tile, first, region, values, num_tokens, prefetch);
  if (first < tile.rows) attend_rows<1, false>(tile, first, region, values, num_tokens, prefetch);
}

constexpr RowOps kOps{.row_granule = kTileRows,
                      .max_rows = 256,
                      .size_granule = 32,
                      .query_bytes = sizeof(BFloat16),
                      .repacks_values = true,
                      .weights_bytes = weights_bytes,
                      .pack_row = pack_row,
                      .store_row = store_row,
                      .begin = begin,
                      .end = end,
                      .attend_block = attend_block};

}  // namespace

const RowOps& amx_row_ops() { return kOps; }

}  // namespace lamina
