#include "wire/step_part.h"

#include <cstring>

namespace lamina {
namespace {

template <typename T>
void copy_out(std::byte* to, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace

size_t StepPart::payload_bytes() const {
  return StepLayout(query_lens.size(), block_ids.size(), slot_mapping.size()).bytes;
}

void StepPart::write(std::byte* payload) const {
  const StepLayout layout(query_lens.size(), block_ids.size(), slot_mapping.size());
  const StepCounts counts{
      static_cast<uint32_t>(query_lens.size()), static_cast<uint32_t>(num_rows_without_lse),
      static_cast<uint32_t>(slot_mapping.size()), static_cast<uint32_t>(block_ids.size())};
  std::memcpy(payload, &counts, sizeof counts);
  copy_out(payload + layout.query_lens, query_lens);
  copy_out(payload + layout.kv_lens, kv_lens);
  copy_out(payload + layout.block_ids, block_ids);
  copy_out(payload + layout.slot_mapping, slot_mapping);
}

void StepPart::clear() {
  query_lens.clear();
  kv_lens.clear();
  block_ids.clear();
  slot_mapping.clear();
  num_rows = num_rows_without_lse = 0;
}

}  // namespace lamina
