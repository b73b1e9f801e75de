#include "worker/model_worker/step_view.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace lamina {

void StepView::validate(const ModelGeometry& geometry) const {
  const auto fail = [](size_t request, const std::string& what) {
    throw std::invalid_argument("request " + std::to_string(request) + " of the step " + what);
  };
  if (context_lens.size() != query_lens.size()) {
    throw std::invalid_argument("query_lens and context_lens differ in length");
  }
  if (num_decodes < 0 || static_cast<size_t>(num_decodes) > query_lens.size()) {
    throw std::invalid_argument("num_decodes is " + std::to_string(num_decodes) + " of " +
                                std::to_string(query_lens.size()) + " requests");
  }
  if (groups.size() != geometry.groups().size()) {
    throw std::invalid_argument("a step has block tables of " + std::to_string(groups.size()) + " groups, the model " +
                                std::to_string(geometry.groups().size()));
  }
  int64_t num_tokens = 0;
  for (size_t i = 0; i < query_lens.size(); ++i) {
    const int64_t length = static_cast<int64_t>(query_lens[i]) + context_lens[i];
    if (query_lens[i] < 1) fail(i, "has no query tokens");
    if (decodes(i) && query_lens[i] != 1) fail(i, "decodes more than one token");
    if (context_lens[i] < 0) fail(i, "has a negative context length");
    if (length > std::numeric_limits<int32_t>::max()) fail(i, "is too long");
    for (size_t g = 0; g < groups.size(); ++g) {
      const int32_t block_size = geometry.groups()[g].block_size;
      if ((length + block_size - 1) / block_size > groups[g].block_table_width) {
        fail(i, "needs more blocks than its block table has");
      }
    }
    num_tokens += query_lens[i];
  }
  for (const GroupView& group : groups) {
    if (num_tokens == static_cast<int64_t>(group.slot_mapping.size())) continue;
    throw std::invalid_argument("slot_mapping has " + std::to_string(group.slot_mapping.size()) + " entries for " +
                                std::to_string(num_tokens) + " query tokens");
  }
}

Attended StepView::attended(size_t request, const GroupView& view, const GroupGeometry& group) const {
  const int32_t context_len = context_lens[request];
  const int32_t num_rows = decodes(request) ? 1 : group.reach.context_rows(context_len, query_lens[request]);
  if (num_rows == 0) return {0, 0, 0, {}};
  const int32_t end = context_len + (decodes(request) ? 1 : 0);
  const int32_t first = group.reach.first_seen(context_len) / group.block_size;
  const int32_t last = (end - 1) / group.block_size;
  const int32_t* ids = view.block_table + static_cast<int64_t>(request) * view.block_table_stride;
  const int32_t first_position = first * group.block_size;
  return {num_rows, end - first_position, first_position,
          {ids + first, static_cast<size_t>(last - first) + 1}};
}

}  // namespace lamina
