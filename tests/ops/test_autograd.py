"""Derivatives: numerically, twice, forward, under torch.func; and autograd's own rules about saved tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import DOUBLE, MODES, Case, channels_last, contiguous, transposed
from modules import PREPARATIONS, pair
from networks import NETWORKS
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import bn_ext
from bn_ext import activation as activations

SHAPES = [(5, 3), (3, 2, 4), (3, 2, 2, 3), (2, 2, 2, 1, 3)]


def call_of(case: Case, device: str):
    """The case's call as a function of what is differentiable, and that; the running statistics are copied."""
    a = case.arguments(device)
    leaves = [t.detach().requires_grad_() for t in (a.input, a.weight, a.bias) if t is not None]

    def call(input: Tensor, *params: Tensor) -> Tensor:
        rest = iter(params)
        weight, bias = (None if t is None else next(rest) for t in (a.weight, a.bias))
        running = [None if t is None else t.clone() for t in (a.running_mean, a.running_var)]
        return bn_ext.functional.batch_norm(input, *running, weight, bias, a.training, a.momentum, a.eps)

    return call, tuple(leaves)


@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_first_and_second_derivatives(shape, layout, mode, affine, device: str) -> None:
    call, leaves = call_of(Case(shape, layout, DOUBLE, mode, *affine), device)
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_forward_mode(mode, device: str) -> None:
    call, leaves = call_of(Case((4, 3, 2, 3), types=DOUBLE, mode=mode), device)
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


def test_dual_tensor_in_a_module(device: str) -> None:
    mine, theirs = pair("BatchNorm2d", 3, device=device)
    input, tangent = torch.randn(4, 3, 5, 5, device=device), torch.randn(4, 3, 5, 5, device=device)
    with forward_ad.dual_level():
        (y, dy), (expected, dexpected) = (
            forward_ad.unpack_dual(module(forward_ad.make_dual(input, tangent))) for module in (mine, theirs)
        )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dy, dexpected)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


# ---------------------------------------------------------------------------------------------- torch.func


def _loss(module: nn.Module, buffers: dict):
    def loss(params: dict, input: Tensor) -> Tensor:
        copies = {k: v.clone() for k, v in buffers.items()}
        return functional_call(module, {**params, **copies}, (input,)).square().sum().sqrt()

    return loss


TRANSFORMS = {
    "grad": lambda f, p, x: grad(f)(p, x),
    "grad of the input": lambda f, p, x: grad(f, argnums=1)(p, x),
    "vjp": lambda f, p, x: vjp(f, p, x)[1](torch.ones((), device=x.device)),
    "jvp": lambda f, p, x: jvp(lambda x: f(p, x), (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, p, x: jacrev(f)(p, x),
    "hessian": lambda f, p, x: hessian(f)(p, x),
    "vmap": lambda f, p, x: vmap(f, in_dims=(None, 0))(p, torch.stack([x, 2 * x, x + 1])),
    "gradients of every sample": lambda f, p, x: vmap(grad(f), in_dims=(None, 0))(p, torch.stack([x, 2 * x, x + 1])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transforms(transform: str, training: bool, track: bool, device: str) -> None:
    if transform in ("vmap", "gradients of every sample") and training and track:
        pytest.skip("torch itself cannot update running statistics under vmap")
    mine, theirs = pair("BatchNorm2d", 2, device=device, dtype=torch.float64, track_running_stats=track)
    input = torch.randn(3, 2, 2, 2, device=device, dtype=torch.float64)
    results = []
    for module in (mine.train(training), theirs.train(training)):
        params = {k: v.detach() for k, v in module.named_parameters()}
        results.append(TRANSFORMS[transform](_loss(module, dict(module.named_buffers())), params, input))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "gradients of every sample"])
@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_residual_and_activation(activation: str, transform: str, training: bool, device: str) -> None:
    options = {"device": device, "dtype": torch.float64, "track_running_stats": not training}
    mine, theirs = bn_ext.BatchNormAct1d(2, activation=activation, **options), nn.BatchNorm1d(2, **options)

    def fused(params: dict, input: Tensor) -> Tensor:
        return functional_call(mine.train(training), params, (input, 2 * input)).square().sum()

    def apart(params: dict, input: Tensor) -> Tensor:
        y = functional_call(theirs.train(training), params, (input,)) + 2 * input
        return activations.apply(y, activation, None).square().sum()

    params = {k: v.detach() for k, v in theirs.named_parameters()}
    input = torch.randn(3, 2, 2, device=device, dtype=torch.float64)
    results = [TRANSFORMS[transform](f, params, input) for f in (fused, apart)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", ["preact_resnet", "mobilenet_v2", "densenet"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "gradients of every sample"])
def test_network_under_transforms(name: str, transform: str, prepare: Callable, device: str) -> None:
    """vmap in evaluation, as torch itself cannot update running statistics under it."""
    network = NETWORKS[name]
    theirs = network.make().to(device, torch.float64).train(transform != "gradients of every sample")
    mine = prepare(copy.deepcopy(theirs))
    input = network.input(2, device=device, dtype=torch.float64)
    results = []
    for model in (mine, theirs):
        params = {k: v.detach() for k, v in model.named_parameters()}
        results.append(TRANSFORMS[transform](_loss(model, dict(model.named_buffers())), params, input))
    torch.testing.assert_close(*results)


def test_functional_call_alone(device: str) -> None:
    """Replaced parameters and buffers are those used and updated."""
    module = bn_ext.BatchNorm2d(2, device=device)
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    state["weight"].fill_(3)
    output = functional_call(module, state, (torch.randn(4, 2, 3, 3, device=device),))
    assert output.std() > 2
    assert state["num_batches_tracked"].item() == 1
    assert module.num_batches_tracked.item() == 0
    assert not module.running_mean.any()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_under_a_transform(momentum, device: str) -> None:
    mine, theirs = pair("BatchNorm2d", 2, device=device, dtype=torch.float64, momentum=momentum)
    inputs = torch.randn(3, 3, 2, 2, 2, device=device, dtype=torch.float64)
    states = []
    for module in (mine, theirs):

        def loss(input: Tensor, state: dict, module=module) -> tuple[Tensor, dict]:
            state = {k: v.clone() for k, v in state.items()}
            return functional_call(module, state, (input,)).square().sum(), state

        state = dict(module.state_dict())
        for input in inputs:
            _, state = grad(loss, has_aux=True)(input, state)
        states.append(state)
    torch.testing.assert_close(*states)


# ---------------------------------------------------------------------------------------------- autograd's rules


def test_statistics_and_counter_know_they_were_written_to(device: str) -> None:
    module = bn_ext.BatchNorm2d(3, device=device)
    before = [b._version for b in module.buffers()]
    module(torch.randn(2, 3, 4, 4, device=device))
    assert all(b._version > v for b, v in zip(module.buffers(), before, strict=True))
    before = [b._version for b in module.buffers()]
    module.eval()(torch.randn(2, 3, 4, 4, device=device))
    assert [b._version for b in module.buffers()] == before


@pytest.mark.parametrize("changed", ["input", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_backward_refuses_what_was_changed_since(changed: str, training: bool, device: str) -> None:
    module = bn_ext.BatchNorm2d(3, device=device).train(training)
    input = torch.randn(2, 3, 4, 4, device=device, requires_grad=True) * 1
    output = module(input)
    with torch.no_grad():
        (input if changed == "input" else module.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_then_backward(training: bool, device: str) -> None:
    """Each gradient is that of its own forward, though the running statistics have moved on since."""
    module = bn_ext.BatchNorm2d(3, device=device).train(training)
    inputs = [torch.randn(2, 3, 4, 4, device=device, requires_grad=True) for _ in range(2)]
    expected = []
    for x in inputs:
        twin = bn_ext.BatchNorm2d(3, device=device).train(training)
        expected.append(torch.autograd.grad(twin(x).square().sum(), (x, twin.weight)))
    outputs = [module(x) for x in inputs]
    with torch.no_grad():
        module.running_var.mul_(2)
    for x, y, e in zip(inputs, outputs, expected, strict=True):
        got = torch.autograd.grad(y.square().sum(), (x, module.weight))
        assert all(map(torch.equal, got, e))


def test_released_graph(device: str) -> None:
    output = bn_ext.BatchNorm2d(3, device=device)(torch.randn(2, 3, 4, 4, device=device)).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_no_gradient_of_the_statistics(device: str) -> None:
    module = bn_ext.BatchNorm2d(3, device=device)
    module(torch.randn(2, 3, 4, 4, device=device, requires_grad=True))
    assert not any(b.requires_grad for b in module.buffers())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(context, training: bool, device: str) -> None:
    mine, theirs = pair("BatchNorm2d", 3, device=device)
    input = torch.randn(2, 3, 4, 4, device=device)
    expected = theirs.train(training)(input)
    with context():
        output = mine.train(training)(input)
    assert not output.requires_grad
    assert output.is_inference() == (context is torch.inference_mode)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_tensor_subclass(device: str) -> None:
    class Marked(Tensor):
        pass

    output = bn_ext.BatchNorm2d(3, device=device)(torch.randn(2, 3, 4, 4, device=device).as_subclass(Marked))
    assert type(output) is Marked


@pytest.mark.parametrize("hooks", [torch.autograd.graph.save_on_cpu, torch.autograd.graph.disable_saved_tensors_hooks])
def test_saved_tensors_hooks(hooks, device: str) -> None:
    mine, theirs = pair("BatchNorm2d", 3, device=device)
    grads = []
    for module in (mine, theirs):
        x = torch.ones(2, 3, 4, 4, device=device).cumsum(-1).requires_grad_()
        with hooks() if hooks is torch.autograd.graph.save_on_cpu else hooks("none here"):
            y = module(x)
        grads.append(torch.autograd.grad(y.square().sum(), (x, *module.parameters())))
    torch.testing.assert_close(*grads)


def test_tangent_of_the_gradient() -> None:
    """Forward over reverse: the tangent is on dy alone, which only the backward sees."""
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    dy, tangent = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    results = []
    for batch_norm in (bn_ext.functional.batch_norm, torch.nn.functional.batch_norm):
        y = batch_norm(x, None, None, training=True)
        gradient = lambda d, y=y: torch.autograd.grad(y, x, d, retain_graph=True)[0]  # noqa: E731
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(gradient(forward_ad.make_dual(dy, tangent))).tangent
        results.append((dual, torch.func.jvp(gradient, (dy,), (tangent,))[1]))
    torch.testing.assert_close(*results)


def test_gradient_to_be_differentiated_keeps_its_digits() -> None:
    x = (torch.randn(16, 8, 14, 14) + 1e5).requires_grad_()
    dy = torch.randn_like(x)
    y = bn_ext.functional.batch_norm(x, None, None, training=True)
    plain, differentiable = (torch.autograd.grad(y, x, dy, retain_graph=True, create_graph=c)[0] for c in (False, True))
    torch.testing.assert_close(differentiable.detach(), plain, rtol=0, atol=4e-6)


def test_second_derivative_of_no_channels() -> None:
    x = torch.randn(2, 0, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(bn_ext.functional.batch_norm(x, None, None, training=True).sum(), x, create_graph=True)
    assert dx.shape == x.shape


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_gradients_that_are_differentiable_are_the_same(mode, affine, layout, device: str) -> None:
    """With create_graph they come from other formulas than without; gradgradcheck only differentiates those."""
    a = Case((3, 4, 5, 2), layout, DOUBLE, mode, *affine, eps=0.1).arguments(device)
    leaves = [t.detach().requires_grad_() for t in (a.input, a.weight, a.bias) if t is not None]
    rest = iter(leaves[1:])
    weight, bias = (None if t is None else next(rest) for t in (a.weight, a.bias))
    output = bn_ext.functional.batch_norm(
        leaves[0], a.running_mean, a.running_var, weight, bias, a.training, 0.1, a.eps
    )
    plain = torch.autograd.grad(output, leaves, a.dy, retain_graph=True)
    differentiable = torch.autograd.grad(output, leaves, a.dy, create_graph=True)
    torch.testing.assert_close(differentiable, plain)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("residual", [None, 0.0], ids=["one call", "decomposed"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_other_shapes(shape: tuple[int, ...], residual: float | None, training: bool) -> None:
    """As many elements as channels; the gradients have the parameters' shapes, under transforms too."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    mean, var, weight, bias = torch.rand(4, 3, dtype=torch.float64) + 0.5

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        y = bn_ext.functional.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, residual=residual)
        return y.square().sum()

    expected = torch.func.grad(loss, (0, 1))(weight, bias)
    leaves = [t.reshape(shape).requires_grad_() for t in (weight, bias)]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other.reshape(shape))
    for one, other in zip(torch.func.grad(loss, (0, 1))(*leaves), gradients, strict=True):
        torch.testing.assert_close(one, other)
