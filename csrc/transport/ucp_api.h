// The part of libucp's C interface that Lamina uses, for loading it at run time: no UCX headers are needed to
// build. Layouts and values are those of UCX 1.13 to 1.22 (ucp/api/ucp.h); a field mask says which fields of a
// structure count, so later versions, which append fields, take them as they are. Compared with UCX's own headers
// by tests/transport/test_ucx_declarations.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace lamina::ucp {

inline constexpr unsigned kApiMajor = 1;
inline constexpr unsigned kApiMinor = 13;

using ucs_status_t = int8_t;  // an enum packed into one byte
using ucs_status_ptr_t = void*;
inline constexpr ucs_status_t UCS_OK = 0;
inline constexpr ucs_status_t UCS_INPROGRESS = 1;
inline constexpr ucs_status_t UCS_ERR_BUSY = -15;
inline constexpr intptr_t UCS_ERR_LAST = -100;

// What an operation returns: nothing (done at once), an error, or a request that goes on.
inline bool is_error(ucs_status_ptr_t operation) {
  return reinterpret_cast<uintptr_t>(operation) >= static_cast<uintptr_t>(UCS_ERR_LAST);
}
inline ucs_status_t error_of(ucs_status_ptr_t operation) {
  return static_cast<ucs_status_t>(reinterpret_cast<intptr_t>(operation));
}

using ucp_config_t = struct ucp_config;
using ucp_context_h = struct ucp_context*;
using ucp_worker_h = struct ucp_worker*;
using ucp_ep_h = struct ucp_ep*;
using ucp_address_t = struct ucp_address;
using ucp_mem_h = struct ucp_mem*;

inline constexpr uint64_t UCP_PARAM_FIELD_FEATURES = 1 << 0;
inline constexpr uint64_t UCP_FEATURE_WAKEUP = 1 << 4;
inline constexpr uint64_t UCP_FEATURE_AM = 1 << 6;
struct ucp_params_t {
  uint64_t field_mask;
  uint64_t features;
  size_t request_size;
  void (*request_init)(void*);
  void (*request_cleanup)(void*);
  uint64_t tag_sender_mask;
  int mt_workers_shared;
  size_t estimated_num_eps;
  size_t estimated_num_ppn;
  const char* name;
};

inline constexpr uint64_t UCP_WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0;
inline constexpr int UCS_THREAD_MODE_SERIALIZED = 1;
// Later fields are never given.
struct ucp_worker_params_t {
  uint64_t field_mask;
  int thread_mode;
};

inline constexpr uint64_t UCP_EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0;
inline constexpr uint64_t UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1;
inline constexpr uint64_t UCP_EP_PARAM_FIELD_ERR_HANDLER = 1 << 2;
inline constexpr int UCP_ERR_HANDLING_MODE_PEER = 1;
struct ucp_err_handler_t {
  void (*cb)(void* arg, ucp_ep_h ep, ucs_status_t status);
  void* arg;
};
// Later fields are never given.
struct ucp_ep_params_t {
  uint64_t field_mask;
  const ucp_address_t* address;
  int err_mode;
  ucp_err_handler_t err_handler;
};

inline constexpr uint64_t UCP_MEM_MAP_PARAM_FIELD_ADDRESS = 1 << 0;
inline constexpr uint64_t UCP_MEM_MAP_PARAM_FIELD_LENGTH = 1 << 1;
// Later fields are never given.
struct ucp_mem_map_params_t {
  uint64_t field_mask;
  void* address;
  size_t length;
};

inline constexpr uint64_t UCP_AM_HANDLER_PARAM_FIELD_ID = 1 << 0;
inline constexpr uint64_t UCP_AM_HANDLER_PARAM_FIELD_CB = 1 << 2;
inline constexpr uint64_t UCP_AM_HANDLER_PARAM_FIELD_ARG = 1 << 3;
inline constexpr uint64_t UCP_AM_RECV_ATTR_FLAG_RNDV = 1 << 17;
struct ucp_am_recv_param_t {
  uint64_t recv_attr;
  ucp_ep_h reply_ep;
};
struct ucp_am_handler_param_t {
  uint64_t field_mask;
  unsigned id;
  uint32_t flags;
  ucs_status_t (*cb)(void* arg, const void* header, size_t header_length, void* data, size_t length,
                     const ucp_am_recv_param_t* param);
  void* arg;
};

inline constexpr uint32_t UCP_AM_SEND_FLAG_EAGER = 1 << 1;
inline constexpr uint32_t UCP_OP_ATTR_FIELD_CALLBACK = 1 << 1;
inline constexpr uint32_t UCP_OP_ATTR_FIELD_USER_DATA = 1 << 2;
inline constexpr uint32_t UCP_OP_ATTR_FIELD_FLAGS = 1 << 4;
inline constexpr uint32_t UCP_OP_ATTR_FIELD_MEMH = 1 << 8;
inline constexpr uint32_t UCP_OP_ATTR_FLAG_NO_IMM_CMPL = 1 << 16;
inline constexpr uint32_t UCP_EP_CLOSE_FLAG_FORCE = 1 << 0;
struct ucp_request_param_t {
  uint32_t op_attr_mask;
  uint32_t flags;
  void* request;
  union {
    void (*send)(void* request, ucs_status_t status, void* user_data);
    void (*recv_am)(void* request, ucs_status_t status, size_t length, void* user_data);
  } cb;
  uint64_t datatype;
  void* user_data;
  void* reply_buffer;
  int memory_type;
  void* recv_info;
  ucp_mem_h memh;
  uint64_t remote_datatype;
  const void* remote;
  size_t remote_count;
};

// The functions, under their own names, as X(return type, name, parameters).
#define LAMINA_UCP_FUNCTIONS(X)                                                                                \
  X(void, ucp_get_version, (unsigned* major, unsigned* minor, unsigned* release))                             \
  X(const char*, ucp_get_version_string, ())                                                                  \
  X(ucs_status_t, ucp_config_read, (const char* prefix, const char* file, ucp_config_t** config))             \
  X(ucs_status_t, ucp_config_modify, (ucp_config_t * config, const char* name, const char* value))            \
  X(void, ucp_config_release, (ucp_config_t * config))                                                        \
  X(ucs_status_t, ucp_init_version,                                                                           \
    (unsigned major, unsigned minor, const ucp_params_t* params, const ucp_config_t* config,                  \
     ucp_context_h* context))                                                                                 \
  X(void, ucp_cleanup, (ucp_context_h context))                                                               \
  X(void, ucp_context_print_info, (const ucp_context_h context, FILE* stream))                                \
  X(ucs_status_t, ucp_mem_map,                                                                                \
    (ucp_context_h context, const ucp_mem_map_params_t* params, ucp_mem_h* memory))                           \
  X(ucs_status_t, ucp_mem_unmap, (ucp_context_h context, ucp_mem_h memory))                                   \
  X(ucs_status_t, ucp_worker_create,                                                                          \
    (ucp_context_h context, const ucp_worker_params_t* params, ucp_worker_h* worker))                         \
  X(void, ucp_worker_destroy, (ucp_worker_h worker))                                                          \
  X(ucs_status_t, ucp_worker_get_address, (ucp_worker_h worker, ucp_address_t** address, size_t* length))     \
  X(void, ucp_worker_release_address, (ucp_worker_h worker, ucp_address_t* address))                          \
  X(ucs_status_t, ucp_worker_get_efd, (ucp_worker_h worker, int* fd))                                         \
  X(ucs_status_t, ucp_worker_arm, (ucp_worker_h worker))                                                      \
  X(ucs_status_t, ucp_worker_signal, (ucp_worker_h worker))                                                   \
  X(unsigned, ucp_worker_progress, (ucp_worker_h worker))                                                     \
  X(ucs_status_t, ucp_worker_set_am_recv_handler, (ucp_worker_h worker, const ucp_am_handler_param_t* param)) \
  X(ucs_status_t, ucp_ep_create, (ucp_worker_h worker, const ucp_ep_params_t* params, ucp_ep_h* ep))          \
  X(ucs_status_ptr_t, ucp_ep_close_nbx, (ucp_ep_h ep, const ucp_request_param_t* param))                      \
  X(void, ucp_ep_print_info, (ucp_ep_h ep, FILE* stream))                                                     \
  X(ucs_status_ptr_t, ucp_am_send_nbx,                                                                        \
    (ucp_ep_h ep, unsigned id, const void* header, size_t header_length, const void* buffer, size_t count,    \
     const ucp_request_param_t* param))                                                                       \
  X(ucs_status_ptr_t, ucp_am_recv_data_nbx,                                                                   \
    (ucp_worker_h worker, void* data_desc, void* buffer, size_t count, const ucp_request_param_t* param))     \
  X(ucs_status_t, ucp_request_check_status, (void* request))                                                  \
  X(void, ucp_request_free, (void* request))                                                                  \
  X(const char*, ucs_status_string, (ucs_status_t status))

struct Functions {
#define LAMINA_UCP_DECLARE(type, name, parameters) type(*name) parameters = nullptr;
  LAMINA_UCP_FUNCTIONS(LAMINA_UCP_DECLARE)
#undef LAMINA_UCP_DECLARE
};

}  // namespace lamina::ucp
