// Python bindings of csrc/worker.
#include <nanobind/nanobind.h>

namespace lamina {
void bind_worker(nanobind::module_& m) { (void)m; }
}  // namespace lamina
