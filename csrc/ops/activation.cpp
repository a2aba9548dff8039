#include "core/activation.h"

#include "ops/batch_norm.h"

#include <c10/util/Exception.h>

#include <iterator>
#include <string>

namespace bn::ops {
namespace {

struct Known {
  ActivationKind kind;
  const char* name;
  Param param;  // its parameter unless given, if it has one
};

constexpr Known kKnown[] = {
    {ActivationKind::Identity, "identity", std::nullopt},
    {ActivationKind::ReLU, "relu", std::nullopt},
    {ActivationKind::ReLU6, "relu6", std::nullopt},
    {ActivationKind::LeakyReLU, "leaky_relu", 0.01},
    {ActivationKind::ELU, "elu", 1.0},
    {ActivationKind::SiLU, "silu", std::nullopt},
    {ActivationKind::GELU, "gelu", std::nullopt},
    {ActivationKind::Hardswish, "hardswish", std::nullopt},
    {ActivationKind::Hardsigmoid, "hardsigmoid", std::nullopt},
    {ActivationKind::Sigmoid, "sigmoid", std::nullopt},
    {ActivationKind::Tanh, "tanh", std::nullopt},
};

static_assert(
    [] {
      for (size_t i = 0; i < std::size(kKnown); ++i) {
        if (kKnown[i].kind != static_cast<ActivationKind>(i)) {
          return false;
        }
      }
      return true;
    }(),
    "in the order of ActivationKind");

const Known& known(ActivationKind kind) {
  return kKnown[static_cast<int>(kind)];
}

}  // namespace

Activation activation_of(const Name& name, const Param& param) {
  if (!name.has_value() && !param.has_value()) {
    return {};
  }
  std::string names;
  for (const Known& one : kKnown) {
    if (name.value_or("identity") == one.name) {
      TORCH_CHECK_VALUE(!param.has_value() || one.param.has_value(),
                        "batch_norm: activation_param is for leaky_relu and elu, got ", *param, " with activation ",
                        one.name);
      return {one.kind, param.value_or(one.param.value_or(0))};
    }
    names += (names.empty() ? "" : ", ") + std::string(one.name);
  }
  TORCH_CHECK_VALUE(false, "batch_norm: activation should be None or one of ", names, ", got ", *name);
}

const char* name_of(const Activation& activation) {
  return known(activation.kind).name;
}

Param param_of(const Activation& activation) {
  return known(activation.kind).param.has_value() ? Param(activation.param) : std::nullopt;
}

std::vector<std::pair<std::string, Param>> activations() {
  std::vector<std::pair<std::string, Param>> all;
  for (const Known& one : kKnown) {
    all.emplace_back(one.name, one.param);
  }
  return all;
}

}  // namespace bn::ops
