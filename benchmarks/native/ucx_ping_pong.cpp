#include "ucx_ping_pong.h"

#include <cstring>
#include <utility>

namespace lamina {

UcxPingPong::UcxPingPong(const UcxLibrary& library, size_t max_bytes, const std::string& network_devices)
    : ucx_(library),
      worker_(ucx_, network_devices.empty() ? UcxWorker::Settings{}
                                            : UcxWorker::Settings{{"NET_DEVICES", network_devices}}),
      outgoing_(max_bytes),
      incoming_(max_bytes) {
  ucp::ucp_am_handler_param_t handler{};
  handler.field_mask = ucp::UCP_AM_HANDLER_PARAM_FIELD_ID | ucp::UCP_AM_HANDLER_PARAM_FIELD_CB |
                       ucp::UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.arg = this;
  handler.cb = [](void* self, const void*, size_t, void* data, size_t bytes,
                  const ucp::ucp_am_recv_param_t* param) -> ucp::ucs_status_t {
    auto* end = static_cast<UcxPingPong*>(self);
    if (bytes > end->incoming_.size()) return ucp::UCS_OK;
    ++end->num_arrived_;
    if ((param->recv_attr & ucp::UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
      std::memcpy(end->incoming_.data(), data, bytes);
      return ucp::UCS_OK;
    }
    const ucp::ucp_request_param_t receive{};
    end->arriving_ =
        end->ucx_.ucp_am_recv_data_nbx(end->worker_.get(), data, end->incoming_.data(), bytes, &receive);
    return ucp::UCS_INPROGRESS;
  };
  ucx_.check(ucx_.ucp_worker_set_am_recv_handler(worker_.get(), &handler), "UCX has no active messages");
}

UcxPingPong::~UcxPingPong() {
  if (endpoint_ == nullptr) return;
  ucp::ucp_request_param_t param{};
  param.op_attr_mask = ucp::UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = ucp::UCP_EP_CLOSE_FLAG_FORCE;
  void* closing = ucx_.ucp_ep_close_nbx(endpoint_, &param);
  if (closing == nullptr || ucp::is_error(closing)) return;
  const Deadline deadline = Clock::now() + std::chrono::milliseconds(500);
  while (ucx_.ucp_request_check_status(closing) == ucp::UCS_INPROGRESS && Clock::now() < deadline) {
    ucx_.ucp_worker_progress(worker_.get());
  }
  ucx_.ucp_request_free(closing);
}

void UcxPingPong::connect(std::span<const std::byte> peer_address) {
  const auto on_error = [](void* self, ucp::ucp_ep_h, ucp::ucs_status_t) {
    static_cast<UcxPingPong*>(self)->failed_ = true;
  };
  endpoint_ = worker_.connect(peer_address, {on_error, this});
}

void UcxPingPong::progress(Deadline deadline) {
  if (ucx_.ucp_worker_progress(worker_.get()) > 0) return;
  if (failed_) throw ChannelClosed("the peer died");
  if (Clock::now() >= deadline) throw ChannelTimeout("the peer did not answer in time");
}

void UcxPingPong::finish(void* request, Deadline deadline) {
  if (request == nullptr) return;
  if (ucp::is_error(request)) throw ChannelClosed(ucx_.ucs_status_string(ucp::error_of(request)));
  while (ucx_.ucp_request_check_status(request) == ucp::UCS_INPROGRESS) progress(deadline);
  ucx_.ucp_request_free(request);
}

void UcxPingPong::send(std::span<const std::byte> header, std::span<const std::byte> payload,
                       Deadline deadline) {
  const ucp::ucp_request_param_t param{};
  finish(ucx_.ucp_am_send_nbx(endpoint_, 0, header.data(), header.size(), payload.data(), payload.size(), &param),
         deadline);
}

void UcxPingPong::receive(Deadline deadline) {
  while (num_arrived_ == 0) progress(deadline);
  --num_arrived_;
  finish(std::exchange(arriving_, nullptr), deadline);
}

void UcxPingPong::echo(size_t bytes, int count, Deadline deadline) {
  for (int i = 0; i < count; ++i) {
    receive(deadline);
    send({}, {outgoing_.data(), bytes}, deadline);
  }
}

std::vector<int64_t> UcxPingPong::ping_pong(size_t bytes, int count, Deadline deadline) {
  std::vector<int64_t> round_trips;
  round_trips.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    const auto begin = Clock::now();
    send({}, {outgoing_.data(), bytes}, deadline);
    receive(deadline);
    round_trips.push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
  }
  return round_trips;
}

}  // namespace lamina
