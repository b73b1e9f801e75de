#include "transport/ucx_library.h"

#include <dlfcn.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>
#include <system_error>

#include "transport/tcp_listeners.h"

namespace lamina {
namespace {

std::mutex load_mutex;
std::mutex open_mutex;  // only one worker's listeners are new at a time
std::unique_ptr<const UcxLibrary> the_library;
pid_t loading_process = 0;

// The library's thread and identity stay with the process that loaded it.
void check_not_forked() {
  if (the_library && loading_process != getpid()) {
    throw ChannelError("UCX does not survive fork(): load it in the child first, or spawn the process");
  }
}

std::string file_of(void* symbol) {
  Dl_info info{};
  if (dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code error;
  const auto path = std::filesystem::canonical(info.dli_fname, error);
  return error ? info.dli_fname : path.string();
}

// What one of UCX's print functions writes: the only way to the names of transports that UCX 1.13 has too.
std::string printed(const std::function<void(FILE*)>& print) {
  char* text = nullptr;
  size_t bytes = 0;
  FILE* stream = open_memstream(&text, &bytes);
  if (stream == nullptr) throw std::bad_alloc();
  print(stream);
  fclose(stream);
  std::string result(text, bytes);
  free(text);
  return result;
}

// What is written as "tcp/eth0" in each line of the text that has the mark, up to one of `ends`: distinct, in order.
std::vector<std::string> transports_in(std::string_view text, std::string_view mark, std::string_view ends) {
  std::vector<std::string> found;
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    const size_t slash = line.find('/');
    if (slash == line.npos || line.find(mark) == line.npos) continue;
    const size_t begin = line.find_last_of(" :", slash) + 1;
    std::string transport(line.substr(begin, line.find_first_of(ends, slash) - begin));
    if (std::ranges::find(found, transport) == found.end()) found.push_back(std::move(transport));
  }
  return found;
}

}  // namespace

UcxLibrary::UcxLibrary(const std::string& requested) {
  void* handle = dlopen(requested.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw ChannelError("cannot load UCX: " + std::string(dlerror()));
#define LAMINA_RESOLVE(type, name, parameters)                   \
  name = reinterpret_cast<decltype(name)>(dlsym(handle, #name)); \
  if (name == nullptr) throw ChannelError(requested + " is not libucp: it has no " #name "()");
  LAMINA_UCP_FUNCTIONS(LAMINA_RESOLVE)
#undef LAMINA_RESOLVE
  path = file_of(reinterpret_cast<void*>(ucp_get_version));
  // Libraries of one name are loaded once: another UCX that came first lends its libucs to this libucp.
  const std::string ucs = file_of(reinterpret_cast<void*>(ucs_status_string));
  if (std::filesystem::path(ucs).parent_path() != std::filesystem::path(path).parent_path()) {
    throw ChannelError("cannot use " + path + ": this process has loaded another UCX, " + ucs +
                       "; point to that one's libucp.so.0 or keep the other from being loaded");
  }
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  version = ucp_get_version_string();
  if (major != ucp::kApiMajor || minor < ucp::kApiMinor) {
    throw ChannelError("UCX " + version + " at " + path + " does not fit: 1.13 or a later 1.x is needed");
  }
}

const UcxLibrary& UcxLibrary::load(const std::string& path) {
  const std::lock_guard lock(load_mutex);
  check_not_forked();
  if (!the_library) {
    the_library.reset(new UcxLibrary(path));
    loading_process = getpid();
  } else if (const UcxLibrary other(path); other.path != the_library->path) {
    throw ChannelError("cannot load " + other.path + ": this process uses UCX of " + the_library->path);
  }
  return *the_library;
}

const UcxLibrary& UcxLibrary::loaded() {
  const std::lock_guard lock(load_mutex);
  check_not_forked();
  if (!the_library) throw ChannelError("UCX is not loaded; call load_ucx() first");
  return *the_library;
}

void UcxLibrary::check(ucp::ucs_status_t status, const char* what) const {
  if (status != ucp::UCS_OK) throw ChannelError(std::string(what) + ": " + ucs_status_string(status));
}

UcxWorker::UcxWorker(const UcxLibrary& library, const Settings& settings) : ucx_(library) {
  ucp::ucp_config_t* config = nullptr;
  ucx_.check(ucx_.ucp_config_read(nullptr, nullptr, &config), "cannot read UCX's configuration");
  for (const auto& [name, value] : settings) {
    if (std::getenv(("UCX_" + name).c_str()) == nullptr) {
      ucx_.ucp_config_modify(config, name.c_str(), value.c_str());
    }
  }
  ucp::ucp_params_t params{};
  params.field_mask = ucp::UCP_PARAM_FIELD_FEATURES;
  params.features = ucp::UCP_FEATURE_AM | ucp::UCP_FEATURE_WAKEUP;
  const auto status = ucx_.ucp_init_version(ucp::kApiMajor, ucp::kApiMinor, &params, config, &context_);
  ucx_.ucp_config_release(config);
  ucx_.check(status, "UCX finds no transport; see UCX_TLS and UCX_NET_DEVICES");
  ucp::ucp_worker_params_t worker_params{};
  worker_params.field_mask = ucp::UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = ucp::UCS_THREAD_MODE_SERIALIZED;
  try {
    const std::lock_guard lock(open_mutex);
    const std::set<int> before = tcp_listeners();
    ucx_.check(ucx_.ucp_worker_create(context_, &worker_params, &worker_),
               "UCX cannot open its transports; see UCX_TLS and UCX_NET_DEVICES");
    std::ranges::set_difference(tcp_listeners(), before, std::inserter(listeners_, listeners_.end()));
    admit({});
  } catch (...) {
    close();
    throw;
  }
}

UcxWorker::~UcxWorker() { close(); }

void UcxWorker::close() {
  if (worker_ != nullptr) ucx_.ucp_worker_destroy(worker_);
  ucx_.ucp_cleanup(context_);
}

void UcxWorker::admit(const std::vector<std::string>& hosts) const { admit_only(listeners_, hosts); }

std::vector<std::byte> UcxWorker::address() const {
  ucp::ucp_address_t* address = nullptr;
  size_t length = 0;
  ucx_.check(ucx_.ucp_worker_get_address(worker_, &address, &length), "UCX has no address");
  const auto* bytes = reinterpret_cast<const std::byte*>(address);
  std::vector<std::byte> copy(bytes, bytes + length);
  ucx_.ucp_worker_release_address(worker_, address);
  return copy;
}

std::vector<std::string> UcxWorker::transports() const {
  // "#     resource 3 :  md 2  dev 1  flags -- tcp/eth0"
  return transports_in(printed([this](FILE* stream) { ucx_.ucp_context_print_info(context_, stream); }),
                       "resource ", " ");
}

ucp::ucp_ep_h UcxWorker::connect(std::span<const std::byte> peer_address,
                                 ucp::ucp_err_handler_t on_error) const {
  // UCX is not told where the address ends: if it is not one, zeros stop the parser soon.
  std::vector<std::byte> padded(peer_address.begin(), peer_address.end());
  padded.resize(padded.size() + 4096);
  ucp::ucp_ep_params_t params{};
  params.field_mask = ucp::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | ucp::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      ucp::UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp::ucp_address_t*>(padded.data());
  params.err_mode = ucp::UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = on_error;
  ucp::ucp_ep_h endpoint = nullptr;
  ucx_.check(ucx_.ucp_ep_create(worker_, &params, &endpoint), "UCX finds no way to the peer");
  return endpoint;
}

std::vector<std::string> UcxWorker::transports(ucp::ucp_ep_h endpoint) const {
  // "#                 lane[0]:  2:tcp/eth0.0 md[1]           -> md[1]/tcp/sysdev[255] rma_bw#0 am am_bw#0"
  return transports_in(printed([&](FILE* stream) { ucx_.ucp_ep_print_info(endpoint, stream); }), "lane[", " .");
}

bool has_rdma(const std::vector<std::string>& transports) {
  return std::ranges::any_of(transports, [](std::string_view transport) {
    return std::ranges::any_of(std::to_array<std::string_view>({"rc", "dc", "ud", "srd"}),
                               [=](std::string_view begin) { return transport.starts_with(begin); });
  });
}

std::vector<std::pair<std::string, std::string>> interface_addresses() {
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) != 0) throw std::system_error(errno, std::generic_category(), "getifaddrs");
  std::vector<std::pair<std::string, std::string>> found;
  for (const ifaddrs* entry = first; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    char host[NI_MAXHOST];
    const auto length = static_cast<socklen_t>(family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
    if (getnameinfo(entry->ifa_addr, length, host, sizeof host, nullptr, 0, NI_NUMERICHOST) == 0) {
      const std::string name(entry->ifa_name);
      found.emplace_back(name.substr(0, name.find(':')), host);  // "eth0:1": an address of eth0 with a label
    }
  }
  freeifaddrs(first);
  return found;
}

}  // namespace lamina
