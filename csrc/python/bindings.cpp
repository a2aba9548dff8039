// The Python module: it loads the operators, and shows plans and passes.

#include "cpu/driver.h"
#include "cpu/last_cache.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "ops/operators.h"
#include "ops/output_observer.h"
#include "ops/sm_margin.h"
#include "python/fakes.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <limits>
#include <map>
#include <set>

namespace {

namespace py = pybind11;
using bn::cuda::LaunchPlan;
using CpuPlan = bn::cpu::Plan;

template <class T>
T one_of(const char* what, const std::map<std::string, T>& values, const std::string& name) {
  std::string names;
  for (const auto& [known, value] : values) {
    if (known == name) {
      return value;
    }
    names += (names.empty() ? "" : ", ") + known;
  }
  throw py::value_error(std::string(what) + " should be one of " + names + ", got " + name);
}

// The pass of a layer of sizes (n, c, s), with a mask or not; a backward wants every gradient. In evaluation images
// make no sets.
bn::Pass pass_of_layer(std::array<int64_t, 3> sizes,
                       const std::string& dtype,
                       const std::string& layout,
                       const std::string& direction,
                       const std::string& activation,
                       bool residual,
                       std::optional<int64_t> set_size,
                       bool masked) {
  using bn::DType, bn::Layout, bn::Direction;
  const auto type = one_of<DType>("dtype",
                                  {{"float64", DType::Float64},
                                   {"float32", DType::Float32},
                                   {"float16", DType::Half},
                                   {"bfloat16", DType::BFloat16}},
                                  dtype);
  const auto order =
      one_of<Layout>("layout", {{"planar", Layout::Planar}, {"interleaved", Layout::Interleaved}}, layout);
  std::map<std::string, bn::ActivationKind> activations;
  for (const auto& [name, param] : bn::ops::activations()) {
    activations[name] = bn::ops::activation_of(name, param).kind;
  }
  const auto kind = one_of("activation", activations, activation);
  const bn::Chain kept = bn::backward_chain(kind, residual);
  const bn::Wants all{true, residual && !bn::dresidual_is_dy(kind, masked), true, true};
  auto pass = one_of<bn::Pass>("direction",
                               {{"forward", {{}, Direction::Forward, true, {}, {kind, residual, kept.branches}}},
                                {"inference", {{}, Direction::Forward, false, {}, {kind, residual, false}}},
                                {"backward", {{}, Direction::Backward, true, all, kept}}},
                               direction);
  const auto [n, c, s] = sizes;
  if (n < 1 || c < 1 || s < 1) {
    throw py::value_error("n, c and s should be positive");
  }
  constexpr int64_t kMostValues = std::numeric_limits<int64_t>::max() / 128;  // so that all their bytes can be counted
  if (n > kMostValues / c / s) {
    throw py::value_error("no tensor has as many values as n * c * s");
  }
  if (set_size.value_or(1) < 1) {
    throw py::value_error("set_size should be positive, got " + std::to_string(*set_size));
  }
  pass.masked = masked;
  pass.problem = bn::problem_of(order, type, n, c, s, pass.training ? std::min(set_size.value_or(n), n) : n);
  return pass;
}

// A backward that writes these gradients alone.
bn::Pass wanting(bn::Pass pass, const std::set<std::string>& names, bool training) {
  if (pass.direction != bn::Direction::Backward) {
    throw py::value_error("only a backward writes gradients");
  }
  pass.wants = {};
  pass.training = training;
  for (const std::string& name : names) {
    *one_of<bool*>("gradient",
                   {{"dx", &pass.wants.dx},
                    {"dresidual", &pass.wants.dresidual},
                    {"dweight", &pass.wants.dweight},
                    {"dbias", &pass.wants.dbias}},
                   name) = true;
  }
  return pass;
}

// The reduction or the application of a pass alone, as an operator of its own runs it.
bn::Pass only(bn::Pass pass, const std::string& stage) {
  pass.stages = one_of<bn::Stages>("stage", {{"reduce", bn::Stages::Reduce}, {"apply", bn::Stages::Apply}}, stage);
  return pass;
}

CpuPlan cpu_plan(const bn::Pass& pass, int threads, int64_t last_cache_bytes) {
  if (threads < 1 || last_cache_bytes < 1) {
    throw py::value_error("threads and last_cache_bytes should be positive");
  }
  return bn::cpu::plan(pass, threads, last_cache_bytes);
}

LaunchPlan launch_plan(const bn::Pass& pass,
                       const std::string& gpu,
                       const std::optional<std::vector<int>>& groups,
                       int margin) {
  bn::cuda::Limits limits = bn::cuda::named_limits(gpu);
  limits.margin = margin;
  if (groups.has_value()) {
    limits.clusters = bn::cuda::clusters_in(*groups, limits.max_cluster);
  }
  return bn::cuda::plan(pass, limits);
}

// Name of each activation, name of its parameter, the parameter unless given.
using KnownActivation = std::tuple<std::string, std::optional<std::string>, std::optional<double>>;

std::vector<KnownActivation> known_activations() {
  std::vector<KnownActivation> all;
  for (const auto& [name, parameter, param] : bn::kActivations) {
    all.push_back(parameter == nullptr ? KnownActivation{name, {}, {}} : KnownActivation{name, parameter, param});
  }
  return all;
}

void warn_of_fallback(const at::Tensor& input, const char* how, const char* reason) {
  const py::gil_scoped_acquire gil;
  py::module_::import("bn_ext._fallback").attr("fell_back")(input, reason, how);
}

// `observe`, in Python, gets the output and the arguments of batch_norm_elemt but with_branches.
void observe_outputs(const std::optional<py::function>& observe) {
  if (!observe.has_value()) {
    bn::ops::output_observer() = nullptr;
    return;
  }
  bn::ops::output_observer() = [observe = *observe](const at::Tensor& output, const at::Tensor& mean,
                                                    const at::Tensor& invstd, const bn::ops::Arguments& a,
                                                    bool keeps_residual) {
    const py::gil_scoped_acquire gil;
    return observe(output, a.input, a.weight, a.bias, mean, invstd, a.residual, static_cast<int>(a.activation.kind),
                   a.activation.param, a.set_size, a.mask, keeps_residual)
        .cast<bool>();
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("activations", known_activations);
  m.def(
      "backward_chain",
      [](const std::string& name, bool residual, bool frozen) {
        const bn::Chain read = bn::backward_chain(bn::ops::activation_of(name, std::nullopt).kind, residual, frozen);
        return std::pair(read.residual, read.branches);
      },
      py::arg("activation"), py::kw_only(), py::arg("residual"), py::arg("frozen") = false);
  define_fakes(m);
  m.def("observe_outputs", &observe_outputs, py::arg("observe"));
  m.def("instruction_set", &bn::cpu::instruction_set);
  m.def("last_cache_bytes", &bn::cpu::last_cache_bytes);
  m.def("set_last_cache_bytes", &bn::cpu::set_last_cache_bytes, py::arg("bytes"));
  m.def("bypasses_cache", &bn::cpu::bypasses_cache, py::arg("output_bytes"), py::arg("last_cache_bytes"));

  m.def(
      "warn_of_fallbacks", [](bool enabled) { bn::ops::fallback_observer = enabled ? warn_of_fallback : nullptr; },
      py::arg("enabled"));

  const auto traffic = [](bn::Traffic (bn::Pass::*of)() const) {
    return [of](const bn::Pass& p) { return std::pair((p.*of)().tensors, (p.*of)().branches); };
  };
  py::class_<bn::Pass>(m, "Pass")
      .def(py::init(&pass_of_layer), py::arg("sizes"), py::kw_only(), py::arg("dtype") = "float32",
           py::arg("layout") = "planar", py::arg("direction") = "forward", py::arg("activation") = "identity",
           py::arg("residual") = false, py::arg("set_size") = py::none(), py::arg("masked") = false)
      .def("wanting", &wanting, py::arg("gradients"), py::kw_only(), py::arg("training") = true)
      .def("only", &only, py::arg("stage"))
      .def_property_readonly("reduce_reads", traffic(&bn::Pass::reduce_reads))
      .def_property_readonly("apply_reads", traffic(&bn::Pass::apply_reads))
      .def_property_readonly("writes", traffic(&bn::Pass::writes))
      .def_property_readonly("holds", &bn::Pass::holds)
      .def("__eq__", [](const bn::Pass& a, const bn::Pass& b) { return a == b; });

  const auto of_patches = [](auto member) { return [member](const CpuPlan& p) { return p.patches.*member; }; };
  using bn::cpu::Patches;
  py::class_<CpuPlan>(m, "CpuPlan")
      .def_property_readonly("n", of_patches(&Patches::n))
      .def_property_readonly("c", of_patches(&Patches::c))
      .def_property_readonly("s", of_patches(&Patches::s))
      .def_property_readonly("rows", of_patches(&Patches::rows))
      .def_property_readonly("segment", of_patches(&Patches::segment))
      .def_property_readonly("segments", of_patches(&Patches::segments))
      .def_property_readonly("count", of_patches(&Patches::count))
      .def_property_readonly("per_chunk", of_patches(&Patches::per_chunk))
      .def_property_readonly("chunks", of_patches(&Patches::chunks))
      .def_property_readonly("joined", of_patches(&Patches::joined))
      .def_readonly("sets", &CpuPlan::sets)
      .def_property_readonly("last_n", [](const CpuPlan& p) { return p.last.n; })
      .def_property_readonly("last_joined", [](const CpuPlan& p) { return p.last.joined; })
      .def_readonly("tile", &CpuPlan::tile)
      .def_readonly("threads", &CpuPlan::threads)
      .def_readonly("split", &CpuPlan::split)
      .def_readonly("bypass_cache", &CpuPlan::bypass_cache)
      .def_readonly("whole_bytes", &CpuPlan::whole_bytes)
      .def_readonly("ahead", &CpuPlan::ahead)
      .def("__eq__", [](const CpuPlan& a, const CpuPlan& b) { return a == b; })
      .def("__repr__", [](const CpuPlan& p) { return "CpuPlan(" + to_string(p) + ")"; });
  m.def("cpu_plan", &cpu_plan, py::arg("call"), py::kw_only(), py::arg("threads"), py::arg("last_cache_bytes"));

  py::class_<LaunchPlan>(m, "LaunchPlan")
      .def_property_readonly("strategy", [](const LaunchPlan& p) { return name_of(p.strategy); })
      .def_property_readonly("team", [](const LaunchPlan& p) { return name_of(p.team); })
      .def_readonly("sums", &LaunchPlan::sums)
      .def_readonly("channels", &LaunchPlan::channels)
      .def_readonly("width", &LaunchPlan::width)
      .def_property_readonly("per_lane", &LaunchPlan::per_lane)
      .def_readonly("threads", &LaunchPlan::threads)
      .def_readonly("active", &LaunchPlan::active)
      .def_readonly("sets", &LaunchPlan::sets)
      .def_readonly("slabs", &LaunchPlan::slabs)
      .def_readonly("teams", &LaunchPlan::teams)
      .def_readonly("team_blocks", &LaunchPlan::team_blocks)
      .def_readonly("share", &LaunchPlan::share)
      .def_readonly("held", &LaunchPlan::held)
      .def_readonly("tensors_held", &LaunchPlan::tensors_held)
      .def_readonly("mask_parts", &LaunchPlan::mask_parts)
      .def_readonly("zeroed_branches", &LaunchPlan::zeroed_branches)
      .def_readonly("shared_bytes", &LaunchPlan::shared_bytes)
      .def_readonly("workspace_bytes", &LaunchPlan::workspace_bytes)
      .def_readonly("bytes_moved", &LaunchPlan::bytes_moved)
      .def_readonly("bytes_on_chip", &LaunchPlan::bytes_on_chip)
      .def("__eq__", [](const LaunchPlan& a, const LaunchPlan& b) { return a == b; })
      .def("__repr__", [](const LaunchPlan& p) { return "LaunchPlan(" + to_string(p) + ")"; });
  m.def("launch_plan", &launch_plan, py::arg("call"), py::arg("gpu") = "h100", py::kw_only(),
        py::arg("groups") = py::none(), py::arg("margin") = 0);
  m.def("sm_margin", [] { return bn::ops::sm_margin().load(); });
  m.def("set_sm_margin", [](int multiprocessors) { bn::ops::sm_margin() = multiprocessors; });
}
