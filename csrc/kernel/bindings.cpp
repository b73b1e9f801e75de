// Python bindings of csrc/kernel.
#include <nanobind/nanobind.h>

namespace lamina {
void bind_kernel(nanobind::module_& m) { (void)m; }
}  // namespace lamina
