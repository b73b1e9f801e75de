#include "worker/model_worker/step_view.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace lamina {

void StepView::validate(int32_t block_size) const {
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
  int64_t num_tokens = 0;
  for (size_t i = 0; i < query_lens.size(); ++i) {
    const int64_t length = static_cast<int64_t>(query_lens[i]) + context_lens[i];
    if (query_lens[i] < 1) fail(i, "has no query tokens");
    if (decodes(i) && query_lens[i] != 1) fail(i, "decodes more than one token");
    if (context_lens[i] < 0) fail(i, "has a negative context length");
    if (length > std::numeric_limits<int32_t>::max()) fail(i, "is too long");
    if ((length + block_size - 1) / block_size > block_table_width) {
      fail(i, "needs more blocks than its block table has");
    }
    num_tokens += query_lens[i];
  }
  if (num_tokens != static_cast<int64_t>(slot_mapping.size())) {
    throw std::invalid_argument("slot_mapping has " + std::to_string(slot_mapping.size()) + " entries for " +
                                std::to_string(num_tokens) + " query tokens");
  }
}

}  // namespace lamina
