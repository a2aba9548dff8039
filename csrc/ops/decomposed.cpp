#include "ops/checks.h"
#include "ops/inputs.h"
#include "ops/tensor_math.h"

#include <ATen/Context.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <c10/core/SymBool.h>

namespace bn::ops {
namespace {

// All dimensions but that of the channels, and the sizes that a value per channel has beside the input.
std::pair<std::vector<int64_t>, std::vector<int64_t>> dimensions(const Tensor& input) {
  std::vector<int64_t> others;
  std::vector<int64_t> per_channel(input.dim(), 1);
  per_channel[1] = -1;
  for (int64_t d = 0; d < input.dim(); ++d) {
    if (d != 1) {
      others.push_back(d);
    }
  }
  return {others, per_channel};
}

// The images of a statistic set, at least one.
c10::SymInt images_of_set(const c10::SymInt& n, int64_t set_size) {
  return TORCH_GUARD_OR_FALSE(n.sym_le(set_size)) ? n.max(1) : c10::SymInt(set_size);
}

// A row for each image, of rows for each set.
Tensor of_images(const Tensor& of_sets, const c10::SymInt& n, int64_t set_size) {
  return of_sets.repeat_interleave_symint(images_of_set(n, set_size), 0).narrow_symint(0, 0, n);
}

Tensor mean(const Tensor& t, const std::vector<int64_t>& over) {
  return t.mean(over, true);
}

Tensor sum(const Tensor& t, const std::vector<int64_t>& over) {
  return t.sum(over, true);
}

// A row for each statistic set, with what is reduced in it of each channel.
Tensor by_set(const Tensor& t, SetSize set_size, decltype(mean) reduce) {
  const auto others = dimensions(t).first;
  if (!set_size.has_value()) {
    return reduce(t, others);
  }
  const c10::SymInt n = t.sym_size(0);
  const c10::SymInt images = images_of_set(n, *set_size);
  const c10::SymInt whole = n / images;
  const c10::SymInt rest = n - whole * images;  // images of a last, smaller set
  const auto of_sets = [&](const c10::SymInt& first, const c10::SymInt& sets, const c10::SymInt& images) {
    const Tensor part = t.narrow_symint(0, first, sets * images).unflatten_symint(0, {sets, images});
    std::vector<int64_t> in_set{1};
    for (int64_t d = 3; d < part.dim(); ++d) {
      in_set.push_back(d);
    }
    return reduce(part, in_set).squeeze(1);
  };
  const Tensor rows = of_sets(0, whole, images);
  return TORCH_GUARD_OR_FALSE(rest.sym_eq(0)) ? rows : at::cat({rows, of_sets(whole * images, 1, rest)});
}

// The same, of sizes that broadcast with t.
Tensor by_image(const Tensor& t, SetSize set_size, decltype(mean) reduce) {
  const Tensor rows = by_set(t, set_size, reduce);
  return set_size.has_value() ? of_images(rows, t.sym_size(0), *set_size) : rows;
}

Tensor divided(const Tensor& a, const Tensor& b) {
  return at::where(b > 0, a / b, at::zeros({}, a.options()));
}

// A mask in the sizes and the type of what it is multiplied with.
Tensor spread_mask(const Tensor& mask, const Tensor& t) {
  return mask.unsqueeze(1).to(t.scalar_type());
}

// t, each value as much as it counts.
Tensor weighed(const Tensor& t, const OptionalTensor& mask) {
  return mask.has_value() ? t * spread_mask(*mask, t) : t;
}

// The sum of each channel in each statistic set over the number of values, of those that count by the mask.
Tensor shared_out(const Tensor& t, SetSize set_size, const OptionalTensor& mask) {
  return mask.has_value() ? divided(by_image(t, set_size, sum), by_image(spread_mask(*mask, t), set_size, sum))
                          : by_image(t, set_size, mean);
}

// The mean of each channel in each statistic set, of sizes that broadcast with t.
Tensor average(const Tensor& t, SetSize set_size, const OptionalTensor& mask) {
  return shared_out(weighed(t, mask), set_size, mask);
}

// t, and 0 where the mask is.
Tensor only(const Tensor& t, const OptionalTensor& mask) {
  return mask.has_value() ? at::where(mask->unsqueeze(1) > 0, t, at::zeros({}, t.options())) : t;
}

// Statistics of each channel, or set and channel, of sizes that broadcast with the input.
Tensor spread(const Tensor& statistics, const Tensor& input, SetSize set_size) {
  if (!set_size.has_value()) {
    return statistics.view(dimensions(input).second);
  }
  std::vector<c10::SymInt> sizes(input.dim(), 1);
  sizes[0] = statistics.sym_size(0);
  sizes[1] = statistics.sym_size(1);
  return of_images(statistics.view_symint(sizes), input.sym_size(0), *set_size);
}

OptionalTensor to(const OptionalTensor& t, at::ScalarType type) {
  return t.has_value() ? OptionalTensor(t->to(type)) : std::nullopt;
}

// torch takes parameters and statistics either all of the input's type or all float.
bool types_suit_torch(const Arguments& a) {
  std::optional<at::ScalarType> common;
  for (const OptionalTensor* t : {&a.weight, &a.bias, &a.running_mean, &a.running_var}) {
    if (t->has_value()) {
      if (common.has_value() && *common != (*t)->scalar_type()) {
        return false;
      }
      common = (*t)->scalar_type();
    }
  }
  return true;
}

// A copy of a value per channel, with one dimension: torch's backward ignores the strides of what it reads per channel,
// and refuses running statistics that were written to since.
OptionalTensor copied(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(t->reshape(-1).clone(at::MemoryFormat::Contiguous)) : std::nullopt;
}

Tensor call_torch(const Tensor& input,
                  const OptionalTensor& weight,
                  const OptionalTensor& bias,
                  const OptionalTensor& mean,
                  const OptionalTensor& var,
                  const Arguments& a,
                  double momentum) {
  const auto dense = [](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; };
  return at::batch_norm(input, dense(weight), dense(bias), mean, var, a.training, momentum, a.eps,
                        at::globalContext().userEnabledCuDNN());
}

// The normalized input, and the running statistics that are to be written.
struct Normalized {
  Tensor output;
  OptionalTensor running_mean = std::nullopt;
  OptionalTensor running_var = std::nullopt;
};

// The running statistics, moved by `momentum` towards what was observed, in type `type`. An empty batch moves none.
OptionalTensor moved(const OptionalTensor& running,
                     const Tensor& observed,
                     const Tensor& momentum,
                     at::ScalarType type,
                     const Tensor& input) {
  const bool empty = TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0));
  return running.has_value() && !empty
             ? OptionalTensor(running->to(type).lerp(observed.view_as(*running), momentum.to(type)))
             : std::nullopt;
}

// A momentum as a tensor.
Tensor as_tensor(double momentum, const Tensor& input) {
  return at::zeros({}, input.options().dtype(at::kDouble)).add(momentum);
}

// Everything in the accumulation type, the running statistics moved by `momentum` towards the batch's own.
Normalized converted(const Arguments& a, const Tensor& momentum) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  const Tensor input = a.input.to(type);
  const auto weight = to(a.weight, type);
  const auto bias = to(a.bias, type);
  if (!a.training) {
    const auto mean = copied(to(a.running_mean, type));
    const auto var = copied(to(a.running_var, type));
    return {call_torch(input, weight, bias, mean, var, a, 0).to(a.input.scalar_type())};
  }
  // With momentum 1 torch writes the batch's own statistics, if the batch has any values.
  const auto options = a.input.options().dtype(type);
  const Tensor mean = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor var = at::zeros_symint({a.input.sym_size(1)}, options);
  const Tensor output = call_torch(input, weight, bias, mean, var, a, 1).to(a.input.scalar_type());
  return {output, moved(a.running_mean, mean, momentum, type, a.input),
          moved(a.running_var, var, momentum, type, a.input)};
}

Normalized by_torch(const Arguments& a, double momentum) {
  if (!types_suit_torch(a)) {
    return converted(a, as_tensor(momentum, a.input));
  }
  if (a.training && in_functorch()) {  // where only torch's own batch norm may write to captured statistics
    const auto flat = [](const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->view(-1)) : t; };
    return {call_torch(a.input, a.weight, a.bias, flat(a.running_mean), flat(a.running_var), a, momentum)};
  }
  const auto mean = copied(a.running_mean);
  const auto var = copied(a.running_var);
  const Tensor output = call_torch(a.input, a.weight, a.bias, mean, var, a, momentum);
  return a.training ? Normalized{output, mean, var} : Normalized{output};
}

Normalized by_kernels(const Arguments& a, Tensor (*kernels)(const Arguments&)) {
  const bool cumulative = a.training && a.num_batches_tracked.has_value() && !a.momentum.has_value();
  const auto mean = a.training ? copied(a.running_mean) : a.running_mean;
  const auto var = a.training ? copied(a.running_var) : a.running_var;
  const auto counter =
      cumulative ? OptionalTensor(a.num_batches_tracked->to(at::kLong, false, /*copy=*/true)) : std::nullopt;
  const Tensor output = kernels({a.input,
                                 a.weight,
                                 a.bias,
                                 mean,
                                 var,
                                 counter,
                                 a.training,
                                 a.momentum,
                                 a.eps,
                                 std::nullopt,
                                 {},
                                 a.set_size,
                                 a.mask});
  return a.training ? Normalized{output, mean, var} : Normalized{output};
}

// In the batch's own statistics, by operators that have derivatives of every order, where torch's batch norm has wrong
// ones: from the third order on, in forward mode from the second. The mean is taken off in double precision.
Tensor by_primitives(const Arguments& a) {
  const auto type = at::toOpMathType(a.input.scalar_type());
  const auto per_channel = dimensions(a.input).second;
  const Tensor x = a.input.to(at::kDouble);
  const Tensor xmu = (x - average(x, a.set_size, a.mask)).to(type);
  Tensor z = xmu * average(xmu.square(), a.set_size, a.mask).add(a.eps).rsqrt();
  z = a.weight.has_value() ? z * a.weight->to(type).view(per_channel) : z;
  z = a.bias.has_value() ? z + a.bias->to(type).view(per_channel) : z;
  return z.to(a.input.scalar_type()).contiguous(a.input.suggest_memory_format());
}

// What divides the sum of squares within the sets, for their unbiased variance.
Tensor freedom(const Tensor& x, SetSize set_size, const OptionalTensor& mask) {
  if (!mask.has_value()) {
    const c10::SymInt values = x.sym_numel() / x.sym_size(1).max(1);
    return as_tensor(0, x).add(at::Scalar(values - sets_of(x, set_size)));
  }
  const Tensor weights = spread_mask(*mask, x);
  const Tensor total = by_set(weights, set_size, sum);
  const Tensor several = by_set((weights > 0).to(at::kDouble), set_size, sum) > 1;
  return (total - divided(by_set(weights.square(), set_size, sum), total)).mul(several).sum();
}

// In the statistics of each set. The running statistics move towards the mean of all values and the unbiased variance
// within the sets.
Normalized by_sets(const Arguments& a, const Tensor& momentum) {
  const auto others = dimensions(a.input).first;
  const Tensor x = a.input.detach().to(at::kDouble);
  const Tensor within = weighed((x - average(x, a.set_size, a.mask)).square(), a.mask).sum(others);
  const Tensor free = freedom(x, a.set_size, a.mask);
  const Tensor weight = at::where(free > 0, momentum, at::zeros({}, momentum.options()));
  return {by_primitives(a), moved(a.running_mean, average(x, std::nullopt, a.mask), weight, at::kDouble, x),
          moved(a.running_var, divided(within, free), weight, at::kDouble, x)};
}

// torch's functions, by the names in BN_ACTIVATIONS.
namespace named {
using namespace at;

Tensor identity(const Tensor& z) {
  return z;
}

Tensor gelu_tanh(const Tensor& z) {
  return at::gelu(z, "tanh");
}
}  // namespace named

// The activation of z.
Tensor activated(const Tensor& z, const Activation& activation) {
  switch (activation.kind) {
#define BN_PLAIN(Functor, name) \
  case ActivationKind::Functor: \
    return named::name(z);
#define BN_PARAMETRIC(Functor, name, parameter, preset) \
  case ActivationKind::Functor:                         \
    return named::name(z, activation.param);
    BN_ACTIVATIONS(BN_PLAIN, BN_PARAMETRIC)
#undef BN_PLAIN
#undef BN_PARAMETRIC
  }
  __builtin_unreachable();
}

// Branch bits as a tensor like dy, of type Bool; `layout` is the input's.
Tensor branches(const Tensor& branches, const Tensor& dy, Layout layout) {
  const Tensor bit = at::arange(8, branches.options());
  const Tensor bits = branches.unsqueeze(1).bitwise_right_shift(bit).bitwise_and(1).flatten().slice(0, 0, dy.numel());
  std::vector<int64_t> sizes = dy.sizes().vec();
  if (layout == Layout::Planar) {
    return bits.view(sizes).to(at::kBool);
  }
  std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
  return bits.view(sizes).movedim(-1, 1).to(at::kBool);
}

// Whether torch can add the residual, before it has normalized anything.
void check_addition(const Tensor& input, const Tensor& residual) {
  try {
    at::infer_size_symint(input.sym_sizes(), residual.sym_sizes());
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "batch_norm: residual of sizes ", residual.sym_sizes(), " for an input of sizes ",
                input.sym_sizes(), ": ", error.what_without_backtrace());
  }
  TORCH_CHECK(residual.device() == input.device() || residual.dim() == 0, "batch_norm: residual is on ",
              residual.device(), " but input is on ", input.device());
  TORCH_CHECK(!residual.is_complex(), "batch_norm: residual is of type ", residual.scalar_type());
}

void tell(const Tensor& input, const char* how, const char* reason) {
  if (const FallbackObserver observer = fallback_observer) {
    observer(input, how, reason);
  }
}

// Throws, before anything changes, where functorch refuses to write these values: to a tensor from outside a transform,
// or to one without a dimension that the values have.
void check_writable(const Arguments& a, const Tensor& mean, const Tensor& var) {
  try {
    for (const auto& [running, value] : {std::pair{*a.running_mean, mean}, {*a.running_var, var}}) {
      running.copy_(at::where(at::zeros({}, running.options().dtype(at::kBool)), value, running));
    }
  } catch (const c10::Error& error) {
    const char* what = a.set_size.has_value() ? "a set_size"
                       : a.mask.has_value()   ? "a mask"
                                              : "a cumulative average or mixed types";
    TORCH_CHECK(false, "batch_norm: under torch.func, with ", what,
                ", running_mean and running_var should be tensors that the transformed function may write to: ",
                error.what_without_backtrace());
  }
}

}  // namespace

Tensor decomposed(const Arguments& given, const char* reason, Tensor (*kernels)(const Arguments&)) {
  // What does not count may be anything: kernels do not look at it.
  const Tensor input = kernels == nullptr ? only(given.input, given.mask) : given.input;
  const Arguments a{
      input,          given.weight,   given.bias, given.running_mean, given.running_var, given.num_batches_tracked,
      given.training, given.momentum, given.eps,  given.residual,     given.activation,  given.set_size,
      given.mask};
  if (a.input.dim() >= 2 || a.input.sym_numel() != 0) {  // torch normalizes nothing, sizes (0,), to nothing
    Checks("batch_norm", a.input, a.set_size).forward(a);
  }
  if (a.residual.has_value()) {
    check_addition(a.input, *a.residual);
  }
  check_running_statistics(a, /*tracked=*/!in_functorch());
  const char* how = kernels == nullptr ? "runs on torch's own operators"
                                       : "is normalized by our kernels, and finished by torch's own operators";
  tell(a.input, how, reason);  // before anything is written: it may throw
  const bool counts = a.training && a.num_batches_tracked.has_value();
  const bool cumulative = counts && !a.momentum.has_value();
  const Tensor factor = cumulative ? a.num_batches_tracked->add(1).to(at::kDouble).reciprocal() : Tensor();
  if (counts && in_functorch()) {  // which may refuse the counter, so before torch's batch norm writes anything
    a.num_batches_tracked->add_(0);
  }
  const bool by_own = a.set_size.has_value() || (a.training && a.mask.has_value());
  Normalized n = kernels != nullptr ? by_kernels(a, kernels)
                 : by_own           ? by_sets(a, cumulative ? factor : as_tensor(a.momentum.value_or(0), a.input))
                 : cumulative       ? converted(a, factor)
                                    : by_torch(a, a.momentum.value_or(0));
  const bool torchs = kernels == nullptr && a.training && !by_own && a.input.dim() >= 2;
  if (torchs && (in_functorch() || any_of(a, has_tangent))) {
    n.output = by_primitives(a);
  }
  // What is behind the mask is cleared before the activation too, whose derivative may be NaN there.
  const Tensor z = a.residual.has_value() ? only(n.output + *a.residual, a.mask) : n.output;
  const Tensor output = only(activated(z, a.activation), a.mask);
  if (n.running_mean.has_value()) {
    const Tensor mean = n.running_mean->view_as(*a.running_mean);
    const Tensor var = n.running_var->view_as(*a.running_var);
    if (in_functorch()) {
      check_writable(a, mean, var);
    }
    a.running_mean->copy_(mean);  // from here on nothing can fail
    a.running_var->copy_(var);
  }
  if (counts && a.mask.has_value()) {
    a.num_batches_tracked->add_(freedom(a.input, a.set_size, a.mask).gt(0).to(at::kLong));
  } else if (counts) {
    a.num_batches_tracked->add_(1);
  }
  return output;
}

FourTensors decomposed_backward(const BackwardArguments& a, double eps, Layout layout, const char* reason) {
  tell(a.dy, "is differentiated by torch's own operators", reason);
  const auto type = at::toOpMathType(a.dy.scalar_type());
  const auto [others, per_channel] = dimensions(a.dy);
  Tensor invstd = spread(a.invstd.to(type), a.dy, a.set_size);
  Tensor x_hat;
  if (a.input.has_value()) {
    // The mean is taken off in double precision, as a constant: no derivative knows of it.
    Tensor xmu = (only(*a.input, a.mask).to(at::kDouble) - spread(a.mean, a.dy, a.set_size)).to(type);
    if (a.training) {
      xmu = xmu - average(xmu, a.set_size, a.mask);
      invstd = average(xmu.square(), a.set_size, a.mask).add(eps).rsqrt();
    }
    x_hat = xmu * invstd;
  }
  const activation::Any function{{}, a.activation};
  Tensor dz = only(a.dy.to(type), a.mask);
  if (a.branches.has_value()) {
    dz = function.gradient_on(branches(*a.branches, a.dy, layout), dz);
  } else if (a.activation.kind != ActivationKind::Identity) {
    Tensor z = a.weight.has_value() ? x_hat * a.weight->to(type).view(per_channel) : x_hat;
    z = a.bias.has_value() ? z + a.bias->to(type).view(per_channel) : z;
    z = a.residual.has_value() ? z + only(a.residual->to(type), a.mask) : z;
    dz = function.gradient(dz, z);
  }
  dz = only(dz, a.mask);
  const auto [wants_dx, wants_dweight, wants_dbias, wants_dresidual] = a.output_mask;
  const auto dx = [&] {
    const auto shared = [&](const Tensor& t) { return shared_out(t, a.set_size, a.mask); };
    Tensor centred = dz;
    if (a.training) {
      centred = dz - weighed(shared(dz), a.mask) - weighed(x_hat * shared(dz * x_hat), a.mask);
    }
    centred = centred * invstd;
    return (a.weight.has_value() ? centred * a.weight->to(type).view(per_channel) : centred).to(a.dy.scalar_type());
  };
  return {wants_dx ? dx() : Tensor(), wants_dweight ? (dz * x_hat).sum(others) : Tensor(),
          wants_dbias ? dz.sum(others) : Tensor(), wants_dresidual ? dz.to(a.dy.scalar_type()) : Tensor()};
}

}  // namespace bn::ops
