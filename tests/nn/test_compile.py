"""torch.compile without graph breaks, training and inference: the same bits as eager."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import same_format
from modules import PREPARATIONS, SHAPES, assert_same_state, constructible
from networks import NETWORKS, BasicBlock, Network, assert_same_training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext import activation as activations


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def require(backend: str, device: str) -> None:
    if (backend, device) == ("inductor", "cuda"):
        pytest.importorskip("triton", reason="Inductor needs Triton on a GPU")


# Everything around the batch norms is exact, so that compiled and eager may be compared bit by bit.
def network(device: str, **options) -> nn.Module:
    model = nn.Sequential(
        bn_ext.BatchNorm2d(4, **options),
        nn.ReLU(),
        bn_ext.BatchNorm2d(4, **options),
        nn.Flatten(2),
        bn_ext.BatchNorm1d(4),
    )
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return model.to(device)


def step(model: nn.Module, input: Tensor, dy: Tensor) -> list[Tensor]:
    x = input.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def compiled(module: nn.Module, backend: str = "aot_eager", **options) -> nn.Module:
    """A compiled copy of ``module``, of the same names."""
    module = copy.deepcopy(module)
    module.compile(backend=backend, fullgraph=True, **options)
    return module


def assert_steps_equal(eager: nn.Module, compiled: nn.Module, inputs: list[Tensor]) -> None:
    for input in inputs:
        dy = torch.randn_like(eager(input))
        compiled(input)
        for one, other in zip(step(compiled, input, dy), step(eager, input, dy), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training(backend: str, momentum: float | None, layout: torch.memory_format, device: str) -> None:
    require(backend, device)
    if backend == "inductor" and momentum is None and layout is torch.contiguous_format:
        momentum = 0.5
    eager = network(device, momentum=momentum)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = [torch.randn(5, 4, 6, 6, device=device).to(memory_format=layout) for _ in range(2)]
    assert_steps_equal(eager, compiled, inputs)
    assert_same_state(model, eager)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inference(backend: str, device: str) -> None:
    require(backend, device)
    eager = network(device).eval()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            input = torch.randn(5, 4, 6, 6, device=device).to(memory_format=layout)
            assert torch.equal(compiled(input), eager(input))
    assert_same_state(model, eager)


def test_frozen_in_training(device: str) -> None:
    """Evaluation mode with gradients, as in fine-tuning."""
    eager = network(device).eval()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_steps_equal(eager, compiled, [torch.randn(5, 4, 6, 6, device=device)])


def test_dynamic_batch(device: str) -> None:
    eager = network(device)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_steps_equal(eager, compiled, [torch.randn(n, 4, 6, 6, device=device) for n in (5, 3, 8)])
    assert_same_state(model, eager)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "options", constructible([{"affine": False}, {"bias": False}, {"track_running_stats": False}]), ids=str
)
def test_constructions(name: str, options: dict, device: str) -> None:
    eager = getattr(bn_ext, name)(6, device=device, **options)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_steps_equal(eager, compiled, [torch.randn(shape, device=device) for shape in SHAPES[name]])
    assert_same_state(model, eager)


@pytest.mark.parametrize("dynamic", [True, False])
def test_wrong_size(dynamic: bool, device: str) -> None:
    compiled = torch.compile(bn_ext.functional.batch_norm, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    weight = torch.ones(5, device=device)
    with pytest.raises(RuntimeError, match=r"weight should contain (4|s\d+) elements not (5|s\d+)"):
        compiled(torch.randn(5, 4, 6, 6, device=device), None, None, weight, training=True)


def test_functional(device: str) -> None:
    def call(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return bn_ext.functional.batch_norm(2 * x, mean, var, training=True) - 1

    x = torch.randn(5, 4, 6, 6, device=device)
    results = []
    for f in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        statistics = torch.zeros(4, device=device), torch.ones(4, device=device)
        results.append((f(x, *statistics), *statistics))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_of_the_output(layout: torch.memory_format, device: str) -> None:
    module = bn_ext.BatchNorm2d(4, device=device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    input = torch.randn(5, 4, 6, 6, device=device).to(memory_format=layout)
    assert same_format(compiled(input), input)


def test_whole_step_with_optimizer(device: str) -> None:
    """A convolutional network, loss, backward and update: compiled and eager train alike."""
    require("inductor", device)
    states = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), bn_ext.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss_of(x: Tensor, y: Tensor, model=model) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        loss_of = torch.compile(loss_of, backend="inductor", fullgraph=True) if compile else loss_of
        for _ in range(3):
            x, y = torch.randn(6, 3, 8, 8, device=device), torch.randint(4, (6,), device=device)
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_evaluation_writes_to_nothing(backend: str, device: str) -> None:
    """No new version of the statistics, which may be shared, kept by another graph, for inference, or expanded."""
    module = bn_ext.BatchNorm2d(4, device=device).eval()
    module.running_mean = module.running_mean[:1].expand(4)
    for_evaluation = torch.compile(module, backend=backend)
    x = torch.randn(2, 4, 3, 3, device=device)
    kept = nn.functional.batch_norm(x.clone().requires_grad_(), module.running_mean, module.running_var)
    versions = module.running_mean._version, module.running_var._version
    with torch.no_grad():
        for_evaluation(x)
        for_evaluation(x)
    assert (module.running_mean._version, module.running_var._version) == versions
    kept.sum().backward()
    with torch.inference_mode():
        module = bn_ext.BatchNorm2d(4, device=device).eval()
    with torch.no_grad():
        torch.compile(module, backend=backend)(x)


# ---------------------------------------------------------------------------------------------- residual, activation


@pytest.mark.parametrize("activation", activations.NAMES)
def test_residual_and_activation(activation: str, device: str) -> None:
    param = 0.3 if activations.DEFAULTS[activation] is not None else None
    eager = bn_ext.BatchNormAct2d(4, activation=activation, activation_param=param, device=device)
    module = compiled(eager)
    for shape in [(5, 4, 6, 6), (3, 4, 6, 6)]:
        tensors = torch.randn(3, *shape, device=device)
        results = []
        for one in (module, eager):
            x, residual = tensors[:2].clone().requires_grad_()
            output = one(x, residual)
            results.append([output, *torch.autograd.grad(output, (x, residual, *one.parameters()), tensors[2])])
        assert all(map(torch.equal, *results))
    assert_same_state(module, eager)


# ---------------------------------------------------------------------------------------------- whole networks


class Whole(nn.Module):
    """A model whose ``compile`` makes one graph of it; an nn.Sequential's compiles what it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def assert_trains_as_eager(network: Network, prepare: Callable, backend: str, device: str) -> None:
    """One graph, compiled once for all batch sizes, trains as the eager model of torch's modules does."""
    require(backend, device)
    theirs = Whole(network.make()).to(device, torch.float64)
    mine = compiled(prepare(copy.deepcopy(theirs)), backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # First a batch of no other size: of the same as the channels, it would be taken for the same number.
        inputs = [network.input(batch, device=device, dtype=torch.float64) for batch in (5, 3, 6)]
        assert_same_training(mine, theirs, inputs)


# Each network prepared in one way, in turn: the graph of a fused model has its own tests.
@pytest.mark.parametrize(("name", "prepare"), zip(NETWORKS, itertools.cycle(PREPARATIONS)))
def test_network(name: str, prepare: Callable, device: str) -> None:
    assert_trains_as_eager(NETWORKS[name], prepare, "aot_eager", device)


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_block_by_inductor(prepare: Callable, device: str) -> None:
    assert_trains_as_eager(Network(lambda: BasicBlock(4, 4, 1), (4, 8, 8)), prepare, "inductor", device)


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_network_in_evaluation(prepare: Callable, device: str) -> None:
    network = NETWORKS["preact_resnet"]
    theirs = Whole(network.make()).to(device, torch.float64)
    theirs(network.input(device=device, dtype=torch.float64))
    mine = compiled(prepare(copy.deepcopy(theirs)).eval(), dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 3, 6):
            input = network.input(batch, device=device, dtype=torch.float64)
            torch.testing.assert_close(mine(input), theirs.eval()(input), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("around", ["the step", "the block"])
def test_checkpoint(around: str, device: str) -> None:
    """Compiled code may hold the checkpoint or lie in it: results and state are those without."""
    plain = Whole(bn_ext.convert(BasicBlock(4, 4, 1))).to(device)
    mine = compiled(plain) if around == "the block" else copy.deepcopy(plain)
    call = functools.partial(checkpoint, mine, use_reentrant=False, context_fn=bn_ext.checkpoint_contexts)
    if around == "the step":
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    input, dy = torch.randn(2, 5, 4, 6, 6, device=device)
    output, expected = call(input.clone()), plain(input.clone())
    assert torch.equal(output, expected)
    output.backward(dy), expected.backward(dy)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(mine.parameters(), plain.parameters()))
    assert_same_state(mine, plain)
