// What both ends of the exchange must know of the model's attention.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel/attention_geometry.h"

namespace lamina {

struct ModelGeometry {
  AttentionGeometry attention;  // the same in all layers
  std::vector<float> scales;    // softmax scale of each layer
  int32_t num_layers() const { return static_cast<int32_t>(scales.size()); }
  size_t q_row_bytes() const {  // of one token's query, and of its output
    return static_cast<size_t>(attention.num_heads) * attention.head_size * element_size(attention.dtype);
  }
  size_t kv_row_bytes() const {  // of one token's key, and of its value
    return static_cast<size_t>(attention.num_kv_heads) * attention.head_size * element_size(attention.dtype);
  }
  size_t lse_row_bytes() const { return static_cast<size_t>(attention.num_heads) * sizeof(float); }
};

}  // namespace lamina
