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
  const auto set = [&](const char* name, const std::atomic<uint64_t>& counter) {
    values[name] = counter.load(std::memory_order_relaxed);
  };
  set("steps", source.steps);
  set("messages", source.messages);
  set("bytes_in", source.bytes_in);
  set("bytes_out", source.bytes_out);
  set("tokens_appended", source.tokens_appended);
  set("ns_attending", source.ns_attending);
  set("ns_appending", source.ns_appending);
  set("ns_waiting", source.ns_waiting);
  set("ns_idle", source.ns_idle);
  set("rejected_frames", source.rejected_frames);
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
