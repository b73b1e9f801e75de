// The extension module vllm_lamina._native: one bind function per package of csrc/.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace lamina {
void bind_kernel(nanobind::module_& m);
void bind_transport(nanobind::module_& m);
void bind_wire(nanobind::module_& m);
void bind_attention_worker(nanobind::module_& m);
void bind_model_worker(nanobind::module_& m);
}  // namespace lamina

NB_MODULE(_native, m) {
  // vLLM ends its worker processes without tearing their objects down; that is no leak worth a page of warnings.
  nb::set_leak_warnings(false);
  m.doc() = "Native part of vllm-lamina: attention kernel, channels, attention worker.";
  lamina::bind_kernel(m);
  lamina::bind_transport(m);
  lamina::bind_wire(m);
  lamina::bind_attention_worker(m);
  lamina::bind_model_worker(m);
}
