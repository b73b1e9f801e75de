#include "transport/tcp_listeners.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <linux/filter.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "transport/channel.h"

namespace lamina {
namespace {

int integer_option(int socket, int option) {
  int value = 0;
  socklen_t length = sizeof value;
  return getsockopt(socket, SOL_SOCKET, option, &value, &length) == 0 ? value : -1;
}

bool is_tcp_listener(int descriptor) {
  const int domain = integer_option(descriptor, SO_DOMAIN);
  return (domain == AF_INET || domain == AF_INET6) && integer_option(descriptor, SO_TYPE) == SOCK_STREAM &&
         integer_option(descriptor, SO_ACCEPTCONN) == 1;
}

// A program of the classic Berkeley packet filter; what it returns is how much of a packet is kept.
class PacketFilter {
 public:
  // Keeps packets whose IP header holds these words (in the host's byte order) at `offset`.
  template <size_t Words>
  void keep(int version, int offset, const std::array<uint32_t, Words>& words) {
    // Every comparison that fails jumps over what is left of this rule.
    auto left = static_cast<uint8_t>(2 * Words + 1);
    add(BPF_LD | BPF_B | BPF_ABS, SKF_NET_OFF);
    add(BPF_ALU | BPF_RSH | BPF_K, 4);
    compare(version, left);
    for (size_t word = 0; word < Words; ++word) {
      left -= 2;
      add(BPF_LD | BPF_W | BPF_ABS, SKF_NET_OFF + offset + static_cast<int>(4 * word));
      compare(words[word], left);
    }
    add(BPF_RET | BPF_K, UINT32_MAX);
  }

  // Drops what was not kept.
  void finish() { add(BPF_RET | BPF_K, 0); }

  bool attach(int socket) {
    const sock_fprog program{static_cast<unsigned short>(code_.size()), code_.data()};
    return setsockopt(socket, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
  }

 private:
  void add(int code, uint32_t operand) { code_.push_back({static_cast<uint16_t>(code), 0, 0, operand}); }
  void add(int code, int operand) { add(code, static_cast<uint32_t>(operand)); }
  void compare(uint32_t value, uint8_t otherwise) {
    code_.push_back({BPF_JMP | BPF_JEQ | BPF_K, 0, otherwise, value});
  }

  std::vector<sock_filter> code_;
};

// Where the source address lies in the headers of IPv4 (RFC 791) and IPv6 (RFC 8200).
constexpr int kSource4 = 12, kSource6 = 8;

void keep_host(PacketFilter& filter, const std::string& host) {
  std::array<uint32_t, 1> address4{};
  std::array<uint32_t, 4> address6{};
  const std::string address = host.substr(0, host.find('%'));  // a link-local one names its interface
  if (inet_pton(AF_INET, address.c_str(), address4.data()) == 1) {
    for (uint32_t& word : address4) word = ntohl(word);
    filter.keep(4, kSource4, address4);
  } else if (inet_pton(AF_INET6, address.c_str(), address6.data()) == 1) {
    for (uint32_t& word : address6) word = ntohl(word);
    filter.keep(6, kSource6, address6);
  } else {
    throw ChannelError("'" + host + "' is no numeric IP address");
  }
}

}  // namespace

std::set<int> tcp_listeners() {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir("/proc/self/fd"), closedir);
  if (!directory) {
    throw ChannelError(std::string("cannot list this process's descriptors: ") + strerror(errno));
  }
  std::set<int> found;
  while (const dirent* entry = readdir(directory.get())) {
    const int descriptor = std::atoi(entry->d_name);  // "." and ".." are taken for 0, which is listed too
    if (is_tcp_listener(descriptor)) found.insert(descriptor);
  }
  return found;
}

void admit_only(const std::set<int>& listeners, const std::vector<std::string>& hosts) {
  PacketFilter filter;
  for (const std::string& host : hosts) keep_host(filter, host);
  filter.finish();
  for (const int listener : listeners) {
    if (!filter.attach(listener)) {
      throw ChannelError(std::string("the system does not let UCX's ports be closed to strangers: ") +
                         strerror(errno));
    }
  }
}

void refuse_connections(int listener) {
  PacketFilter filter;
  filter.finish();
  if (!filter.attach(listener)) throw ChannelError(strerror(errno));
}

void admit_connections(int listener) {
  const int unused = 0;
  if (setsockopt(listener, SOL_SOCKET, SO_DETACH_FILTER, &unused, sizeof unused) != 0) {
    throw ChannelError(strerror(errno));
  }
}

}  // namespace lamina
