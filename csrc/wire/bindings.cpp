// Python bindings of csrc/wire.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "wire/model_geometry.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {

void bind_wire(nb::module_& m) {
  nb::class_<CacheSpec>(m, "CacheSpec")
      .def(
          "__init__",
          [](CacheSpec* self, int32_t block_size, int32_t num_kv_heads, int32_t head_size, int32_t head_size_v,
             const std::string& dtype, bool latent) {
            new (self) CacheSpec{block_size, num_kv_heads, head_size, head_size_v, parse_dtype(dtype), latent};
          },
          "block_size"_a, "num_kv_heads"_a, "head_size"_a, "head_size_v"_a, "dtype"_a, "latent"_a);
  nb::class_<LayerSpec>(m, "LayerSpec")
      .def(
          "__init__",
          [](LayerSpec* self, int32_t cache, int32_t group, int32_t position, int32_t num_heads, float scale,
             int32_t window, int32_t chunk, float soft_cap, std::vector<float> sinks, std::vector<float> alibi_slopes,
             bool stores) {
            ScoreRule rule{scale, soft_cap, window, chunk, std::move(sinks), std::move(alibi_slopes)};
            new (self) LayerSpec{cache, group, position, num_heads, std::move(rule), stores};
          },
          "cache"_a, "group"_a, "position"_a, "num_heads"_a, "scale"_a, "window"_a, "chunk"_a, "soft_cap"_a, "sinks"_a,
          "alibi_slopes"_a, "stores"_a);
  nb::class_<ModelGeometry>(m, "ModelGeometry")
      .def(nb::init<std::vector<CacheSpec>, std::vector<LayerSpec>>(), "caches"_a, "layers"_a)
      .def_prop_ro("num_layers", &ModelGeometry::num_layers)
      .def(
          "row_bytes",
          [](const ModelGeometry& geometry, size_t layer) {
            const LayerRows& rows = geometry.layers().at(layer).rows;
            return nb::make_tuple(rows.q, rows.k, rows.v, rows.out, rows.lse);
          },
          "layer"_a);
}

}  // namespace lamina
