// What does not depend on the variant: its choice for this CPU and geometry, and whole-block operations.
#include "kernel/attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel/cpu_features.h"
#include "kernel/isa/variants.h"
#include "kernel/paged_attention.h"

namespace lamina {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check(const AttentionGeometry& g) {
  if (g.dtype != DType::kFloat32 && g.dtype != DType::kBFloat16 && g.dtype != DType::kFloat16)
    refuse("unknown KV dtype code " + std::to_string(static_cast<int>(g.dtype)) +
           ": use 0 (float32), 1 (bfloat16) or 2 (float16)");
  if (g.num_kv_heads < 1 || g.num_heads < g.num_kv_heads || g.num_heads % g.num_kv_heads != 0)
    refuse("num_heads = " + std::to_string(g.num_heads) +
           " must be a positive multiple of num_kv_heads = " + std::to_string(g.num_kv_heads));
  const auto check_head_size = [](const char* name, int32_t size) {
    if (size < kMinHeadSize || size > kMaxHeadSize || size % 16 != 0)
      refuse(std::string(name) + " = " + std::to_string(size) + " must be a multiple of 16 from " +
             std::to_string(kMinHeadSize) + " to " + std::to_string(kMaxHeadSize));
  };
  check_head_size("head_size", g.head_size);
  check_head_size("head_size_v", g.head_size_v);
  if (g.latent && (g.num_kv_heads != 1 || g.head_size_v > g.head_size))
    refuse("a latent cache has one KV head, and values no longer than its keys, not num_kv_heads = " +
           std::to_string(g.num_kv_heads) + ", head_size = " + std::to_string(g.head_size) +
           ", head_size_v = " + std::to_string(g.head_size_v));
  if (g.block_size < 16 || g.block_size % 16 != 0)
    refuse("block_size = " + std::to_string(g.block_size) +
           " must be a multiple of 16: set vLLM's --block-size to 32, 64 or 128");
  // Far beyond any model's; no size of a block or a row can overflow then.
  if (g.num_heads > kMaxHeads)
    refuse("num_heads = " + std::to_string(g.num_heads) + " is more than " + std::to_string(kMaxHeads));
  if (g.block_size > kMaxBlockSize)
    refuse("block_size = " + std::to_string(g.block_size) + " is more than " + std::to_string(kMaxBlockSize));
}

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

}  // namespace

void AttentionKernel::copy_block(LayerPool layer, int32_t from, int32_t to) const {
  std::memcpy(layer.block(to), layer.block(from), block_bytes());
}

void AttentionKernel::zero_block(LayerPool layer, int32_t block) const {
  std::memset(layer.block(block), 0, block_bytes());
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kPortable};
#ifdef LAMINA_HAS_AVX2
  if (cpu_has_avx2()) isas.push_back(Isa::kAvx2);
#endif
#ifdef LAMINA_HAS_AVX512
  if (cpu_has_avx512()) isas.push_back(Isa::kAvx512);
#endif
#ifdef LAMINA_HAS_AVX512_BF16
  if (cpu_has_avx512_bf16()) isas.push_back(Isa::kAvx512Bf16);
#endif
#ifdef LAMINA_HAS_AMX
  if (cpu_has_amx()) isas.push_back(Isa::kAmx);
#endif
  return isas;
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
  }
  return "unknown";
}

std::unique_ptr<AttentionKernel> make_attention_kernel(const AttentionGeometry& geometry,
                                                       std::optional<Isa> isa) {
  check(geometry);
  std::vector<Isa> usable = available_isas();
  if (geometry.dtype != DType::kBFloat16)
    std::erase_if(usable, [](Isa i) { return i == Isa::kAvx512Bf16 || i == Isa::kAmx; });
  const Isa chosen = isa.value_or(usable.back());
  if (std::find(usable.begin(), usable.end(), chosen) == usable.end())
    refuse("the " + std::string(isa_name(chosen)) +
           " kernel is not available for this dtype on this CPU in this build; "
           "available: " +
           names(usable));
  const auto make = [&](BlockLayout layout, const RowOps& ops) {
    return std::make_unique<PagedAttention>(geometry, chosen, layout, ops);
  };
  switch (chosen) {
#ifdef LAMINA_HAS_AMX
    case Isa::kAmx: return make(BlockLayout::kTiles, amx_row_ops());
#endif
#ifdef LAMINA_HAS_AVX512_BF16
    case Isa::kAvx512Bf16: return make(BlockLayout::kTiles, avx512_bf16_row_ops());
#endif
#ifdef LAMINA_HAS_AVX512
    case Isa::kAvx512: return make(BlockLayout::kPanels, avx512_row_ops(geometry.dtype));
#endif
#ifdef LAMINA_HAS_AVX2
    case Isa::kAvx2: return make(BlockLayout::kPanels, avx2_row_ops(geometry.dtype));
#endif
    default: return make(BlockLayout::kPanels, portable_row_ops(geometry.dtype));
  }
}

}  // namespace lamina
