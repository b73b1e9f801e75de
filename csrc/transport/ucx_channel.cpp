#include "transport/ucx_channel.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ranges>
#include <string_view>
#include <system_error>
#include <utility>

namespace lamina {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kProtocolVersion = 1;
constexpr unsigned kMessageId = 0;
// Over TCP a frame travels in pieces of this size, each of which UCX hands over from its receive buffer (64 KiB
// with its headers) without assembling it first: the copy into the ring runs while the next piece arrives.
constexpr size_t kPieceBytes = 60 << 10;
// Fractions of a ring after which the sender is told unasked that the frames were given back.
constexpr size_t kCreditFraction = 4;
// How long close() waits for what was posted to leave this host.
constexpr milliseconds kLinger{500};

enum class MessageType : uint32_t { kHello = 1, kFrame, kCredit, kWantCredit, kGoodbye };

UcxWorker::Settings settings(const std::string& network_devices, bool prefer_ipv6) {
  UcxWorker::Settings settings;
  // Else UCX waits in connect(), for two minutes where packets are dropped, and the control thread with it.
  settings.emplace_back("TCP_CONN_NB", "y");
  if (prefer_ipv6) settings.emplace_back("TCP_AF_PRIO", "inet6,inet");
  // UCX 1.22 would copy pieces of this size once more on the sending side.
  settings.emplace_back("ZCOPY_THRESH", "8192");
  if (!network_devices.empty()) settings.emplace_back("NET_DEVICES", network_devices);
  return settings;
}

// UCX itself goes on with less, such as shared memory, which does not lead to another host.
void check_devices(const std::vector<std::string>& transports, const std::string& network_devices) {
  if (network_devices.empty() || std::getenv("UCX_NET_DEVICES") != nullptr) return;
  for (const std::string& transport : transports) {
    const std::string_view device = std::string_view(transport).substr(transport.find('/') + 1);
    for (const auto part : std::views::split(network_devices, ',')) {
      if (std::string_view(part.begin(), part.end()) == device) return;
    }
  }
  throw ChannelError("UCX has no transport over the network device " + network_devices +
                     ": is it up, and does UCX_TLS, if set, allow for tcp?");
}

}  // namespace

// The header of every active message.
struct UcxChannel::Message {
  std::array<std::byte, kTokenBytes> token{};
  MessageType type{};
  uint32_t reserved = 0;
  uint64_t consumed = 0;      // frames that the sender of this message gave back
  uint64_t number = 0;        // HELLO: protocol version; FRAME: the frame's number; GOODBYE: frames posted
  uint64_t bytes = 0;         // HELLO: ring_bytes; FRAME: of the whole frame
  uint64_t offset = 0;        // FRAME: of the frame in the ring
  uint64_t piece_offset = 0;  // FRAME: of this message's data in the frame
};

// What UCX reads until a send is complete.
struct UcxChannel::Sending {
  UcxChannel* channel = nullptr;
  Message message;
  std::optional<uint64_t> frame;

  void complete() {
    --channel->num_sending_;
    if (frame) --channel->num_pieces_sending_[*frame % kSlots];
    channel->progress_.changed();
    channel->free_sendings_.push_back(this);
  }
};

UcxChannel::UcxChannel(std::span<const std::byte> token, size_t ring_bytes, int spin_us,
                       const std::string& network_devices, bool prefer_ipv6)
    : ucx_(UcxLibrary::loaded()),
      worker_(ucx_, settings(network_devices, prefer_ipv6)),
      address_(worker_.address()),
      ring_bytes_(round_up(std::max<size_t>(ring_bytes, 1), 4096)),
      progress_(ucx_, worker_, std::chrono::microseconds(spin_us), [this] { work(); }),
      space_(ring_bytes_),
      arrivals_(ring_bytes_) {
  if (token.size() != kTokenBytes) {
    throw ChannelError("the token of a channel has " + std::to_string(kTokenBytes) + " bytes");
  }
  std::memcpy(token_.data(), token.data(), kTokenBytes);
  check_devices(worker_.transports(), network_devices);
  ucp::ucp_am_handler_param_t handler{};
  handler.field_mask = ucp::UCP_AM_HANDLER_PARAM_FIELD_ID | ucp::UCP_AM_HANDLER_PARAM_FIELD_CB |
                       ucp::UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.arg = this;
  handler.cb = [](void* self, const void* header, size_t header_bytes, void* data, size_t bytes,
                  const ucp::ucp_am_recv_param_t* param) {
    return static_cast<UcxChannel*>(self)->on_message(
        header, header_bytes, data, bytes, (param->recv_attr & ucp::UCP_AM_RECV_ATTR_FLAG_RNDV) != 0);
  };
  ucx_.check(ucx_.ucp_worker_set_am_recv_handler(worker_.get(), &handler), "UCX has no active messages");
  try {
    send_ring_ = make_ring();
    receive_ring_ = make_ring();
    progress_.start();
  } catch (...) {
    free_ring(send_ring_);
    free_ring(receive_ring_);
    throw;
  }
}

UcxChannel::~UcxChannel() {
  close();
  progress_.stop();
  if (endpoint_ != nullptr) {
    ucp::ucp_request_param_t param{};
    param.op_attr_mask = ucp::UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = ucp::UCP_EP_CLOSE_FLAG_FORCE;
    void* closing = ucx_.ucp_ep_close_nbx(endpoint_, &param);
    if (closing != nullptr && !ucp::is_error(closing)) {
      const Deadline deadline = Clock::now() + kLinger;
      while (ucx_.ucp_request_check_status(closing) == ucp::UCS_INPROGRESS && Clock::now() < deadline) {
        ucx_.ucp_worker_progress(worker_.get());
      }
      ucx_.ucp_request_free(closing);
    }
  }
  free_ring(send_ring_);
  free_ring(receive_ring_);
}

UcxChannel::Ring UcxChannel::make_ring() {
  void* map = mmap(nullptr, ring_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
  if (map == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "cannot map the channel's memory");
  }
  // A forked child has no business here; with RDMA the pages must not move to it either.
  madvise(map, ring_bytes_, MADV_DONTFORK);
  Ring ring{static_cast<std::byte*>(map)};
  ucp::ucp_mem_map_params_t params{};
  params.field_mask = ucp::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | ucp::UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  params.address = map;
  params.length = ring_bytes_;
  const auto status = ucx_.ucp_mem_map(worker_.context(), &params, &ring.registration);
  if (status != ucp::UCS_OK) {
    munmap(map, ring_bytes_);
    throw ChannelError("UCX cannot register the channel's " + std::to_string(ring_bytes_) + " bytes (" +
                       ucx_.ucs_status_string(status) +
                       "); lower ring_bytes or raise the limit on locked memory (ulimit -l)");
  }
  return ring;
}

void UcxChannel::free_ring(Ring& ring) {
  if (ring.data == nullptr) return;
  ucx_.ucp_mem_unmap(worker_.context(), ring.registration);
  munmap(ring.data, ring_bytes_);
}

void UcxChannel::connect(std::span<const std::byte> peer_address) {
  const std::lock_guard lock(progress_.mutex());
  if (endpoint_ != nullptr) throw std::logic_error("the channel is connected already");
  const ucp::ucp_err_handler_t on_error{[](void* self, ucp::ucp_ep_h, ucp::ucs_status_t status) {
                                          auto* channel = static_cast<UcxChannel*>(self);
                                          channel->fail(
                                              std::string("the peer died or the link to it broke (UCX: ") +
                                              channel->ucx_.ucs_status_string(status) + ")");
                                        },
                                        this};
  try {
    endpoint_ = worker_.connect(peer_address, on_error);
  } catch (const ChannelError& error) {
    // UCX 1.22 has freed the endpoint then, and its next progress would still use it.
    no_progress_ = true;
    fail(error.what());
    throw;
  }
  transports_ = worker_.transports(endpoint_);
  max_message_bytes_ = has_rdma(transports_) ? ring_bytes_ : kPieceBytes;
  Message hello;
  hello.type = MessageType::kHello;
  hello.number = kProtocolVersion;
  hello.bytes = ring_bytes_;
  send(hello, nullptr, 0, std::nullopt);
}

void UcxChannel::wait_connected(Deadline deadline) {
  wait(deadline, [this] { return peer_said_hello_; }, [this] { return peer_posted_.has_value(); });
}

std::vector<std::string> UcxChannel::transports() const {
  const std::lock_guard lock(progress_.mutex());
  return transports_;
}

bool UcxChannel::peer_closed() const { return peer_gone_ || closed_; }

void UcxChannel::fail(const std::string& why) {
  if (failure_.empty()) failure_ = why;
  peer_gone_ = true;
  progress_.changed();
}

// Starts a message; `data` must stay as it is until the frame's pieces are sent.
void UcxChannel::send(Message message, const std::byte* data, size_t bytes, std::optional<uint64_t> frame) {
  if (!failure_.empty() || endpoint_ == nullptr) return;
  if (free_sendings_.empty()) {
    sendings_.push_back(std::make_unique<Sending>());
    free_sendings_.push_back(sendings_.back().get());
  }
  Sending* sending = free_sendings_.back();
  free_sendings_.pop_back();
  message.token = token_;
  message.consumed = reported_ = arrivals_.num_released();
  unreported_bytes_ = 0;
  peer_wants_credit_ = false;
  sending->channel = this;
  sending->message = message;
  sending->frame = frame;
  ++num_sending_;
  if (frame) ++num_pieces_sending_[*frame % kSlots];

  ucp::ucp_request_param_t param{};
  param.op_attr_mask = ucp::UCP_OP_ATTR_FIELD_CALLBACK | ucp::UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = sending;
  param.cb.send = [](void* request, ucp::ucs_status_t, void* user_data) {
    auto* done = static_cast<Sending*>(user_data);
    // An error is told to the endpoint's handler too.
    done->channel->ucx_.ucp_request_free(request);
    done->complete();
  };
  if (bytes > 0) {
    param.op_attr_mask |= ucp::UCP_OP_ATTR_FIELD_MEMH;
    param.memh = send_ring_.registration;
  }
  if (bytes <= kPieceBytes) {
    param.op_attr_mask |= ucp::UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = ucp::UCP_AM_SEND_FLAG_EAGER;
  }
  void* request = ucx_.ucp_am_send_nbx(endpoint_, kMessageId, &sending->message, sizeof(Message), data, bytes,
                                       &param);
  if (request == nullptr) {
    sending->complete();
  } else if (ucp::is_error(request)) {
    sending->complete();
    fail(std::string("UCX cannot send to the peer: ") + ucx_.ucs_status_string(ucp::error_of(request)));
  }
}

void UcxChannel::send_credit() {
  Message credit;
  credit.type = MessageType::kCredit;
  send(credit, nullptr, 0, std::nullopt);
}

void UcxChannel::ask_for_credit() {
  asked_for_credit_ = true;
  Message want;
  want.type = MessageType::kWantCredit;
  send(want, nullptr, 0, std::nullopt);
}

void UcxChannel::work() {
  if (no_progress_) return;
  ucx_.ucp_worker_progress(worker_.get());
  if (peer_wants_credit_ && arrivals_.num_released() > reported_) send_credit();
}

ucp::ucs_status_t UcxChannel::on_message(const void* header, size_t header_bytes, void* data, size_t bytes,
                                         bool rendezvous) {
  Message message;
  if (header_bytes == sizeof message) std::memcpy(&message, header, sizeof message);
  if (header_bytes != sizeof message || message.token != token_ || message.consumed > posted_) {
    ++num_bad_descriptors_;
    return ucp::UCS_OK;
  }
  if (message.consumed > peer_consumed_) {
    peer_consumed_ = message.consumed;
    asked_for_credit_ = false;
    progress_.changed();
  }
  switch (message.type) {
    case MessageType::kHello:
      peer_said_hello_ = true;
      progress_.changed();
      if (message.number != kProtocolVersion || message.bytes != ring_bytes_) {
        fail("the peer's channel is of another version or has another ring_bytes");
      }
      return ucp::UCS_OK;
    case MessageType::kFrame:
      return on_frame(message, data, bytes, rendezvous);
    case MessageType::kCredit:
      return ucp::UCS_OK;
    case MessageType::kWantCredit:
      peer_wants_credit_ = true;
      return ucp::UCS_OK;
    case MessageType::kGoodbye:
      peer_posted_ = message.number;
      peer_gone_ = true;
      progress_.changed();
      return ucp::UCS_OK;
  }
  ++num_bad_descriptors_;
  return ucp::UCS_OK;
}

ucp::ucs_status_t UcxChannel::on_frame(const Message& message, void* data, size_t bytes, bool rendezvous) {
  const FrameArrivals::Piece piece{message.number, message.offset, message.bytes, message.piece_offset, bytes};
  const std::optional<size_t> place = arrivals_.claim(piece);
  if (!place) {
    ++num_bad_descriptors_;
    progress_.changed();
    return ucp::UCS_OK;
  }
  std::byte* to = receive_ring_.data + *place;
  if (!rendezvous) {
    std::memcpy(to, data, bytes);
    arrivals_.arrived(piece);
    if (arrivals_.is_complete()) progress_.changed();
    return ucp::UCS_OK;
  }
  ucp::ucp_request_param_t param{};
  param.op_attr_mask = ucp::UCP_OP_ATTR_FIELD_CALLBACK | ucp::UCP_OP_ATTR_FIELD_USER_DATA |
                       ucp::UCP_OP_ATTR_FIELD_MEMH | ucp::UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  param.memh = receive_ring_.registration;
  struct Fetch {
    UcxChannel* channel;
    FrameArrivals::Piece piece;
  };
  auto* fetch = new Fetch{this, piece};
  param.user_data = fetch;
  param.cb.recv_am = [](void* request, ucp::ucs_status_t status, size_t, void* user_data) {
    const std::unique_ptr<Fetch> done(static_cast<Fetch*>(user_data));
    done->channel->ucx_.ucp_request_free(request);
    if (status != ucp::UCS_OK) {
      done->channel->fail(std::string("a frame did not arrive (UCX: ") +
                          done->channel->ucx_.ucs_status_string(status) + ")");
      return;
    }
    done->channel->arrivals_.arrived(done->piece);
    done->channel->progress_.changed();
  };
  void* request = ucx_.ucp_am_recv_data_nbx(worker_.get(), data, to, bytes, &param);
  if (request == nullptr || ucp::is_error(request)) {
    delete fetch;
    fail("UCX cannot fetch a frame");
    return ucp::UCS_OK;
  }
  return ucp::UCS_INPROGRESS;
}

void UcxChannel::check_open() const {
  if (closed_) throw ChannelClosed("the channel was closed");
  if (!failure_.empty()) throw ChannelClosed(failure_);
}

// Waits until ready() or gone(), both called with the mutex held.
template <typename Ready, typename Gone>
void UcxChannel::wait(Deadline deadline, Ready ready, Gone gone) {
  progress_.wait(deadline, ready, [&] {
    check_open();
    if (gone()) throw ChannelClosed("the peer closed the channel");
  });
}

void UcxChannel::reclaim() {
  for (; reclaimed_ < peer_consumed_ && num_pieces_sending_[reclaimed_ % kSlots] == 0; ++reclaimed_) {
    space_.free_oldest();
  }
}

// Waits for a frame's slot and for what has_room(), called with the mutex held, asks for.
template <typename HasRoom>
void UcxChannel::wait_for_room(Deadline deadline, HasRoom has_room) {
  wait(
      deadline,
      [&] {
        if (!peer_said_hello_ || closed_ || peer_gone_) return false;
        reclaim();
        if (space_.num_frames() < kSlots && has_room()) return true;
        if (!asked_for_credit_) ask_for_credit();
        return false;
      },
      [this] { return peer_gone_.load(); });
}

std::span<std::byte> UcxChannel::reserve(size_t bytes, Deadline deadline) {
  const size_t padded = space_.padded(bytes);
  reserved_bytes_ = 0;
  wait_for_room(deadline, [&] { return space_.place(padded, reserved_); });
  reserved_bytes_ = bytes;
  return {send_ring_.data + reserved_.offset, bytes};
}

void UcxChannel::post() {
  if (reserved_bytes_ == 0) throw std::logic_error("post() without reserve()");
  const std::lock_guard lock(progress_.mutex());
  space_.take(reserved_);
  send_frame(reserved_.offset, std::exchange(reserved_bytes_, 0));
}

uint64_t UcxChannel::post_at(size_t offset, size_t bytes, Deadline deadline) {
  wait_for_room(deadline, [] { return true; });
  const std::lock_guard lock(progress_.mutex());
  space_.take_nothing();
  return send_frame(offset, bytes);
}

// With the mutex held.
uint64_t UcxChannel::send_frame(size_t offset, size_t bytes) {
  Message message;
  message.type = MessageType::kFrame;
  message.number = posted_;
  message.bytes = bytes;
  message.offset = offset;
  // Counted first: the peer may consume the frame before the last send() returns.
  const uint64_t frame = posted_++;
  for (size_t sent = 0; sent < message.bytes; sent += max_message_bytes_) {
    message.piece_offset = sent;
    send(message, send_ring_.data + message.offset + sent,
         std::min<size_t>(max_message_bytes_, message.bytes - sent), frame);
  }
  return frame;
}

uint64_t UcxChannel::num_consumed() {
  const std::lock_guard lock(progress_.mutex());
  check_open();
  progress_.work();
  reclaim();
  if (reclaimed_ < posted_ && !asked_for_credit_) ask_for_credit();
  return reclaimed_;
}

bool UcxChannel::has_frame() {
  const std::lock_guard lock(progress_.mutex());
  progress_.work();
  if (arrivals_.is_complete()) return true;
  check_open();
  return false;
}

std::span<const std::byte> UcxChannel::receive(Deadline deadline) {
  while (true) {
    wait(
        deadline, [this] { return arrivals_.is_complete(); },
        [this] { return peer_posted_ && *peer_posted_ <= arrivals_.num_released(); });
    const RingExtent frame = arrivals_.extent();
    if (!arrivals_.is_bad()) return {receive_ring_.data + frame.offset, frame.bytes};
    release();
  }
}

void UcxChannel::release() {
  const std::lock_guard lock(progress_.mutex());
  if (!arrivals_.is_bad()) unreported_bytes_ += arrivals_.extent().bytes;
  arrivals_.release();
  // Frames of this side tell the peer too; unasked only when these stay away.
  if (peer_wants_credit_ || arrivals_.num_released() - reported_ >= kSlots / kCreditFraction ||
      unreported_bytes_ >= ring_bytes_ / kCreditFraction) {
    send_credit();
  }
}

void UcxChannel::close() {
  if (closed_.exchange(true)) return;
  {
    const std::lock_guard lock(progress_.mutex());
    progress_.wake();
    Message goodbye;
    goodbye.type = MessageType::kGoodbye;
    goodbye.number = posted_;
    send(goodbye, nullptr, 0, std::nullopt);
  }
  const Deadline deadline = Clock::now() + kLinger;
  while (Clock::now() < deadline) {
    {
      const std::lock_guard lock(progress_.mutex());
      if (num_sending_ == 0 || !failure_.empty()) return;
      progress_.work();
    }
    progress_.mutex().let_others();
  }
}

}  // namespace lamina
