// Round trips over bare libucp, with UCX's defaults: what UcxChannel is measured against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transport/channel.h"
#include "transport/ucx_library.h"

namespace lamina {

// One end. Active messages, polled by one thread, between two buffers that neither end reads or writes itself;
// as with UcxChannel the peer's failure is noticed.
class UcxPingPong {
 public:
  // Messages have at most `max_bytes`. `network_devices` as for UcxChannel.
  UcxPingPong(const UcxLibrary& library, size_t max_bytes, const std::string& network_devices);
  ~UcxPingPong();
  UcxPingPong(const UcxPingPong&) = delete;
  UcxPingPong& operator=(const UcxPingPong&) = delete;

  std::vector<std::byte> address() const { return worker_.address(); }
  // As of a UcxChannel.
  void admit(const std::vector<std::string>& hosts) const { worker_.admit(hosts); }
  void connect(std::span<const std::byte> peer_address);
  // Answers `count` messages with ones of `bytes`. Throws ChannelTimeout, ChannelClosed.
  void echo(size_t bytes, int count, Deadline deadline);
  // Sends `count` messages of `bytes` and waits for each answer; returns the round trips in nanoseconds.
  // Throws ChannelTimeout, ChannelClosed.
  std::vector<int64_t> ping_pong(size_t bytes, int count, Deadline deadline);
  // Sends one message with a header, as nobody but a UcxChannel should send to a UcxChannel.
  void send(std::span<const std::byte> header, std::span<const std::byte> payload, Deadline deadline);

 private:
  void receive(Deadline deadline);
  void finish(void* request, Deadline deadline);
  void progress(Deadline deadline);

  const UcxLibrary& ucx_;
  UcxWorker worker_;
  ucp::ucp_ep_h endpoint_ = nullptr;
  bool failed_ = false;
  std::vector<std::byte> outgoing_;
  std::vector<std::byte> incoming_;
  int num_arrived_ = 0;
  void* arriving_ = nullptr;
};

}  // namespace lamina
