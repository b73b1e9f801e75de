// Python bindings of csrc/transport.
#include <nanobind/nanobind.h>

namespace lamina {
void bind_transport(nanobind::module_& m) { (void)m; }
}  // namespace lamina
