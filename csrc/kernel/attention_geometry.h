// Shape of one layer's attention: what the kernel, the wire and both ends of the exchange must know of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lamina {

enum class DType : uint8_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("unknown dtype '" + name + "': use float32, bfloat16 or float16");
}

inline constexpr int32_t kMaxHeads = 1 << 14;
inline constexpr int32_t kMinHeadSize = 32, kMaxHeadSize = 1024;
inline constexpr int32_t kMaxBlockSize = 1 << 14;

// Shape of one layer's attention. KV is kept in `dtype`, the dtype of q, k, v and the output.
struct AttentionGeometry {
  DType dtype;
  int32_t num_heads;     // query heads, a multiple of num_kv_heads, at most kMaxHeads
  int32_t num_kv_heads;
  int32_t head_size;     // of q and k: kMinHeadSize..kMaxHeadSize, a multiple of 16
  int32_t block_size;    // tokens per KV block, a multiple of 16, at most kMaxBlockSize
  int32_t head_size_v;   // of v and the output: as head_size
  // v is the first head_size_v elements of k, which alone is sent and kept (multi-head latent attention): one KV head.
  bool latent = false;

  bool operator==(const AttentionGeometry&) const = default;
};

}  // namespace lamina
