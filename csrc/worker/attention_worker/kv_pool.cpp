#include "worker/attention_worker/kv_pool.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <span>

namespace lamina {
namespace {

// One kernel for each shape, and by layer which.
std::vector<std::unique_ptr<AttentionKernel>> make_kernels(const ModelGeometry& geometry, std::vector<size_t>& by_layer) {
  std::vector<std::unique_ptr<AttentionKernel>> kernels;
  std::vector<const AttentionGeometry*> shapes;
  for (const LayerGeometry& layer : geometry.layers()) {
    const auto known = std::find_if(shapes.begin(), shapes.end(),
                                    [&](const AttentionGeometry* shape) { return *shape == layer.attention; });
    by_layer.push_back(static_cast<size_t>(known - shapes.begin()));
    if (known != shapes.end()) continue;
    shapes.push_back(&layer.attention);
    kernels.push_back(make_attention_kernel(layer.attention));
  }
  return kernels;
}

// By position.
std::vector<size_t> page_bytes(const ModelGeometry& geometry, std::span<const std::unique_ptr<AttentionKernel>> kernels,
                               std::span<const size_t> by_layer) {
  std::vector<size_t> pages(static_cast<size_t>(geometry.num_positions()), 0);
  for (size_t i = 0; i < by_layer.size(); ++i) {
    size_t& page = pages[static_cast<size_t>(geometry.layers()[i].position)];
    page = std::max(page, kernels[by_layer[i]]->block_bytes());
  }
  return pages;
}

size_t sum(std::span<const size_t> pages) {
  size_t total = 0;
  for (const size_t page : pages) {
    if (__builtin_add_overflow(total, page, &total)) throw std::bad_alloc();
  }
  return total;
}

size_t pool_bytes(size_t block_bytes, int32_t num_blocks) {
  if (__builtin_mul_overflow(block_bytes, static_cast<size_t>(num_blocks), &block_bytes)) throw std::bad_alloc();
  return block_bytes;
}

}  // namespace

size_t kv_block_bytes(const ModelGeometry& geometry) {
  std::vector<size_t> by_layer;
  const auto kernels = make_kernels(geometry, by_layer);
  return sum(page_bytes(geometry, kernels, by_layer));
}

KvPool::KvPool(const ModelGeometry& geometry, int32_t num_blocks)
    : arena_(pool_bytes(kv_block_bytes(geometry), num_blocks)) {
  std::vector<size_t> by_layer;
  kernels_ = make_kernels(geometry, by_layer);
  std::byte* data = arena_.data();
  for (const size_t page : page_bytes(geometry, kernels_, by_layer)) {
    positions_.push_back({data, page});
    data += page * static_cast<size_t>(num_blocks);
  }
  for (size_t i = 0; i < by_layer.size(); ++i) {
    layers_.push_back({kernels_[by_layer[i]].get(), static_cast<size_t>(geometry.layers()[i].position)});
  }
}

void KvPool::zero_block(size_t position, int32_t block) const {
  const LayerPool& pool = positions_[position];
  std::memset(pool.block(block), 0, pool.stride);
}

void KvPool::copy_block(size_t position, int32_t from, int32_t to) const {
  const LayerPool& pool = positions_[position];
  if (from != to) std::memcpy(pool.block(to), pool.block(from), pool.stride);
}

}  // namespace lamina
