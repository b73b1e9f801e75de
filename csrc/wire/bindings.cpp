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
  nb::class_<ModelGeometry>(m, "ModelGeometry")
      .def(
          "__init__",
          [](ModelGeometry* self, int32_t block_size, int32_t num_heads, int32_t num_kv_heads,
             int32_t head_size, const std::string& dtype, std::vector<float> scales) {
            new (self) ModelGeometry{{parse_dtype(dtype), num_heads, num_kv_heads, head_size, block_size, head_size},
                                     std::move(scales)};
          },
          "block_size"_a, "num_heads"_a, "num_kv_heads"_a, "head_size"_a, "dtype"_a, "scales"_a)
      .def_prop_ro("num_layers", &ModelGeometry::num_layers)
      .def_prop_ro("q_row_bytes", &ModelGeometry::q_row_bytes)
      .def_prop_ro("kv_row_bytes", &ModelGeometry::kv_row_bytes);
}

}  // namespace lamina
