// libucp, loaded at run time, and the pieces of it that every user needs: a context and a worker.
#pragma once

#include <cstddef>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transport/channel.h"
#include "transport/ucp_api.h"

namespace lamina {

// Its functions have UCX's names.
class UcxLibrary : public ucp::Functions {
 public:
  // Loads the library at `path` (a file, or a name for the system's search), once per process: a second call
  // returns the same library, and throws ChannelError if it names another file. Throws ChannelError if there
  // is no usable UCX at `path`.
  static const UcxLibrary& load(const std::string& path);
  // The library that load() loaded. Throws ChannelError without one.
  static const UcxLibrary& loaded();

  std::string path;     // of the file that was loaded
  std::string version;  // of UCX, such as "1.22.0"

  // Throws ChannelError with UCX's words for it unless the status is UCS_OK.
  void check(ucp::ucs_status_t status, const char* what) const;

 private:
  explicit UcxLibrary(const std::string& path);
};

// A context with one worker, which is for active messages and can be slept on.
//
// UCX does what any peer asks that reaches its ports, such as writing to memory (PUT over TCP). So the kernel keeps
// everyone from its TCP ports but the hosts that admit() names. RDMA has no such ports: a peer must know a
// queue pair, which UCX's address tells.
class UcxWorker {
 public:
  using Settings = std::vector<std::pair<std::string, std::string>>;

  // Settings are (name, value) without "UCX_"; those that the user's environment sets are left alone.
  UcxWorker(const UcxLibrary& library, const Settings& settings);
  ~UcxWorker();
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  ucp::ucp_context_h context() const { return context_; }
  ucp::ucp_worker_h get() const { return worker_; }
  // Lets these hosts (numeric IP addresses) connect over TCP, and nobody else; before the first call nobody may. Throws
  // ChannelError.
  void admit(const std::vector<std::string>& hosts) const;
  std::vector<std::byte> address() const;
  // Transports over devices that this context may use, such as "tcp/eth0" or "rc_mlx5/mlx5_0:1".
  std::vector<std::string> transports() const;
  // An endpoint with the peer whose failure `on_error` is told of.
  ucp::ucp_ep_h connect(std::span<const std::byte> peer_address, ucp::ucp_err_handler_t on_error) const;
  // Transports over devices that the endpoint uses.
  std::vector<std::string> transports(ucp::ucp_ep_h endpoint) const;

 private:
  void close();

  const UcxLibrary& ucx_;
  ucp::ucp_context_h context_ = nullptr;
  ucp::ucp_worker_h worker_ = nullptr;
  std::set<int> listeners_;  // of UCX's TCP
};

// Whether "rc_mlx5/mlx5_0:1" and the like, transports over InfiniBand, RoCE or EFA, are among these.
bool has_rdma(const std::vector<std::string>& transports);

// (network interface, IP address), of all that are up: those that UCX_NET_DEVICES may name.
std::vector<std::pair<std::string, std::string>> interface_addresses();

}  // namespace lamina
