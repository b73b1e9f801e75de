// Python bindings of csrc/transport.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "transport/shm_channel.h"
#include "transport/tcp_listeners.h"
#include "transport/ucx_channel.h"
#include "transport/ucx_library.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

void send_bytes(Channel& channel, nb::bytes payload, double timeout) {
  const char* data = payload.c_str();
  const size_t size = payload.size();
  nb::gil_scoped_release released;
  const auto frame = channel.reserve(size, deadline_after(timeout));
  std::memcpy(frame.data(), data, size);
  channel.post();
}

nb::bytes receive_bytes(Channel& channel, double timeout) {
  std::span<const std::byte> frame;
  {
    nb::gil_scoped_release released;
    frame = channel.receive(deadline_after(timeout));
  }
  nb::bytes payload(frame.data(), frame.size());
  channel.release();
  return payload;
}

std::span<const std::byte> span_of(const nb::bytes& bytes) {
  return {reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()};
}

nb::bytes bytes_of(const std::vector<std::byte>& bytes) { return nb::bytes(bytes.data(), bytes.size()); }

struct UcxInfo {
  std::string path;
  std::string version;
  std::vector<std::string> transports;
};

UcxInfo load_ucx(const std::string& path) {
  const UcxLibrary& library = UcxLibrary::load(path);
  return {library.path, library.version, UcxWorker(library, {}).transports()};
}

}  // namespace

void bind_transport(nb::module_& m) {
  auto base = nb::exception<ChannelError>(m, "ChannelError", PyExc_RuntimeError);
  nb::exception<ChannelTimeout>(m, "ChannelTimeout", base);
  nb::exception<ChannelClosed>(m, "ChannelClosed", base);
  nb::exception<FrameTooLarge>(m, "FrameTooLarge", base);

  nb::enum_<ShmEnd>(m, "ShmEnd").value("CLIENT", ShmEnd::kClient).value("WORKER", ShmEnd::kWorker);
  m.def("create_shm_memory", &create_shm_memory, "ring_bytes"_a);
  nb::class_<Channel>(m, "Channel")
      .def("send", &send_bytes, "payload"_a, "timeout"_a)
      .def("receive", &receive_bytes, "timeout"_a)
      .def("close", &Channel::close, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("peer_closed", &Channel::peer_closed)
      .def_prop_ro("max_frame_bytes", &Channel::max_frame_bytes)
      .def_prop_ro("num_bad_descriptors", &Channel::num_bad_descriptors);
  nb::class_<ShmChannel, Channel>(m, "ShmChannel")
      .def(nb::init<int, int, ShmEnd, int>(), "memory_fd"_a, "liveness_fd"_a, "end"_a, "spin_us"_a = 100);

  m.def("refuse_connections", &refuse_connections, "listener"_a);
  m.def("admit_connections", &admit_connections, "listener"_a);

  nb::class_<UcxInfo>(m, "UcxInfo")
      .def_ro("path", &UcxInfo::path)
      .def_ro("version", &UcxInfo::version)
      .def_ro("transports", &UcxInfo::transports)
      .def_prop_ro("has_rdma", [](const UcxInfo& info) { return has_rdma(info.transports); });
  m.def("load_ucx", &load_ucx, "path"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("interface_addresses", &interface_addresses);
  nb::class_<UcxChannel, Channel>(m, "UcxChannel")
      .def(
          "__init__",
          [](UcxChannel* self, nb::bytes token, size_t ring_bytes, int spin_us,
             const std::string& network_devices, bool prefer_ipv6) {
            const auto bytes = span_of(token);
            nb::gil_scoped_release released;
            new (self) UcxChannel(bytes, ring_bytes, spin_us, network_devices, prefer_ipv6);
          },
          "token"_a, "ring_bytes"_a, "spin_us"_a = 100, "network_devices"_a = "", "prefer_ipv6"_a = false)
      .def_prop_ro("address", [](const UcxChannel& channel) { return bytes_of(channel.address()); })
      .def("admit", &UcxChannel::admit, "hosts"_a)
      .def(
          "connect",
          [](UcxChannel& channel, nb::bytes address) {
            const auto bytes = span_of(address);
            nb::gil_scoped_release released;
            channel.connect(bytes);
          },
          "peer_address"_a)
      .def(
          "wait_connected",
          [](UcxChannel& channel, double timeout) { channel.wait_connected(deadline_after(timeout)); },
          "timeout"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("transports", &UcxChannel::transports)
      .def_prop_ro("has_rdma", [](const UcxChannel& channel) { return has_rdma(channel.transports()); });
}

}  // namespace lamina
