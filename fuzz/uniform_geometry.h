// A model whose layers differ in nothing but their scales.
#pragma once

#include <vector>

#include "wire/model_geometry.h"

namespace lamina::fuzz {

inline ModelGeometry uniform_geometry(const AttentionGeometry& shape, const std::vector<float>& scales) {
  std::vector<LayerSpec> layers;
  for (const float scale : scales) {
    layers.push_back({0, 0, static_cast<int32_t>(layers.size()), shape.num_heads, ScoreRule{scale, 0, 0, 0, {}, {}}, true});
  }
  return {{{shape.block_size, shape.num_kv_heads, shape.head_size, shape.head_size_v, shape.dtype}}, layers};
}

}  // namespace lamina::fuzz
