#include "core/activation.h"

#include "ops/operators.h"

#include <c10/util/Exception.h>

#include <iterator>
#include <string>

namespace bn::ops {
namespace {

bool always(const ActivationEntry&) {
  return true;
}

bool has_parameter(const ActivationEntry& entry) {
  return entry.parameter != nullptr;
}

// The names of the entries that `belongs` is true of.
std::string names_of(bool (*belongs)(const ActivationEntry&)) {
  std::string names;
  for (const ActivationEntry& entry : kActivations) {
    if (belongs(entry)) {
      names += (names.empty() ? "" : ", ") + std::string(entry.name);
    }
  }
  return names;
}

}  // namespace

Activation activation_of(const Name& name, const Param& param) {
  if (!name.has_value() && !param.has_value()) {
    return {};
  }
  for (size_t i = 0; i < std::size(kActivations); ++i) {
    const ActivationEntry& entry = kActivations[i];
    if (name.value_or("identity") == entry.name) {
      TORCH_CHECK_VALUE(!param.has_value() || has_parameter(entry), "batch_norm: activation_param is for ",
                        names_of(has_parameter), ", got ", *param, " with activation ", entry.name);
      const Activation activation{static_cast<ActivationKind>(i), param.value_or(entry.param)};
      TORCH_CHECK_VALUE(activation.kind != ActivationKind::CELU || activation.param != 0,
                        "batch_norm: activation_param of celu should not be 0");
      return activation;
    }
  }
  TORCH_CHECK_VALUE(false, "batch_norm: activation should be None or one of ", names_of(always), ", got ", *name);
}

Activation numbered_activation(int64_t number, double param) {
  TORCH_CHECK_VALUE(0 <= number && number < static_cast<int64_t>(std::size(kActivations)),
                    "batch_norm: activation should be the number of an activation, 0 to ", std::size(kActivations) - 1,
                    ", got ", number);
  return {static_cast<ActivationKind>(number), param};
}

const char* name_of(const Activation& activation) {
  return kActivations[static_cast<int>(activation.kind)].name;
}

std::vector<std::pair<std::string, Param>> activations() {
  std::vector<std::pair<std::string, Param>> all;
  for (const ActivationEntry& entry : kActivations) {
    all.emplace_back(entry.name, has_parameter(entry) ? Param(entry.param) : std::nullopt);
  }
  return all;
}

}  // namespace bn::ops
