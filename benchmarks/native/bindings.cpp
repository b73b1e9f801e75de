// The extension module lamina_benchmarks: works on the objects of vllm_lamina._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "delayed_channel.h"
#include "kernel/thread_pool.h"
#include "linear_read.h"
#include "ping_pong.h"
#include "ucx_ping_pong.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

using Memory = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::span<const std::byte> span_of(const nb::bytes& bytes) {
  return {reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()};
}

}  // namespace

NB_MODULE(lamina_benchmarks, m) {
  m.doc() = "What benchmarks and tests of vllm-lamina measure with; timeouts are seconds.";
  nb::module_::import_("vllm_lamina._native");  // knows Channel and ThreadPool

  m.def(
      "echo_until_closed", [](Channel& channel) { echo_until_closed(channel); }, "channel"_a,
      nb::call_guard<nb::gil_scoped_release>(),
      "Answer every frame with one of the same size, until the peer leaves.");
  m.def(
      "ping_pong",
      [](Channel& channel, size_t bytes, int count, double timeout) {
        return ping_pong(channel, bytes, count, deadline_after(timeout));
      },
      "channel"_a, "bytes"_a, "count"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Send `count` frames to an echo, one after the other; return the round trips in nanoseconds.");
  nb::class_<DelayedChannel, Channel>(
      m, "DelayedChannel",
      "Delivers each layer's frame `latency_us` after it was posted: what a slower network would cost.")
      .def(
          "__init__",
          [](DelayedChannel* self, std::shared_ptr<Channel> channel, int64_t latency_us) {
            new (self) DelayedChannel(std::move(channel), std::chrono::microseconds(latency_us));
          },
          "channel"_a, "latency_us"_a);

  nb::class_<UcxPingPong>(m, "UcxPingPong",
                          "Round trips over bare libucp, to measure `UcxChannel` against and to test it; `library` "
                          "is the path of what `load_ucx` loaded.")
      .def(
          "__init__",
          [](UcxPingPong* self, const std::string& library, size_t max_bytes, const std::string& network_devices) {
            new (self) UcxPingPong(UcxLibrary::load(library), max_bytes, network_devices);
          },
          "library"_a, "max_bytes"_a, "network_devices"_a = "")
      .def_prop_ro("address",
                   [](const UcxPingPong& end) {
                     const auto address = end.address();
                     return nb::bytes(address.data(), address.size());
                   })
      .def("admit", &UcxPingPong::admit, "hosts"_a)
      .def(
          "connect", [](UcxPingPong& end, nb::bytes address) { end.connect(span_of(address)); },
          "peer_address"_a)
      .def(
          "echo",
          [](UcxPingPong& end, size_t bytes, int count, double timeout) {
            end.echo(bytes, count, deadline_after(timeout));
          },
          "bytes"_a, "count"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Answer `count` messages with ones of `bytes`.")
      .def(
          "ping_pong",
          [](UcxPingPong& end, size_t bytes, int count, double timeout) {
            return end.ping_pong(bytes, count, deadline_after(timeout));
          },
          "bytes"_a, "count"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Send `count` messages to an echo, one after the other; return the round trips in nanoseconds.")
      .def(
          "send",
          [](UcxPingPong& end, nb::bytes header, nb::bytes payload, double timeout) {
            end.send(span_of(header), span_of(payload), deadline_after(timeout));
          },
          "header"_a, "payload"_a, "timeout"_a, "Send one active message.");

  m.def(
      "linear_read",
      [](const Memory& memory, ThreadPool& threads) {
        nb::gil_scoped_release release;
        return linear_read(reinterpret_cast<const std::byte*>(memory.data()), memory.size(), threads);
      },
      "memory"_a, "threads"_a,
      "Read memory, uint8, front to back, every thread of a `_native.ThreadPool` a contiguous share; return a checksum.");
}

}  // namespace lamina
