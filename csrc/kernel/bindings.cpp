// Python bindings of csrc/kernel: checked calls on NumPy arrays. The native worker calls the kernel itself.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernel/arena.h"
#include "kernel/attention.h"
#include "kernel/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

// Blocks of a layer: [num_blocks, block_bytes], whose rows may lie apart.
using Blocks = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;
// Tokens in the KV dtype; bfloat16 comes as its bits in uint16, for which NumPy has a type.
using Tokens = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ConstTokens = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Slots = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Lengths = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BlockTables = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Lse = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& otherwise) {
  if (!condition) throw std::invalid_argument(otherwise);
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx})
    if (isa_name(isa) == name) return isa;
  throw std::invalid_argument("unknown instruction set '" + name +
                              "': use portable, avx2, avx512, avx512_bf16 or amx");
}

nb::dlpack::dtype array_dtype(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return nb::dtype<uint16_t>();
    case DType::kFloat16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    default: return nb::dtype<float>();
  }
}

// A kernel with its geometry, against which arguments are checked before native code trusts them.
class CheckedKernel {
 public:
  CheckedKernel(const std::string& dtype, int32_t num_heads, int32_t num_kv_heads, int32_t head_size,
                int32_t block_size, const std::optional<std::string>& isa, std::optional<int32_t> head_size_v,
                bool latent)
      : geometry_{parse_dtype(dtype), num_heads, num_kv_heads, head_size, block_size,
                  head_size_v.value_or(head_size), latent},
        kernel_(make_attention_kernel(geometry_, isa ? std::optional(parse_isa(*isa)) : std::nullopt)) {}

  std::string isa() const { return std::string(isa_name(kernel_->isa())); }
  size_t block_bytes() const { return kernel_->block_bytes(); }

  void append(const Blocks& layer, const ConstTokens& k, const std::optional<ConstTokens>& v,
              const Slots& slot_mapping, ThreadPool& threads) const {
    const LayerPool pool = layer_pool(layer);
    check_tokens("k", k, geometry_.num_kv_heads, geometry_.head_size);
    require(v.has_value() != geometry_.latent, "a latent cache takes k alone, any other k and v");
    if (v) check_tokens("v", *v, geometry_.num_kv_heads, geometry_.head_size_v);
    require((!v || k.shape(0) == v->shape(0)) && k.shape(0) == slot_mapping.shape(0),
            "k, v and slot_mapping must hold the same number of tokens");
    const int64_t slots = static_cast<int64_t>(layer.shape(0)) * geometry_.block_size;
    for (size_t i = 0; i < slot_mapping.shape(0); ++i)
      if (slot_mapping(i) >= slots)
        throw std::invalid_argument("slot " + std::to_string(slot_mapping(i)) + " is outside the layer's " +
                                    std::to_string(slots) + " slots");
    nb::gil_scoped_release release;
    kernel_->append(pool, k.data(), v ? v->data() : nullptr, slot_mapping.data(),
                    static_cast<int32_t>(slot_mapping.shape(0)), threads);
  }

  void copy_block(const Blocks& layer, int32_t from, int32_t to) const {
    const LayerPool pool = layer_pool(layer);
    check_block(layer, from);
    check_block(layer, to);
    if (from != to) kernel_->copy_block(pool, from, to);
  }

  void zero_block(const Blocks& layer, int32_t block) const {
    const LayerPool pool = layer_pool(layer);
    check_block(layer, block);
    kernel_->zero_block(pool, block);
  }

  void attend(const Blocks& layer, const ConstTokens& q, const Lengths& query_start_loc,
              const Lengths& kv_lens, const BlockTables& block_tables, const ScoreRule& rule,
              const Tokens& out, const std::optional<Lse>& lse, ThreadPool& threads,
              const std::optional<Lengths>& positions, const std::optional<BlockTables>& block_positions,
              int32_t num_complete_tokens) const {
    const LayerPool pool = layer_pool(layer);
    check_score_rule(rule, geometry_);
    check_tokens("q", q, geometry_.num_heads, geometry_.head_size);
    check_tokens("out", out, geometry_.num_heads, geometry_.head_size_v);
    require(out.shape(0) == q.shape(0), "q and out must hold the same number of tokens");
    require(!lse || (lse->shape(0) == q.shape(0) && lse->shape(1) == q.shape(1)),
            "lse must be [tokens, heads]");
    const size_t num_requests = kv_lens.shape(0), max_blocks = block_tables.shape(1);
    require(query_start_loc.shape(0) == num_requests + 1 && block_tables.shape(0) == num_requests,
            "query_start_loc needs one entry more than kv_lens, block_tables one row for each of them");
    require(positions ? positions->shape(0) == num_requests : !rule.needs_positions(),
            "a window, a chunk and ALiBi need one position for each request");
    require(!block_positions ||
                (block_positions->shape(0) == num_requests && block_positions->shape(1) == max_blocks),
            "block_positions must have the shape of block_tables");
    require(num_complete_tokens >= 0 && static_cast<size_t>(num_complete_tokens) <= q.shape(0),
            "num_complete_tokens = " + std::to_string(num_complete_tokens) + " is not among q's tokens");
    std::vector<AttendRequest> requests;
    for (size_t r = 0; r < num_requests; ++r) {
      const int32_t begin = query_start_loc(r), end = query_start_loc(r + 1), kv_len = kv_lens(r);
      require(begin >= 0 && begin < end && end <= static_cast<int64_t>(q.shape(0)),
              "query_start_loc must increase and stay within q's tokens");
      const int64_t used = (static_cast<int64_t>(kv_len) + geometry_.block_size - 1) / geometry_.block_size;
      require(kv_len >= 0 && used <= static_cast<int64_t>(max_blocks),
              "kv_len " + std::to_string(kv_len) + " does not fit its block table");
      AttendRequest request{begin, end - begin, kv_len, block_tables.data() + r * max_blocks};
      if (positions) request.position = (*positions)(r);
      require(request.position >= 0 &&
                  request.position <= std::numeric_limits<int32_t>::max() - request.query_len,
              "position " + std::to_string(request.position) + " is out of range");
      if (block_positions) request.block_positions = block_positions->data() + r * max_blocks;
      for (int64_t b = 0; b < used; ++b) check_block(layer, request.block_table[b]);
      requests.push_back(request);
    }
    nb::gil_scoped_release release;
    kernel_->attend(pool, q.data(), requests.data(), static_cast<int32_t>(num_requests), rule,
                    num_complete_tokens, out.data(), lse ? lse->data() : nullptr, threads);
  }

 private:
  LayerPool layer_pool(const Blocks& layer) const {
    const auto bytes = static_cast<int64_t>(kernel_->block_bytes());
    require(layer.shape(1) == static_cast<size_t>(bytes) && layer.stride(1) == 1 && layer.stride(0) >= bytes,
            "a layer must be [blocks, " + std::to_string(bytes) + "], each block contiguous");
    return {reinterpret_cast<std::byte*>(layer.data()), static_cast<size_t>(layer.stride(0))};
  }

  void check_block(const Blocks& layer, int32_t block) const {
    if (block >= 0 && static_cast<size_t>(block) < layer.shape(0)) return;
    throw std::invalid_argument("block " + std::to_string(block) + " is outside the layer's " +
                                std::to_string(layer.shape(0)) + " blocks");
  }

  template <class Array>
  void check_tokens(const char* name, const Array& array, int32_t heads, int32_t head_size) const {
    require(array.dtype() == array_dtype(geometry_.dtype),
            std::string(name) + " must have the kernel's dtype (bfloat16 as uint16)");
    require(array.shape(1) == static_cast<size_t>(heads) && array.shape(2) == static_cast<size_t>(head_size),
            std::string(name) + " must be [tokens, " + std::to_string(heads) + ", " +
                std::to_string(head_size) + "]");
  }

  AttentionGeometry geometry_;
  std::unique_ptr<AttentionKernel> kernel_;
};

}  // namespace

void bind_kernel(nb::module_& m) {
  nb::class_<Arena>(m, "Arena", "Zeroed memory on huge pages.")
      .def(nb::init<size_t>(), "size"_a)
      .def_prop_ro("size", &Arena::size, "Bytes, a multiple of 2 MiB.")
      .def(
          "array",
          [](Arena& arena) {
            return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(arena.data(), {arena.size()},
                                                                nb::find(arena));
          },
          "The memory as a uint8 array that keeps the arena alive.");

  nb::class_<ThreadPool>(m, "ThreadPool", "The threads a kernel call runs on, the caller's included.")
      .def(nb::init<int, std::vector<int>, int>(), "num_threads"_a, "cpus"_a = std::vector<int>(),
           "spin_us"_a = 100)
      .def_prop_ro("size", &ThreadPool::size)
      .def("pin_caller", &ThreadPool::pin_caller, "Pins the calling thread to cpus[0].");

  nb::class_<ScoreRule>(m, "ScoreRule", "What a layer does with scores.")
      .def(
          "__init__",
          [](ScoreRule* self, float scale, float soft_cap, int32_t window, int32_t chunk,
             std::vector<float> sinks, std::vector<float> alibi_slopes) {
            new (self) ScoreRule{scale, soft_cap, window, chunk, std::move(sinks), std::move(alibi_slopes)};
          },
          "scale"_a, "soft_cap"_a = 0.0f, "window"_a = 0, "chunk"_a = 0, "sinks"_a = std::vector<float>(),
          "alibi_slopes"_a = std::vector<float>());

  // noconvert: what the kernel writes to must not be a converted copy.
  nb::class_<CheckedKernel>(m, "AttentionKernel", "Paged attention of one geometry on one instruction set.")
      .def(nb::init<const std::string&, int32_t, int32_t, int32_t, int32_t,
                    const std::optional<std::string>&, std::optional<int32_t>, bool>(),
           "dtype"_a, "num_heads"_a, "num_kv_heads"_a, "head_size"_a, "block_size"_a, "isa"_a = nb::none(),
           "head_size_v"_a = nb::none(), "latent"_a = false)
      .def_prop_ro("isa", &CheckedKernel::isa)
      .def_prop_ro("block_bytes", &CheckedKernel::block_bytes)
      .def("append", &CheckedKernel::append, "layer"_a.noconvert(), "k"_a, "v"_a.none(), "slot_mapping"_a,
           "threads"_a)
      .def("attend", &CheckedKernel::attend, "layer"_a.noconvert(), "q"_a, "query_start_loc"_a, "kv_lens"_a,
           "block_tables"_a, "rule"_a, "out"_a.noconvert(), "lse"_a.none().noconvert(), "threads"_a,
           "positions"_a = nb::none(), "block_positions"_a = nb::none(), "num_complete_tokens"_a = 0)
      .def("copy_block", &CheckedKernel::copy_block, "layer"_a.noconvert(), "source"_a, "destination"_a)
      .def("zero_block", &CheckedKernel::zero_block, "layer"_a.noconvert(), "block"_a);

  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Names of the kernel variants this CPU can run, best last.");
}

}  // namespace lamina
