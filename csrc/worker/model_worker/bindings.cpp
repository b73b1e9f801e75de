// Python bindings of csrc/worker/model_worker.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <numeric>

#include "worker/model_worker/attention_client.h"
#include "worker/model_worker/streamed_exchange.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace lamina {
namespace {

using Released = nb::call_guard<nb::gil_scoped_release>;
template <typename T, typename Shape, typename... Order>
using Array = nb::ndarray<const T, Shape, nb::device::cpu, Order...>;
using Int32s = Array<int32_t, nb::ndim<1>, nb::c_contig>;
using Int64s = Array<int64_t, nb::ndim<1>, nb::c_contig>;

template <typename T, typename... Args>
std::span<const T> as_span(const nb::ndarray<const T, Args...>& array) {
  return {array.data(), array.size()};
}

// Addresses and strides come as integers: wrapping a tensor costs microseconds, of which a layer has few.
ConstRows const_rows(uintptr_t address, int64_t stride) {
  return {reinterpret_cast<const std::byte*>(address), stride};
}
Rows rows(uintptr_t address, int64_t stride) { return {reinterpret_cast<std::byte*>(address), stride}; }
std::byte* pointer(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

using GroupArrays = std::pair<Array<int32_t, nb::ndim<2>>, Int64s>;

template <class Client>
nb::list begin_step(Client& client, uint32_t lane, int32_t num_decodes, const Int32s& query_lens,
                    const Int32s& context_lens, const std::vector<GroupArrays>& groups, double timeout) {
  StepView step{num_decodes, as_span(query_lens), as_span(context_lens), {}};
  for (const auto& [block_table, slot_mapping] : groups) {
    if (block_table.shape(0) < query_lens.size())
      throw std::invalid_argument("block_table has fewer rows than requests");
    if (block_table.shape(1) > 1 && block_table.stride(1) != 1) {
      throw std::invalid_argument("the rows of block_table must be contiguous");
    }
    step.groups.push_back({block_table.data(), block_table.stride(0), static_cast<int64_t>(block_table.shape(1)),
                           as_span(slot_mapping)});
  }
  std::vector<AttentionClient::StepRows> step_rows;
  {
    nb::gil_scoped_release released;
    step_rows = client.begin_step(lane, step, deadline_after(timeout));
  }
  nb::list by_group;
  for (const auto& rows : step_rows) by_group.append(nb::make_tuple(rows.q, rows.context));
  return by_group;
}

// The tokens of ranges, one by one.
nb::object tokens_of(const std::vector<RowRange>& ranges) {
  size_t count = 0;
  for (const RowRange& rows : ranges) count += rows.count;
  auto* tokens = new int32_t[count];
  nb::capsule owner(tokens, [](void* array) noexcept { delete[] static_cast<int32_t*>(array); });
  int32_t* next = tokens;
  for (const RowRange& rows : ranges) {
    std::iota(next, next + rows.count, static_cast<int32_t>(rows.first));
    next += rows.count;
  }
  return nb::cast(nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>(tokens, {count}, owner));
}

}  // namespace

void bind_model_worker(nb::module_& m) {
  nb::exception<AttentionWorkerError>(m, "AttentionWorkerError", PyExc_RuntimeError);
  m.def("create_turn_log", &TurnLog::create);
  nb::list bounds;
  for (const auto bound : kWaitBounds) bounds.append(std::chrono::duration<double>(bound).count());
  m.attr("WAIT_BOUNDS") = nb::tuple(bounds);
  nb::class_<Partition>(m, "Partition")
      .def_static("by_heads", &Partition::by_heads, "geometry"_a, "heads"_a)
      .def_static("by_blocks", &Partition::by_blocks, "geometry"_a, "num_blocks"_a);
  nb::class_<AttentionClient>(m, "AttentionClient")
      .def(nb::init<const std::vector<std::shared_ptr<Channel>>&, Partition>(), "channels"_a, "partition"_a)
      .def_prop_rw("generation", &AttentionClient::generation, &AttentionClient::set_generation)
      .def(
          "step_times",
          [](AttentionClient& client, uint32_t lane) {
            const auto times = client.step_times(lane);
            return nb::make_tuple(std::chrono::duration<double>(times.waiting).count(),
                                  std::chrono::duration<double>(times.attention).count());
          },
          "lane"_a)
      .def(
          "step_waits",
          [](AttentionClient& client, uint32_t lane) {
            const WaitCounts waits = client.step_times(lane).waits;
            nb::list counts;
            for (const uint32_t count : waits.counts) counts.append(count);
            return nb::make_tuple(nb::tuple(counts), std::chrono::duration<double>(waits.sum).count());
          },
          "lane"_a)
      .def(
          "share_turns",
          [](AttentionClient& client, int memory_fd, int rank) {
            client.share_turns(std::make_unique<TurnLog>(memory_fd, rank));
          },
          "memory_fd"_a, "rank"_a)
      .def("join_turn", &AttentionClient::join_turn, "lane"_a)
      .def(
          "begin_turn",
          [](AttentionClient& client, uint32_t lane, double timeout) {
            client.begin_turn(lane, deadline_after(timeout));
          },
          "lane"_a, "timeout"_a = 60.0, Released())
      .def("end_turn", &AttentionClient::end_turn, "lane"_a, Released())
      .def("begin_step", &begin_step<AttentionClient>, "lane"_a, "num_decodes"_a, "query_lens"_a, "context_lens"_a,
           "groups"_a, "timeout"_a = 60.0)
      .def(
          "post",
          [](AttentionClient& client, uint32_t lane, uint32_t layer, uintptr_t q, int64_t q_stride,
             uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, double timeout) {
            client.post(lane, layer, const_rows(q, q_stride), const_rows(k, k_stride),
                        const_rows(v, v_stride), deadline_after(timeout));
          },
          "lane"_a, "layer"_a, "q"_a, "q_stride"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a,
          "timeout"_a = 60.0, Released())
      .def(
          "collect",
          [](AttentionClient& client, uint32_t lane, uint32_t layer, uintptr_t out, int64_t out_stride,
             uintptr_t context_out, uintptr_t context_lse, double timeout) {
            client.collect(lane, layer, rows(out, out_stride), pointer(context_out), pointer(context_lse),
                           deadline_after(timeout));
          },
          "lane"_a, "layer"_a, "out"_a, "out_stride"_a, "context_out"_a = 0, "context_lse"_a = 0,
          "timeout"_a = 60.0, Released())
      .def(
          "attend",
          [](AttentionClient& client, uint32_t lane, uint32_t layer, uintptr_t q, int64_t q_stride,
             uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t out, int64_t out_stride,
             uintptr_t context_out, uintptr_t context_lse, double timeout) {
            const Deadline deadline = deadline_after(timeout);
            client.post(lane, layer, const_rows(q, q_stride), const_rows(k, k_stride),
                        const_rows(v, v_stride), deadline);
            client.collect(lane, layer, rows(out, out_stride), pointer(context_out), pointer(context_lse),
                           deadline);
          },
          "lane"_a, "layer"_a, "q"_a, "q_stride"_a, "k"_a, "k_stride"_a, "v"_a, "v_stride"_a, "out"_a,
          "out_stride"_a, "context_out"_a = 0, "context_lse"_a = 0, "timeout"_a = 60.0, Released())
      .def(
          "zero_blocks",
          [](AttentionClient& client, const Int32s& block_ids, double timeout) {
            nb::gil_scoped_release released;
            client.zero_blocks(as_span(block_ids), deadline_after(timeout));
          },
          "block_ids"_a, "timeout"_a = 60.0)
      .def(
          "copy_blocks",
          [](AttentionClient& client, const Array<int32_t, nb::shape<-1, 2>, nb::c_contig>& pairs,
             double timeout) {
            nb::gil_scoped_release released;
            client.copy_blocks(as_span(pairs), deadline_after(timeout));
          },
          "pairs"_a, "timeout"_a = 60.0)
      .def("fail_step", &AttentionClient::fail_step, "lane"_a, "why"_a)
      .def_prop_ro("failed_workers", &AttentionClient::failed_workers)
      .def("replace_channel", &AttentionClient::replace_channel, "worker"_a, "channel"_a);

  nb::class_<StreamedExchange> streamed(m, "StreamedExchange");
  streamed.attr("POISON") = StreamedExchange::kPoison;
  streamed
      .def(nb::init<AttentionClient&, uint32_t, size_t, std::optional<int>>(), "client"_a, "num_lanes"_a, "max_tokens"_a,
           "spin_us"_a.none(),
           nb::keep_alive<1, 2>())
      .def_static("memory_bytes", &StreamedExchange::memory_bytes, "geometry"_a, "num_lanes"_a, "max_tokens"_a)
      .def_prop_ro("memories",
                   [](const StreamedExchange& exchange) {
                     nb::list memories;
                     for (const auto& memory : exchange.memories()) {
                       memories.append(nb::make_tuple(reinterpret_cast<uintptr_t>(memory.data), memory.bytes));
                     }
                     return memories;
                   })
      .def(
          "words",
          [](const StreamedExchange& exchange, uint32_t lane) {
            const StreamedExchange::Words& words = exchange.words(lane);
            const auto address = [](const auto& word) { return reinterpret_cast<uintptr_t>(&word); };
            return nb::make_tuple(address(words.packed), address(words.taken), address(words.free),
                                  address(words.replied), address(words.replies));
          },
          "lane"_a)
      .def(
          "payload",
          [](const StreamedExchange& exchange, uint32_t lane, uint32_t worker, uint32_t layer) {
            return reinterpret_cast<uintptr_t>(exchange.payload(lane, worker, layer));
          },
          "lane"_a, "worker"_a, "layer"_a)
      .def("announce", &StreamedExchange::announce, "lane"_a, Released())
      .def("begin_step", &begin_step<StreamedExchange>, "lane"_a, "num_decodes"_a, "query_lens"_a, "context_lens"_a,
           "groups"_a, "timeout"_a = 60.0)
      .def(
          "part",
          [](const StreamedExchange& exchange, uint32_t lane, uint32_t worker, uint32_t group) {
            const WorkerStep& part = exchange.part(lane, worker, group);
            return nb::make_tuple(tokens_of(part.q_tokens), tokens_of(part.kv_tokens), part.num_rows_without_lse);
          },
          "lane"_a, "worker"_a, "group"_a)
      .def("finish_step", &StreamedExchange::finish_step, "lane"_a, "timeout"_a = 60.0, Released())
      .def("fail_step", &StreamedExchange::fail_step, "lane"_a, "why"_a, Released())
      .def("replace_channel", &StreamedExchange::replace_channel, "worker"_a, "channel"_a, Released())
      .def("serve_once", &StreamedExchange::serve_once, Released())
      .def("set_timeout", &StreamedExchange::set_timeout, "seconds"_a);
}

}  // namespace lamina
