// Python bindings of csrc/kernel: checked calls on NumPy arrays. The native worker calls the kernel itself.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "kernel/arena.h"
#include "kernel/attention.h"
#include "kernel/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
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
                int32_t block_size, const std::optional<std::string>& isa)
      : geometry_{parse_dtype(dtype), num_heads, num_kv_heads, head_size, block_size, head_size},
        kernel_(make_attention_kernel(geometry_, isa ? std::optional(parse_isa(*isa)) : std::nullopt)) {}

  std::string isa() const { return std::string(isa_name(kernel_->isa())); }
  size_t block_bytes() const { return kernel_->block_bytes(); }

  void append(const Bytes& layer, const ConstTokens& k, const ConstTokens& v, const Slots& slot_mapping,
              ThreadPool& threads) const {
    check_tokens("k", k, geometry_.num_kv_heads);
    check_tokens("v", v, geometry_.num_kv_heads);
    require(k.shape(0) == v.shape(0) && k.shape(0) == slot_mapping.shape(0),
            "k, v and slot_mapping must hold the same number of tokens");
    const int64_t slots = num_blocks(layer) * geometry_.block_size;
    for (size_t i = 0; i < slot_mapping.shape(0); ++i)
      if (slot_mapping(i) >= slots)
        throw std::invalid_argument("slot " + std::to_string(slot_mapping(i)) + " is outside the layer's " +
                                    std::to_string(slots) + " slots");
    nb::gil_scoped_release release;
    kernel_->append(pool(layer), k.data(), v.data(), slot_mapping.data(),
                    static_cast<int32_t>(slot_mapping.shape(0)), threads);
  }

  void copy_block(const Bytes& layer, int32_t from, int32_t to) const {
    check_block(layer, from);
    check_block(layer, to);
    if (from != to) kernel_->copy_block(pool(layer), from, to);
  }

  void zero_block(const Bytes& layer, int32_t block) const {
    check_block(layer, block);
    kernel_->zero_block(pool(layer), block);
  }

  void attend(const ConstBytes& layer, const ConstTokens& q, const Lengths& query_start_loc,
              const Lengths& kv_lens, const BlockTables& block_tables, float scale, const Tokens& out,
              const std::optional<Lse>& lse, ThreadPool& threads) const {
    check_tokens("q", q, geometry_.num_heads);
    check_tokens("out", out, geometry_.num_heads);
    require(out.shape(0) == q.shape(0), "q and out must hold the same number of tokens");
    require(!lse || (lse->shape(0) == q.shape(0) && lse->shape(1) == q.shape(1)),
            "lse must be [tokens, heads]");
    const size_t num_requests = kv_lens.shape(0);
    require(query_start_loc.shape(0) == num_requests + 1 && block_tables.shape(0) == num_requests,
            "query_start_loc needs one entry more than kv_lens, block_tables one row for each of them");
    std::vector<AttendRequest> requests;
    for (size_t r = 0; r < num_requests; ++r) {
      const int32_t begin = query_start_loc(r), end = query_start_loc(r + 1), kv_len = kv_lens(r);
      require(begin >= 0 && begin < end && end <= static_cast<int64_t>(q.shape(0)),
              "query_start_loc must increase and stay within q's tokens");
      const int64_t used = (static_cast<int64_t>(kv_len) + geometry_.block_size - 1) / geometry_.block_size;
      require(kv_len >= 0 && used <= static_cast<int64_t>(block_tables.shape(1)),
              "kv_len " + std::to_string(kv_len) + " does not fit its block table");
      const int32_t* table = block_tables.data() + r * block_tables.shape(1);
      for (int64_t b = 0; b < used; ++b) check_block(layer, table[b]);
      requests.push_back({begin, end - begin, kv_len, table});
    }
    nb::gil_scoped_release release;
    kernel_->attend(pool(layer), q.data(), requests.data(),
                    static_cast<int32_t>(num_requests), ScoreRule{scale}, 0, out.data(), lse ? lse->data() : nullptr,
                    threads);
  }

 private:
  template <class Layer>
  LayerPool pool(const Layer& layer) const {
    return {reinterpret_cast<std::byte*>(const_cast<uint8_t*>(layer.data())), kernel_->block_bytes()};
  }

  template <class Layer>
  int64_t num_blocks(const Layer& layer) const {
    return static_cast<int64_t>(layer.shape(0) / kernel_->block_bytes());
  }

  template <class Layer>
  void check_block(const Layer& layer, int32_t block) const {
    if (block >= 0 && block < num_blocks(layer)) return;
    throw std::invalid_argument("block " + std::to_string(block) + " is outside the layer's " +
                                std::to_string(num_blocks(layer)) + " blocks");
  }

  template <class Array>
  void check_tokens(const char* name, const Array& array, int32_t heads) const {
    require(array.dtype() == array_dtype(geometry_.dtype),
            std::string(name) + " must have the kernel's dtype (bfloat16 as uint16)");
    require(array.shape(1) == static_cast<size_t>(heads) &&
                array.shape(2) == static_cast<size_t>(geometry_.head_size),
            std::string(name) + " must be [tokens, " + std::to_string(heads) + ", " +
                std::to_string(geometry_.head_size) + "]");
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

  // noconvert: what the kernel writes to must not be a converted copy.
  nb::class_<CheckedKernel>(m, "AttentionKernel", "Paged attention of one geometry on one instruction set.")
      .def(nb::init<const std::string&, int32_t, int32_t, int32_t, int32_t,
                    const std::optional<std::string>&>(),
           "dtype"_a, "num_heads"_a, "num_kv_heads"_a, "head_size"_a, "block_size"_a, "isa"_a = nb::none())
      .def_prop_ro("isa", &CheckedKernel::isa)
      .def_prop_ro("block_bytes", &CheckedKernel::block_bytes)
      .def("append", &CheckedKernel::append, "layer"_a.noconvert(), "k"_a, "v"_a, "slot_mapping"_a,
           "threads"_a)
      .def("attend", &CheckedKernel::attend, "layer"_a.noconvert(), "q"_a, "query_start_loc"_a, "kv_lens"_a,
           "block_tables"_a, "scale"_a, "out"_a.noconvert(), "lse"_a.none().noconvert(), "threads"_a)
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
