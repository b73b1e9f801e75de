// Channel over UCX, between two hosts: rings as in shared memory, one at each end of each direction, and active
// messages that carry a frame from its place in the sender's ring to the same place in the receiver's.
//
// The sender owns the space of a ring and learns from the receiver's messages which frames were given back, so a
// frame never arrives without room for it. Memory is bounded by the rings whatever the peer does.
//
// Both ends make their channel with the same token, exchange addresses over a connection that they trust, and
// connect. The token, in every message, keeps strangers from speaking for the peer, and the kernel keeps all hosts but
// the peer's from UCX's ports, as UCX itself trusts whoever reaches them. Nothing is encrypted.
//
// A peer that closes or dies is noticed; a link that is cut is not: the owner of the control connection closes
// the channel then.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/channel.h"
#include "transport/frame_arrivals.h"
#include "transport/ring_space.h"
#include "transport/ucx_library.h"
#include "transport/ucx_progress.h"

namespace lamina {

class UcxChannel final : public Channel {
 public:
  static constexpr size_t kTokenBytes = 16;

  // Each ring holds `ring_bytes` of frames, the same at both ends; pages are taken as frames touch them, or at
  // once where RDMA registers them. Polls `spin_us` before it sleeps; use 0 where threads outnumber CPUs.
  // `network_devices` (UCX_NET_DEVICES, such as "eth0" or "eth0,mlx5_0:1"; empty: all) are the devices over
  // which the peer may connect; over TCP at the first IPv4 address of each, or the first IPv6 address where it has none
  // or IPv6 is preferred. Throws ChannelError if UCX cannot use these.
  UcxChannel(std::span<const std::byte> token, size_t ring_bytes, int spin_us,
             const std::string& network_devices, bool prefer_ipv6);
  ~UcxChannel() override;
  UcxChannel(const UcxChannel&) = delete;
  UcxChannel& operator=(const UcxChannel&) = delete;

  // What the peer's connect() needs.
  const std::vector<std::byte>& address() const { return address_; }
  // Says at which numeric IP addresses the peer is; nobody else reaches this end over TCP, and before the first call
  // nobody does. Again with more of them, if need be. Throws ChannelError.
  void admit(const std::vector<std::string>& hosts) const { worker_.admit(hosts); }
  // Begins to connect; once. Frames that the peer sent before are not lost.
  void connect(std::span<const std::byte> peer_address);
  // Waits until the peer has answered over UCX. Throws ChannelTimeout, ChannelClosed.
  void wait_connected(Deadline deadline);
  // Transports over devices that carry this channel, such as "tcp/eth0"; empty before connect().
  std::vector<std::string> transports() const;

  std::span<std::byte> reserve(size_t bytes, Deadline deadline) override;
  void post() override;
  std::span<const std::byte> receive(Deadline deadline) override;
  void release() override;
  bool has_frame() override;
  std::span<std::byte> send_memory() override { return {send_ring_.data, ring_bytes_}; }
  std::span<const std::byte> receive_memory() override { return {receive_ring_.data, ring_bytes_}; }
  void set_aside(size_t bytes) override { space_.set_aside(bytes); }
  uint64_t post_at(size_t offset, size_t bytes, Deadline deadline) override;
  uint64_t num_consumed() override;
  size_t max_frame_bytes() const override { return space_.bytes(); }
  bool peer_closed() const override;
  void close() override;

  // Counts messages with a wrong token too.
  uint64_t num_bad_descriptors() const override {
    return num_bad_descriptors_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr size_t kSlots = FrameArrivals::kMaxFrames;  // frames in flight per direction

  struct Message;
  struct Sending;

  // Memory of one ring, registered with UCX.
  struct Ring {
    std::byte* data = nullptr;
    ucp::ucp_mem_h registration = nullptr;
  };

  Ring make_ring();
  void free_ring(Ring& ring);
  void send(Message message, const std::byte* data, size_t bytes, std::optional<uint64_t> frame);
  uint64_t send_frame(size_t offset, size_t bytes);
  template <typename HasRoom>
  void wait_for_room(Deadline deadline, HasRoom has_room);
  void send_credit();
  void ask_for_credit();
  void reclaim();
  void work();
  template <typename Ready, typename Gone>
  void wait(Deadline deadline, Ready ready, Gone gone);
  void check_open() const;
  void fail(const std::string& why);

  ucp::ucs_status_t on_message(const void* header, size_t header_bytes, void* data, size_t bytes,
                               bool rendezvous);
  ucp::ucs_status_t on_frame(const Message& message, void* data, size_t bytes, bool rendezvous);

  const UcxLibrary& ucx_;
  UcxWorker worker_;
  std::vector<std::byte> address_;
  std::array<std::byte, kTokenBytes> token_;
  size_t ring_bytes_;

  // Its mutex guards what follows.
  UcxProgress progress_;
  ucp::ucp_ep_h endpoint_ = nullptr;
  bool no_progress_ = false;
  size_t max_message_bytes_ = 0;  // larger frames travel in pieces
  std::vector<std::string> transports_;
  bool peer_said_hello_ = false;
  std::optional<uint64_t> peer_posted_;  // frames, once the peer said goodbye
  std::string failure_;                  // empty while the channel works

  Ring send_ring_;
  RingSpace space_;
  RingExtent reserved_{};
  size_t reserved_bytes_ = 0;  // as asked for; 0 without a reservation
  uint64_t posted_ = 0;
  uint64_t peer_consumed_ = 0;
  uint64_t reclaimed_ = 0;
  bool asked_for_credit_ = false;
  std::array<uint32_t, kSlots> num_pieces_sending_{};
  size_t num_sending_ = 0;
  std::vector<std::unique_ptr<Sending>> sendings_;
  std::vector<Sending*> free_sendings_;

  Ring receive_ring_;
  FrameArrivals arrivals_;
  uint64_t reported_ = 0;  // released frames that the peer knows of
  size_t unreported_bytes_ = 0;
  bool peer_wants_credit_ = false;

  std::atomic<uint64_t> num_bad_descriptors_{0};
  std::atomic<bool> closed_{false};
  std::atomic<bool> peer_gone_{false};
};

}  // namespace lamina
