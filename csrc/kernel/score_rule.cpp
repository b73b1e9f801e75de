#include "kernel/score_rule.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace lamina {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_by_head(const char* name, const std::vector<float>& values, int32_t num_heads) {
  if (!values.empty() && values.size() != static_cast<size_t>(num_heads))
    refuse(std::string(name) + " has " + std::to_string(values.size()) + " values for " +
           std::to_string(num_heads) + " query heads: give one for each, or none");
  for (const float value : values)
    if (!std::isfinite(value))
      refuse(std::string(name) + " holds " + std::to_string(value) + ": use finite numbers");
}

}  // namespace

void check_score_rule(const ScoreRule& rule, const AttentionGeometry& geometry) {
  if (!std::isfinite(rule.scale)) refuse("scale = " + std::to_string(rule.scale) + " must be finite");
  if (!std::isfinite(rule.soft_cap) || rule.soft_cap < 0)
    refuse("soft_cap = " + std::to_string(rule.soft_cap) + " must be a positive number, or 0 for none");
  if (rule.window < 0)
    refuse("window = " + std::to_string(rule.window) + " must be a number of tokens, or 0 for none");
  if (rule.chunk < 0)
    refuse("chunk = " + std::to_string(rule.chunk) + " must be a number of tokens, or 0 for none");
  check_by_head("sinks", rule.sinks, geometry.num_heads);
  check_by_head("alibi_slopes", rule.alibi_slopes, geometry.num_heads);
}

}  // namespace lamina
