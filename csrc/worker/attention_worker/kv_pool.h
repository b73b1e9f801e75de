// The memory of an attention worker's KV blocks, over all layers, and the kernels that know what lies in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel/arena.h"
#include "kernel/attention.h"
#include "wire/model_geometry.h"

namespace lamina {

// Bytes of the pool that one block id takes: over all positions, the largest block of the layers that overlay there.
// Throws std::invalid_argument for a geometry that no kernel supports, naming the value and the limit.
size_t kv_block_bytes(const ModelGeometry& geometry);

class KvPool {
 public:
  // Zeroed. Throws as kv_block_bytes(), and std::bad_alloc where the system refuses the memory.
  KvPool(const ModelGeometry& geometry, int32_t num_blocks);

  const AttentionKernel& kernel(uint32_t layer) const { return *layers_[layer].kernel; }
  LayerPool layer(uint32_t layer) const { return positions_[layers_[layer].position]; }
  size_t num_positions() const { return positions_.size(); }
  size_t size() const { return arena_.size(); }

  // All that is kept of a block at one position, whichever layers it is of.
  void zero_block(size_t position, int32_t block) const;
  void copy_block(size_t position, int32_t from, int32_t to) const;

 private:
  struct Layer {
    const AttentionKernel* kernel;
    size_t position;
  };

  std::vector<std::unique_ptr<AttentionKernel>> kernels_;  // one for each shape
  std::vector<Layer> layers_;
  Arena arena_;
  std::vector<LayerPool> positions_;
};

}  // namespace lamina
