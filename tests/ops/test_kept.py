"""Autograd keeps no more of a call than its backward needs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    MODES,
    STRAIGHT,
    Arguments,
    Case,
    Types,
    channels_last,
    contiguous,
    transposed,
)
from torch import Tensor

import bn_ext
from bn_ext.activation import NAMES
from bn_ext.functional import batch_norm

every_activation = pytest.mark.parametrize("activation", NAMES)
with_and_without_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
LAYOUTS = contiguous, channels_last, transposed
layouts = pytest.mark.parametrize("layout", LAYOUTS)
EVALUATION = MODES[2]


class Kept:
    """Bytes of the tensors that autograd keeps, but for those given."""

    def __init__(self, *known: Tensor | None) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.bytes: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in self.known:
            self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def total(self) -> int:
        return sum(self.bytes.values())


def call(a: Arguments) -> Tensor:
    norm = a.input, a.running_mean, a.running_var, a.weight, a.bias, a.training
    return batch_norm(*norm, residual=a.residual, activation=a.activation)


@every_activation
@with_and_without_residual
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_input_s_size_is_kept(activation: str, residual: bool, training: bool, device: str) -> None:
    a = Case((8, 16, 32, 32), residual=residual, activation=activation).arguments(device)
    a.training = training
    leaves = [t.requires_grad_() for t in (a.input, a.weight, a.bias, a.residual) if t is not None]
    with Kept(*leaves) as kept:
        output = call(a)
    mask = output.numel() // 8 if residual and activation in STRAIGHT else 0
    assert kept.total() == mask + 2 * 8 * 16, "mask and statistics are all that may be kept"


def test_residual_is_kept_only_where_z_is_needed(device: str) -> None:
    for activation in NAMES:
        a = Case((4, 8, 6, 6), residual=True, activation=activation).arguments(device)
        input, residual = a.input.requires_grad_(), a.residual.requires_grad_() * 1
        output = batch_norm(input, None, None, training=True, residual=residual, activation=activation)
        with torch.no_grad():
            residual.mul_(2)
        if activation == "identity" or activation in STRAIGHT:
            output.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


# ---------------------------------------------------------------------------------------------- frozen layers

# Those with gradients besides the input's and the residual's; all but the first leave the weight alone.
LEARNT = {"all": ("weight", "bias"), "none": (), "bias": ("bias",)}


def evaluated(
    shape: tuple[int, ...], layout, types: Types, residual: bool, activation: str, learnt: str, device: str
) -> tuple[Arguments, list[Tensor]]:
    """A call in evaluation, the same for every ``learnt``, and the tensors that have gradients in it."""
    torch.manual_seed(0)
    case = Case(shape, layout, types, EVALUATION, residual=residual, activation=activation)
    a = case.arguments(device)
    names = "input", "residual", *LEARNT[learnt]
    return a, [t.requires_grad_() for t in (getattr(a, name) for name in names) if t is not None]


@every_activation
@with_and_without_residual
@pytest.mark.parametrize("learnt", LEARNT)
def test_evaluation_keeps_what_its_backward_needs(learnt: str, activation: str, residual: bool, device: str) -> None:
    """Of a frozen layer nothing, or a bit an element. A curved activation needs its input z; the gradient of the weight
    needs the input."""
    for layout, shape in itertools.product(LAYOUTS, ((3, 5, 7, 9), (2, 8, 4, 4), (33, 5))):
        a, _ = evaluated(shape, layout, FLOAT, residual, activation, learnt, device)
        channels = a.input.size(1)
        with Kept(a.weight, a.bias) as kept:
            output = call(a)
        tensor, bits = a.input.untyped_storage().nbytes(), -(-output.numel() // 32) * 4
        if activation == "identity":
            needed = tensor * (learnt == "all")
        elif activation in STRAIGHT:
            needed = bits * (residual or learnt != "all") + tensor * (learnt == "all")
        else:
            needed = tensor * (2 if residual else 1)
        assert kept.total() == needed + 2 * 8 * channels, f"{shape}, {layout.__name__}: more is kept than statistics"


@every_activation
@with_and_without_residual
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_a_frozen_layer_has_the_same_gradients(types: Types, activation: str, residual: bool, device: str) -> None:
    """To the bit, whatever is kept, and in whatever layout the gradient of the output comes."""
    shapes = (3, 5, 7, 9), (2, 16, 33, 4), (70, 5)
    for layout, dy_layout, shape in itertools.product(LAYOUTS, LAYOUTS, shapes):
        gradients = {}
        for learnt in LEARNT:
            a, leaves = evaluated(shape, layout, types, residual, activation, learnt, device)
            gradients[learnt] = torch.autograd.grad(call(a), leaves, dy_layout(a.dy.contiguous()))
        *shared, _, dbias = gradients["all"]
        here = f"{shape}, {layout.__name__}, {dy_layout.__name__}"
        assert all(map(torch.equal, gradients["none"], shared)), here
        assert all(map(torch.equal, gradients["bias"], (*shared, dbias))), here


@every_activation
@with_and_without_residual
@layouts
def test_second_derivatives_of_a_frozen_layer(activation: str, residual: bool, layout, device: str) -> None:
    a, leaves = evaluated((3, 2, 2, 3), layout, DOUBLE, residual, activation, "bias", device)
    dy = torch.randn_like(a.input, memory_format=torch.contiguous_format).requires_grad_()
    kept = torch.autograd.grad(call(a), leaves, dy)
    again = torch.autograd.grad(call(a), leaves, dy, create_graph=True)
    torch.testing.assert_close(again, kept)
    second = torch.autograd.grad(sum(g.square().sum() for g in again), dy)
    b, leaves = evaluated((3, 2, 2, 3), layout, DOUBLE, residual, activation, "all", device)
    of_all = torch.autograd.grad(call(b), leaves, dy, create_graph=True)
    parts = [g for g, leaf in zip(of_all, leaves, strict=True) if leaf is not b.weight]
    torch.testing.assert_close(second, torch.autograd.grad(sum(g.square().sum() for g in parts), dy))


@layouts
@with_and_without_residual
def test_many_gradients_of_a_frozen_layer_at_once(residual: bool, layout, device: str) -> None:
    a, leaves = evaluated((3, 5, 7, 9), layout, DOUBLE, residual, "relu", "bias", device)
    output, several = call(a), torch.randn(4, *a.input.shape, dtype=torch.float64, device=device)
    at_once = torch.autograd.grad(output, leaves, several, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, leaves, dy, retain_graph=True) for dy in several]
    torch.testing.assert_close(at_once, tuple(map(torch.stack, zip(*one_by_one))))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_compiled_frozen_layer(activation: str | None, layout, device: str) -> None:
    torch._dynamo.reset()
    module = bn_ext.BatchNorm2d(5, device=device).eval().requires_grad_(False)
    compiled = copy.deepcopy(module)
    compiled.compile(backend="aot_eager", fullgraph=True)
    leaves = [layout(torch.randn(3, 5, 7, 9, device=device)).requires_grad_() for _ in range(2)]
    dy = torch.randn(3, 5, 7, 9, device=device)
    for residual in (None, leaves[1]):
        wanted = leaves[: 1 if residual is None else 2]
        gradients, bytes_kept = [], []
        for m in (module, compiled):
            with Kept(*m.state_dict().values()) as kept:
                output = m(leaves[0], residual, activation=activation)
            gradients.append(torch.autograd.grad(output, wanted, dy))
            bytes_kept.append(kept.total())
        assert all(map(torch.equal, *gradients))
        assert bytes_kept[1] <= bytes_kept[0]


def test_the_input_of_a_frozen_layer_may_be_overwritten(device: str) -> None:
    a, leaves = evaluated((3, 5, 7, 9), contiguous, FLOAT, True, "relu", "none", device)
    expected = torch.autograd.grad(call(a), leaves, a.dy)
    input, residual = (t * 1 for t in leaves)
    a.input, a.residual = input, residual
    output = call(a)
    with torch.no_grad():
        input.fill_(torch.nan)
        residual.fill_(torch.nan)
    assert all(map(torch.equal, torch.autograd.grad(output, leaves, a.dy), expected))
