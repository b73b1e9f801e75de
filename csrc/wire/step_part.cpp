#include "wire/step_part.h"

#include <cstring>

namespace lamina {
namespace {

template <typename T>
void copy_out(std::byte* to, const std::vector<T>& from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace

StepCounts StepPart::counts() const {
  return {static_cast<uint32_t>(query_lens.size()),   static_cast<uint32_t>(num_rows_without_lse),
          static_cast<uint32_t>(slot_mapping.size()), static_cast<uint32_t>(block_ids.size()),
          static_cast<uint32_t>(has_positions),       0};
}

std::byte* StepPart::write(std::byte* section) const {
  const StepCounts counts = this->counts();
  const StepLayout layout(counts);
  std::memcpy(section, &counts, sizeof counts);
  copy_out(section + layout.query_lens, query_lens);
  copy_out(section + layout.kv_lens, kv_lens);
  copy_out(section + layout.block_ids, block_ids);
  copy_out(section + layout.positions, positions);
  copy_out(section + layout.block_positions, block_positions);
  copy_out(section + layout.slot_mapping, slot_mapping);
  return section + layout.bytes;
}

void StepPart::clear() {
  query_lens.clear();
  kv_lens.clear();
  block_ids.clear();
  positions.clear();
  block_positions.clear();
  slot_mapping.clear();
  num_rows = num_rows_without_lse = 0;
}

}  // namespace lamina
