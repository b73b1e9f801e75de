// Python bindings of csrc/worker/attention_worker.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "worker/attention_worker/attention_worker.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

nb::dict counters(const AttentionWorker& worker) {
  const WorkerCounters& source = worker.counters();
  nb::dict values;
#define LAMINA_READ(name) values[#name] = source.name.load(std::memory_order_relaxed);
  LAMINA_WORKER_COUNTERS(LAMINA_READ)
#undef LAMINA_READ
  return values;
}

}  // namespace

void bind_attention_worker(nb::module_& m) {
  m.def("kv_block_bytes", &kv_block_bytes, "geometry"_a);
  nb::class_<AttentionWorker>(m, "AttentionWorker")
      .def(nb::init<ModelGeometry, int32_t, int, std::vector<int>, int>(), "geometry"_a, "num_blocks"_a,
           "num_threads"_a, "cpus"_a = std::vector<int>(), "spin_us"_a = 100)
      .def("serve", &AttentionWorker::serve, "channel"_a)
      .def("stop", &AttentionWorker::stop, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("used_bytes", &AttentionWorker::used_bytes)
      .def_prop_ro("isa", [](const AttentionWorker& worker) { return std::string(isa_name(worker.isa())); })
      .def_prop_ro("progress", &AttentionWorker::progress)
      .def("start_trace", &AttentionWorker::start_trace)
      .def("take_trace",
           [](AttentionWorker& worker) {
             const auto events = worker.take_trace();
             return nb::bytes(reinterpret_cast<const char*>(events.data()), events.size() * sizeof(TraceEvent));
           })
      .def("counters", &counters);
}

}  // namespace lamina
