"""Around a training step: autocast, activation checkpointing, averaged weights."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from modules import PREPARATIONS, assert_agree, pair
from networks import NETWORKS, assert_same_training
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bn_ext


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(2),
        nn.BatchNorm1d(4),
    )


def converted(model: nn.Module) -> nn.Module:
    return bn_ext.convert(copy.deepcopy(model))


# ---------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_types(dtype: torch.dtype, training: bool, device: str) -> None:
    """As torch's: a half input stays half beside float32 parameters, a float32 input stays float32."""
    for given in (dtype, torch.float32):
        mine, theirs = pair("BatchNorm2d", 3, device=device)
        exactly = copy.deepcopy(theirs).double()
        input = torch.randn(4, 3, 6, 6, device=device).to(given)
        dy = torch.randn_like(input)
        results = []
        for module, enabled in (mine, True), (theirs, True), (exactly, False):
            x = (input if enabled else input.double()).requires_grad_()
            with torch.autocast(device, dtype, enabled=enabled):
                output = module.train(training)(x)
            grads = torch.autograd.grad(output, (x, *module.parameters()), dy.to(output.dtype))
            results.append([output.detach(), *grads, module.running_mean])
        for one, other, exact in zip(*results, strict=True):
            assert_agree(one, other, exact, f"{given}")


def test_autocast_network(device: str) -> None:
    model = network().to(device)
    input = torch.randn(8, 3, 9, 9, device=device)
    outputs = []
    for twin in (model, converted(model)):
        with torch.autocast(device, torch.bfloat16):
            output = twin(input)
        output.float().square().sum().backward()
        outputs.append(output)
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=2**-7, atol=2**-6)


# ---------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint(reentrant: bool, momentum: float | None, device: str) -> None:
    """Same gradients as without, bit by bit; statistics and counter move as often as torch's do."""
    model = bn_ext.convert(network()).to(device)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
    theirs = bn_ext.revert(copy.deepcopy(model))
    plain = copy.deepcopy(model)
    input = torch.randn(4, 3, 7, 7, device=device, requires_grad=True)
    dy = torch.randn(4, 4, 25, device=device)
    (expected,) = torch.autograd.grad(plain(input), input, dy)
    for twin in (model, theirs):
        output = checkpoint(twin, input, use_reentrant=reentrant)
        input.grad = None
        output.backward(dy)
        if twin is model:
            assert torch.equal(input.grad, expected)
    state, their_state = model.state_dict(), theirs.state_dict()
    for name, value in state.items():
        torch.testing.assert_close(value, their_state[name], msg=lambda m, name=name: f"{name}: {m}")


class Block(nn.Module):
    """A residual and an activation, the function with statistics of its own, and a checkpoint within."""

    def __init__(self, momentum: float | None, within: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), bn_ext.BatchNormAct2d(4, momentum=momentum, activation="relu")
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), bn_ext.BatchNorm2d(4, momentum=momentum))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.within = within

    def forward(self, x: Tensor) -> Tensor:
        x = self.within(self.inner, self.norm(self.conv(x), x))
        return bn_ext.functional.batch_norm(x, self.mean, self.var, training=self.training)


def _plainly(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


counting_once = functools.partial(checkpoint, use_reentrant=False, context_fn=bn_ext.checkpoint_contexts)
counting_twice = functools.partial(checkpoint, use_reentrant=False)


def _gradients_and_state(call: Callable, momentum: float | None, device: str, training: bool = True):
    """Of a step by a Block that goes by ``call``, and so does what is within."""
    torch.manual_seed(0)
    block = Block(momentum, call).to(device).train(training)
    input = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    output = call(block, input)
    gradients = torch.autograd.grad(output, (input, *block.parameters()), torch.randn_like(output))
    return gradients, block.state_dict()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu])
def test_checkpoint_that_counts_once(momentum: float | None, hooks: Callable, device: str) -> None:
    """Gradients, statistics and counters are bit by bit those without checkpoints."""
    expected, state = _gradients_and_state(_plainly, momentum, device)
    with hooks():
        gradients, once = _gradients_and_state(counting_once, momentum, device)
    assert all(map(torch.equal, gradients, expected))
    assert all(torch.equal(once[name], value) for name, value in state.items())
    _, twice = _gradients_and_state(counting_twice, momentum, device)
    assert twice["norm.num_batches_tracked"] == 2


def test_checkpoint_in_evaluation(device: str) -> None:
    expected, state = _gradients_and_state(_plainly, 0.1, device, training=False)
    gradients, after = _gradients_and_state(counting_once, 0.1, device, training=False)
    assert all(map(torch.equal, gradients, expected))
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_network(name: str, prepare: Callable, device: str) -> None:
    network = NETWORKS[name]
    checkpointed = prepare(network.make().to(device, torch.float64))
    plain = prepare(copy.deepcopy(checkpointed))
    forward = checkpointed.forward
    checkpointed.forward = lambda x: counting_once(forward, x)
    inputs = [network.input(device=device, dtype=torch.float64) for _ in range(2)]
    assert_same_training(checkpointed, plain, inputs, tolerance=0)


# ---------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "unet3d"])
def test_averaged_model(name: str, prepare: Callable, device: str) -> None:
    """Averaging keeps the modules ours; update_bn, which sets momentum=None meanwhile, gives torch's statistics."""
    network = NETWORKS[name]
    theirs = network.make().to(device, torch.float64)
    mine = prepare(copy.deepcopy(theirs))
    loader = [network.input(n, device=device, dtype=torch.float64) for n in (4, 3, 2)]
    averages = [AveragedModel(model) for model in (mine, theirs)]
    for average in averages:
        average.update_parameters(average.module)
        update_bn(loader, average)
    assert any(isinstance(m, bn_ext.BatchNorm2d | bn_ext.BatchNorm3d) for m in averages[0].modules())
    assert {m.momentum for m in averages[0].modules() if isinstance(m, _BatchNorm)} == {0.1}
    torch.testing.assert_close(averages[0].state_dict(), averages[1].state_dict(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(averages[0].eval()(loader[0]), averages[1].eval()(loader[0]), rtol=1e-9, atol=1e-9)


class Calls(TorchDispatchMode):
    """Counts the operators of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bn_ext":
            self.counts[func._schema.name.removeprefix("bn_ext::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("times", [1, 2])
def test_a_checkpoint_reduces_once(times: int, device: str) -> None:
    """Three batch norms, one of them in a checkpoint within: each input is reduced in the first forward alone, the one
    within is normalized once more because both checkpoints run it again."""
    torch.manual_seed(0)
    block = Block(0.1, counting_once).to(device)
    x = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    with Calls() as calls:
        output = counting_once(block, x)
        for _ in range(times):
            output.sum().backward(retain_graph=True)
    assert calls.counts["batch_norm_forward"] == 3
    assert calls.counts["batch_norm_elemt"] == 4 * times
    assert calls.counts["batch_norm_backward"] == 3 * times
    assert block.norm.num_batches_tracked == 1


def test_a_checkpoint_reduces_a_composition_once(device: str) -> None:
    """Batch norms that are composed of stages, two calls of one module within."""
    shared = bn_ext.nn.SharedBatchNorm2d(4, 2).to(device)
    twin = copy.deepcopy(shared)
    x = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        return module(module(x) + x)

    (expected,) = torch.autograd.grad(twice(twin, x).square().sum(), x)
    with Calls() as calls:
        (dx,) = torch.autograd.grad(counting_once(twice, shared, x).square().sum(), x)
    assert calls.counts["batch_norm_stats"] == 2
    assert calls.counts["batch_norm_elemt"] == 4
    assert torch.equal(dx, expected)
    assert all(map(torch.equal, shared.state_dict().values(), twin.state_dict().values()))
