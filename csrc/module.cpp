// The extension module vllm_lamina._native: one bind function per package of csrc/.
#include <nanobind/nanobind.h>

namespace lamina {
void bind_kernel(nanobind::module_& m);
void bind_transport(nanobind::module_& m);
void bind_worker(nanobind::module_& m);
}  // namespace lamina

NB_MODULE(_native, m) {
  m.doc() = "Native part of vllm-lamina: attention kernel, channels, attention worker.";
  lamina::bind_kernel(m);
  lamina::bind_transport(m);
  lamina::bind_worker(m);
}
