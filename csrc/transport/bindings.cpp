// Python bindings of csrc/transport.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "transport/ping_pong.h"
#include "transport/shm_channel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

void send_bytes(ShmChannel& channel, nb::bytes payload, double timeout) {
  const char* data = payload.c_str();
  const size_t size = payload.size();
  nb::gil_scoped_release released;
  const auto frame = channel.reserve(size, deadline_after(timeout));
  std::memcpy(frame.data(), data, size);
  channel.post();
}

nb::bytes receive_bytes(ShmChannel& channel, double timeout) {
  std::span<const std::byte> frame;
  {
    nb::gil_scoped_release released;
    frame = channel.receive(deadline_after(timeout));
  }
  nb::bytes payload(frame.data(), frame.size());
  channel.release();
  return payload;
}

}  // namespace

void bind_transport(nb::module_& m) {
  auto base = nb::exception<ChannelError>(m, "ChannelError", PyExc_RuntimeError);
  nb::exception<ChannelTimeout>(m, "ChannelTimeout", base);
  nb::exception<ChannelClosed>(m, "ChannelClosed", base);
  nb::exception<FrameTooLarge>(m, "FrameTooLarge", base);

  nb::enum_<ShmEnd>(m, "ShmEnd").value("CLIENT", ShmEnd::kClient).value("WORKER", ShmEnd::kWorker);
  m.def("create_shm_memory", &create_shm_memory, "ring_bytes"_a);
  nb::class_<ShmChannel>(m, "ShmChannel")
      .def(nb::init<int, int, ShmEnd, int>(), "memory_fd"_a, "liveness_fd"_a, "end"_a, "spin_us"_a = 100)
      .def("send", &send_bytes, "payload"_a, "timeout"_a)
      .def("receive", &receive_bytes, "timeout"_a)
      .def("close", &ShmChannel::close)
      .def_prop_ro("peer_closed", &ShmChannel::peer_closed)
      .def_prop_ro("max_frame_bytes", &ShmChannel::max_frame_bytes)
      .def_prop_ro("num_bad_descriptors", &ShmChannel::num_bad_descriptors)
      .def(
          "echo_until_closed", [](ShmChannel& channel) { echo_until_closed(channel); },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "ping_pong",
          [](ShmChannel& channel, size_t bytes, int count, double timeout) {
            return ping_pong(channel, bytes, count, deadline_after(timeout));
          },
          "bytes"_a, "count"_a, "timeout"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace lamina
