#include "wire/model_geometry.h"

#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace lamina {
namespace {

constexpr size_t kMaxLayers = 4096;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void require_within(const std::string& name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    refuse(name + " = " + std::to_string(value) + " must be from " + std::to_string(least) + " to " +
           std::to_string(most));
  }
}

void check(const CacheSpec& cache, const std::string& of) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require_within(of + "block_size", cache.block_size, 1, kMost);
  require_within(of + "num_kv_heads", cache.num_kv_heads, 1, kMost);
  require_within(of + "head_size", cache.head_size, 1, kMost);
  require_within(of + "head_size_v", cache.head_size_v, 1, cache.latent ? cache.head_size : kMost);
  if (cache.latent) require_within(of + "num_kv_heads of a latent cache", cache.num_kv_heads, 1, 1);
}

void check(const LayerSpec& layer, size_t num_caches, size_t num_layers, const std::string& of) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  require_within(of + "cache", layer.cache, 0, static_cast<int64_t>(num_caches) - 1);
  require_within(of + "group", layer.group, 0, static_cast<int64_t>(num_layers) - 1);
  require_within(of + "position", layer.position, 0, static_cast<int64_t>(num_layers) - 1);
  require_within(of + "num_heads", layer.num_heads, 1, kMost);
}

std::string place_name(std::pair<int32_t, int32_t> place) {
  return "position " + std::to_string(place.second) + " of group " + std::to_string(place.first);
}

}  // namespace

LayerRows::LayerRows(const AttentionGeometry& geometry, bool stores) {
  const size_t element = element_size(geometry.dtype);
  const auto heads = static_cast<size_t>(geometry.num_heads);
  const size_t kv_heads = stores ? static_cast<size_t>(geometry.num_kv_heads) : 0;
  q = heads * static_cast<size_t>(geometry.head_size) * element;
  k = kv_heads * static_cast<size_t>(geometry.head_size) * element;
  v = geometry.latent ? 0 : kv_heads * static_cast<size_t>(geometry.head_size_v) * element;
  out = heads * static_cast<size_t>(geometry.head_size_v) * element;
  lse = heads * sizeof(float);
}

ModelGeometry::ModelGeometry(std::vector<CacheSpec> caches, std::vector<LayerSpec> layers)
    : caches_(std::move(caches)) {
  require_within("the number of attention layers", static_cast<int64_t>(layers.size()), 1, kMaxLayers);
  require_within("the number of caches", static_cast<int64_t>(caches_.size()), 1, static_cast<int64_t>(layers.size()));
  for (size_t i = 0; i < caches_.size(); ++i) check(caches_[i], "cache " + std::to_string(i) + ": ");
  int32_t num_groups = 0;
  layers_.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerSpec& layer = layers[i];
    check(layer, caches_.size(), layers.size(), "layer " + std::to_string(i) + ": ");
    const CacheSpec& cache = caches_[static_cast<size_t>(layer.cache)];
    num_groups = std::max(num_groups, layer.group + 1);
    num_positions_ = std::max(num_positions_, layer.position + 1);
    const AttentionGeometry attention{cache.dtype,      layer.num_heads,  cache.num_kv_heads, cache.head_size,
                                      cache.block_size, cache.head_size_v, cache.latent};
    try {
      check_score_rule(layer.rule, attention);
    } catch (const std::invalid_argument& error) {
      refuse("layer " + std::to_string(i) + ": " + error.what());
    }
    const bool stores = layer.stores;
    layers_.push_back({std::move(layer), attention, LayerRows(attention, stores)});
  }
  check_places();
  groups_.resize(static_cast<size_t>(num_groups));
  for (size_t g = 0; g < groups_.size(); ++g) {
    GroupGeometry& group = groups_[g];
    bool all_have_windows = true, one_chunk = true;
    int32_t window = 0, chunk = -1;
    for (const LayerGeometry& layer : layers_) {
      if (layer.group != static_cast<int32_t>(g)) continue;
      if (group.block_size != 0 && group.block_size != layer.attention.block_size) {
        refuse("group " + std::to_string(g) + " has blocks of " + std::to_string(group.block_size) + " and of " +
               std::to_string(layer.attention.block_size) + " tokens: the layers of a group must have one block size");
      }
      group.block_size = layer.attention.block_size;
      group.heads_per_kv_head =
          std::max(group.heads_per_kv_head, layer.num_heads / layer.attention.num_kv_heads);
      group.has_positions |= layer.rule.needs_positions();
      all_have_windows &= layer.rule.window > 0;
      window = std::max(window, layer.rule.window);
      one_chunk &= chunk == -1 || chunk == layer.rule.chunk;
      chunk = layer.rule.chunk;
    }
    // Positions of different chunk sizes have no common first one that is cheap to say.
    group.reach = {all_have_windows ? window : 0, one_chunk ? chunk : 0};
  }
}

// Every group has positions 0, 1, 2 ..., and one layer that stores at each; others there come later and share its cache.
void ModelGeometry::check_places() const {
  std::map<std::pair<int32_t, int32_t>, int32_t> cache_at;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LayerGeometry& layer = layers_[i];
    const std::pair place(layer.group, layer.position);
    const auto target = cache_at.find(place);
    const std::string name = "layer " + std::to_string(i);
    if (layer.stores) {
      if (target != cache_at.end()) refuse(name + " stores at " + place_name(place) + ", as another layer does");
      cache_at.emplace(place, layer.cache);
    } else if (target == cache_at.end()) {
      refuse(name + " shares the KV at " + place_name(place) + ", where no layer before it stores");
    } else if (target->second != layer.cache) {
      refuse(name + " shares the KV at " + place_name(place) + ", whose cache is " + std::to_string(target->second) +
             ", not " + std::to_string(layer.cache));
    }
  }
  std::pair<int32_t, int32_t> next(0, 0);
  for (const auto& [place, cache] : cache_at) {
    if (place.first == next.first + 1 && next.second > 0) next = {place.first, 0};
    if (place != next) refuse("no layer stores at " + place_name(next) + ", but one at " + place_name(place));
    ++next.second;
  }
}

}  // namespace lamina
