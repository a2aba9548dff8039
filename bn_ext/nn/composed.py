"""Batch norms that are composed of stages, because something stands between statistics and normalization.

A :class:`Rule` says what: which values share statistics, and how the gradient goes through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import is_tracing
from torch.overrides import handle_torch_function, has_torch_function

from bn_ext import activation as activations
from bn_ext._fallback import fell_back
from bn_ext._load import _C
from bn_ext.functional import EXPORTED, addition_error, exporting, finished, has_kernels, masked
from bn_ext.stages import Chain, Moments, Statistics, Sums, backward_elemt, backward_reduce, elemt, stats

# The activations whose gradient is known by a bit an element: none then depends on the weight of the backward.
_WITH_BRANCHES = tuple(name for name in activations.NAMES if _C.backward_chain(name, residual=True)[1])

_HALVES = (torch.bfloat16, torch.float16)
_TYPES = (torch.float64, torch.float32, *_HALVES)

_APART = "the residual differs from the input in sizes, dtype, device or layout"


class Rule:
    """The statistics of a call. Rules are values: what a backward needs of them does not change."""

    set_size: int | None = None
    reduces: bool = True  # the input, for statistics of the batch
    mask: Tensor | None = None  # how much each value counts, in numbers that are not negative

    def given(self) -> Moments:
        """The moments to normalize by, where none of the batch's are."""
        raise NotImplementedError

    def merged(self, moments: Moments) -> Moments:
        """The moments that the values share, of the moments that a reduction found."""
        return moments

    def statistics(self, merged: Moments) -> Statistics:
        """The statistics to normalize by, a row for each set, and the values that share each."""
        raise NotImplementedError

    def of_sets(self, parameter: Tensor | None) -> Tensor | None:
        """A weight or bias as stages take it."""
        return parameter

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        """The sums and the weight with which :func:`backward_elemt` gives the gradient of the input."""
        raise NotImplementedError

    def gradients(self, sums: Sums, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias."""
        return sums.gradients(statistics)

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of (N, C, S), to broadcast with it, by operators that have derivatives of every order."""
        raise NotImplementedError


def transformed() -> bool:
    """Whether something has to see through a call: torch.func, forward-mode AD, or a trace."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_tracing()


def check_input(input: Tensor, channels: int) -> None:
    """Raises the errors of an input (N, C, *) that the stages do not raise, or in their own names."""
    if input.dtype not in _TYPES:
        asked = "float64, float32, bfloat16 or float16"
        raise NotImplementedError(f"batch_norm(): expected an input of type {asked}, got {input.dtype}")
    if input.layout != torch.strided:
        raise NotImplementedError(f"batch_norm(): expected a strided input, got {input.layout}")
    if not is_tracing() and input.size(1) != channels:  # a trace would keep the result, and warn
        raise RuntimeError(f"running_mean should contain {input.size(1)} elements not {channels}")


def check_operands(input: Tensor, residual: Tensor | None, **parameters: Tensor | None) -> None:
    """Raises the errors of what does not go with the input, before the input is reduced."""
    types = (input.dtype, torch.float32) if input.dtype in _HALVES else (input.dtype,)
    for name, parameter in parameters.items():
        if parameter is not None and parameter.dtype not in types:
            asked = " or ".join(map(str, types))
            raise RuntimeError(
                f"batch_norm: expected {name} of type {asked} for an input of type {input.dtype}, got {parameter.dtype}"
            )
    if residual is not None and residual.shape != input.shape:
        try:
            torch.broadcast_shapes(residual.shape, input.shape)
        except RuntimeError as error:
            raise addition_error(residual, input, error) from None


def check_training(input: Tensor, channels: int, eps: float) -> None:
    """Raises the errors of a batch norm in training that the stages do not raise, before anything is written."""
    check_input(input, channels)
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


@torch.no_grad()
def moments_of(input: Tensor, rule: Rule, owner: object) -> Moments:
    """The moments by which a call of the batch norm ``owner`` normalizes. Modes of torch functions can override it."""
    if has_torch_function((input,)):
        return handle_torch_function(moments_of, (input,), input, rule, owner)
    return rule.merged(stats(input.detach(), rule.set_size, rule.mask)) if rule.reduces else rule.given()


def composed(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule, eps: float, chain: Chain, owner: object
) -> tuple[Tensor, Moments | None]:
    """Normalizes by a rule. Gives the output, and the moments that the values of the batch share, without gradient."""
    residual = chain.residual
    if chain.activation == "identity":
        chain = chain._replace(activation=None)
    if reason := _obstacle(input.device):
        fell_back(input, reason)
        output = _by_primitives(input, weight, bias, rule, eps, chain)
        return output, _merged(input.detach(), rule) if rule.reduces else None
    apart = residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype)
    if apart:
        fell_back(input, _APART, "is normalized by our kernels, and finished by torch's own operators")
    merged = moments_of(input, rule, owner)
    output = _Composed.apply(
        input,
        weight,
        bias,
        None if apart else residual,
        merged,
        rule,
        eps,
        Chain() if apart else chain._replace(residual=None),
    )
    if apart:
        output = finished(output, residual, chain.activation, chain.activation_param, rule.mask)
    return output, merged if rule.reduces else None


def _obstacle(device: torch.device) -> str:
    """Why torch's own operators answer a call; empty if the stages do."""
    if transformed():
        return "torch.func, forward-mode AD or a trace has to see through it"
    if exporting():
        return EXPORTED
    return "" if has_kernels(device) else "there are no kernels for this device"


def _rows(input: Tensor) -> Tensor:
    """Views an input of any rank as (N, C, S)."""
    return input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)


def rows_of_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Views the mask of an input as (N, 1, S), to broadcast with its rows."""
    return _rows(mask.unsqueeze(1)).to(x.dtype)


def _merged(input: Tensor, rule: Rule) -> Moments:
    """The moments of a call by standard operators."""
    x = _rows(masked(input, rule.mask)).to(torch.float32 if input.is_mps else torch.float64)
    others = [0, 2] if rule.set_size is None else [2]
    # A trace follows sums of ones, where it would keep the example's sizes as numbers.
    weights = torch.ones_like(x.sum(1, True)) if rule.mask is None else rows_of_mask(rule.mask, x)
    values = weights.sum((1, 2))
    counts = values.sum() if rule.set_size is None else values
    mean = (x * weights).sum(others) / torch.where(counts > 0, counts, 1).unsqueeze(-1)
    return rule.merged(Moments(counts, mean, ((x - mean.unsqueeze(-1)).square() * weights).sum(others)))


def _by_primitives(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule, eps: float, chain: Chain
) -> Tensor:
    x = _rows(masked(input, rule.mask).to(torch.promote_types(input.dtype, torch.float32)))

    def spread(t: Tensor) -> Tensor:
        return t.to(x.dtype).unsqueeze(-1)

    mean, var = rule.by_primitives(x)
    z = (x - mean) * (var + eps).rsqrt()
    weight, bias = rule.of_sets(weight), rule.of_sets(bias)
    z = z if weight is None else z * spread(weight)
    z = z if bias is None else z + spread(bias)
    output = masked(z.view(input.shape).to(input.dtype), rule.mask)
    return finished(output, chain.residual, chain.activation, chain.activation_param, rule.mask)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        merged: Moments,
        rule: Rule,
        eps: float,
        chain: Chain,
    ) -> Tensor:
        statistics = rule.statistics(merged)
        keeps = chain.activation in _WITH_BRANCHES and any(ctx.needs_input_grad)
        fused = chain._replace(residual=residual, keeps_branches=keeps)
        parameters = rule.of_sets(weight), rule.of_sets(bias)
        output, branches = elemt(input, statistics, *parameters, fused, rule.set_size, rule.mask)
        kept = residual if chain.activation is not None and not keeps else None
        ctx.save_for_backward(input, weight, bias, kept, branches, *merged[:3], *statistics)
        ctx.rule, ctx.eps, ctx.chain, ctx.adds = rule, eps, chain, residual is not None
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, residual, branches, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_gradients(ctx, dy, input, weight, bias, residual), None, None, None, None
        merged, statistics = Moments(*saved[:3]), Statistics(*saved[3:])
        rule, of_values = ctx.rule, (ctx.rule.set_size, ctx.rule.mask)
        chain = ctx.chain._replace(residual=residual, branches=branches)
        parameters = rule.of_sets(weight), rule.of_sets(bias)
        sums = backward_reduce(dy, input, statistics, *parameters, chain, *of_values)
        through, scale = sums, parameters[0]
        if ctx.needs_input_grad[0]:
            through, scale = rule.through(sums, statistics, merged, parameters[0])
        dx, dresidual = backward_elemt(dy, input, statistics, through, scale, parameters[1], chain, *of_values)
        dweight, dbias = rule.gradients(sums, statistics)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dresidual if ctx.adds and chain.activation is not None else masked(dy, rule.mask) if ctx.adds else None,
            None,
            None,
            None,
            None,
        )


def _gradients(ctx: Any, dy: Tensor, input: Any, weight: Any, bias: Any, residual: Any) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual by primitives, to be differentiated again."""
    chain = ctx.chain._replace(residual=residual)
    if ctx.adds and residual is None and chain.activation is not None:
        raise RuntimeError(
            f"a second derivative needs the residual, which {chain.activation} does not keep: add it and apply the "
            "activation after the batch norm"
        )
    reason, how = "its gradient may be differentiated again", "is differentiated by torch's own operators"
    fell_back(input, reason, how)
    output = _by_primitives(input, weight, bias, ctx.rule, ctx.eps, chain)
    leaves = [input, weight, bias, residual]
    wanted = [wants and leaf is not None for leaf, wants in zip(leaves, ctx.needs_input_grad)]
    found = torch.autograd.grad(output, [leaf for leaf, wants in zip(leaves, wanted) if wants], dy, create_graph=True)
    given = iter(found)
    gradients = [next(given) if wants else None for wants in wanted]
    return *gradients[:3], masked(dy, ctx.rule.mask) if ctx.adds and residual is None else gradients[3]


@torch.no_grad()
def move_statistics(
    moments: Moments,
    running_mean: Tensor,
    running_var: Any,
    counter: Tensor | None,
    momentum: float | None,
    values: Tensor | None = None,
) -> None:
    """Moves running statistics, (C,) or rows of (D, C), towards the mean and the unbiased variance of ``moments``.

    Rows of at most one value stay, and their counters. ``values`` is how many values that count alike have means that
    vary as these do, where values do not count alike. Modes of torch functions can override it.
    """
    given = moments, running_mean, running_var, counter, momentum, values
    if has_torch_function((running_mean,)):
        handle_torch_function(move_statistics, (running_mean,), *given)
        return
    if values is not None:
        moments = Moments(values, moments.mean, moments.m2 * (values / torch.where(values > 0, moments.counts, 1)))
    counts = moments.counts.unsqueeze(-1)
    if momentum is not None:
        share = torch.full_like(counts, momentum)
    else:
        share = torch.zeros_like(counts) if counter is None else 1 / (counter + 1).to(counts.dtype).unsqueeze(-1)
    for running, new in ((running_mean, moments.mean), (running_var, moments.m2 / (counts - 1).clamp(min=1))):
        running.copy_(torch.where(counts > 1, running.to(new.dtype).lerp(new, share), running))
    if counter is not None:
        counter.add_(1 if counter.dim() == 0 and values is None else moments.counts > 1)
