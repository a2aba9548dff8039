"""Calls that torch's own operators answer, because no kernel of ours does: what they write, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext
from bn_ext.functional import batch_norm

BFLOAT = torch.bfloat16


def broadcast(x: Tensor) -> Tensor:
    """A residual that is not laid out as the input: the call is decomposed."""
    return torch.zeros(1, x.size(1), *[1] * (x.dim() - 2), dtype=x.dtype)


class Call:
    """A decomposed call in training, with what it writes to."""

    def __init__(
        self, x: Tensor, momentum: float | None, weight: torch.dtype, activation: str, recorded: bool = False
    ) -> None:
        self.arguments = x, torch.ones(x.size(1), dtype=weight, requires_grad=recorded), None
        self.running = torch.full((x.size(1),), 3.0), torch.full((x.size(1),), 2.0)
        self.counter = torch.tensor(1)
        self.options = True, momentum, 1e-5, broadcast(x), activation

    def __call__(self) -> Tensor:
        return torch.ops.bn_ext.batch_norm(*self.arguments, *self.running, self.counter, *self.options)

    def state(self) -> list[Tensor]:
        return [t.clone() for t in (*self.running, self.counter)]


CALLS: dict[str, Callable[..., Call]] = {
    "of one type": lambda x: Call(x, 0.5, x.dtype, "silu"),
    "of mixed types": lambda x: Call(x.to(BFLOAT), 0.5, BFLOAT, "silu"),
    "with a cumulative average": lambda x: Call(x, None, x.dtype, "relu"),
    "that is recorded": lambda x: Call(x, 0.5, x.dtype, "silu", recorded=True),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_an_empty_batch_counts_and_moves_nothing(call: Callable[..., Call]) -> None:
    empty = call(torch.empty(0, 4, 5, 5))
    mean, var, _ = empty.state()
    assert empty().shape == (0, 4, 5, 5)
    torch.testing.assert_close(empty.state(), [mean, var, torch.tensor(2)], rtol=0, atol=0)


def test_an_empty_batch_under_vmap() -> None:
    module = bn_ext.BatchNorm2d(4, momentum=None)
    module(torch.randn(8, 4, 5, 5) + 3)
    before = module.running_mean.clone(), module.running_var.clone()
    torch.func.vmap(module, randomness="same")(torch.empty(2, 0, 4, 5, 5))
    torch.testing.assert_close((module.running_mean, module.running_var), before, rtol=0, atol=0)


class FailingAt(TorchDispatchMode):
    """Fails at the operator number ``at`` of those that may: writing to a tensor that is there allocates nothing."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.copy_.default, torch.ops.aten.add_.Scalar):
            self.left -= 1
            if self.left < 0:
                raise MemoryError(str(func))
        return func(*args, **(kwargs or {}))


@every_call
def test_a_call_that_fails_anywhere_writes_nothing(call: Callable[..., Call]) -> None:
    made = call(torch.randn(6, 4, 5))
    before, at = made.state(), 0
    while True:
        try:
            with FailingAt(at):
                made()
            break
        except MemoryError as error:
            torch.testing.assert_close(made.state(), before, rtol=0, atol=0, msg=f"changed, though {error} failed")
        at += 1
    assert at > 4
    assert all(not torch.equal(new, old) for new, old in zip(made.state(), before, strict=True))


def overlapping() -> Tensor:
    return torch.ones(1).expand(3)


def for_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


@pytest.mark.parametrize(
    ("var", "residual", "message"),
    [
        (torch.ones(3), torch.zeros(4, 3, 5).to(torch.float8_e4m3fn), "Float8"),
        (overlapping(), broadcast(torch.zeros(4, 3, 5)), "more than one element of the written-to tensor"),
        (for_inference(), broadcast(torch.zeros(4, 3, 5)), "clone running_var"),
    ],
    ids=["a residual that cannot be added", "statistics that overlap", "statistics made in inference mode"],
)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT])
def test_a_refused_call_writes_nothing(dtype: torch.dtype, var: Tensor, residual: Tensor, message: str) -> None:
    mean, old = torch.zeros(3), var.clone()
    with pytest.raises(RuntimeError, match=message):
        batch_norm(torch.randn(4, 3, 5).to(dtype), mean, var, torch.ones(3, dtype=dtype), None, True, residual=residual)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, old)


@pytest.mark.parametrize("training", [True, False])
def test_strided_parameters_and_statistics(training: bool) -> None:
    """torch's backward ignores their strides, and reads what lies between."""
    x, dy = torch.randn(2, 17, 16, dtype=torch.float64)
    x.requires_grad_()

    def strided(values: Tensor) -> Tensor:
        return torch.stack([values, torch.full_like(values, torch.nan)], 1)[:, 0]

    plain = [torch.rand(16, dtype=torch.float64) + 0.5 for _ in range(4)]
    gradients, states = [], []
    for tensors in ([t.clone() for t in plain], [strided(t) for t in plain]):
        mean, var, weight, bias = tensors
        y = batch_norm(x, mean, var, weight.requires_grad_(), bias.requires_grad_(), training, residual=0.0)
        gradients.append(torch.autograd.grad(y, (x, weight, bias), dy))
        states.append((mean, var))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("activation", [None, *bn_ext.activation.NAMES])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants", ["input", "residual"])
def test_tensors_made_in_inference_mode(wants: str, training: bool, activation: str | None) -> None:
    """If only one of input and residual has a gradient, torch's two calls take the other from inference mode."""
    with torch.inference_mode():
        other = torch.randn(4, 3, 5)
    tensor = torch.randn(4, 3, 5, requires_grad=True)
    x, residual = (tensor, other) if wants == "input" else (other, tensor)
    mean, var = torch.zeros(2, 3), torch.ones(2, 3)
    mine = batch_norm(x, mean[0], var[0], None, None, training, residual=residual, activation=activation)
    theirs = F.batch_norm(x, mean[1], var[1], None, None, training) + residual
    theirs = bn_ext.activation.apply(theirs, activation, None)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), tensor) for y in (mine, theirs)))
    torch.testing.assert_close(mean[0], mean[1])
    torch.testing.assert_close(var[0], var[1])


def test_statistics_that_require_gradients_are_refused_before_any_is_written() -> None:
    mean, var = torch.zeros(3), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="running_var cannot require gradients"):
        batch_norm(torch.randn(4, 3, 5), mean, var, None, None, True, residual=0.0)
    assert torch.equal(mean, torch.zeros(3))


@pytest.mark.parametrize("residual", [None, 0.0], ids=["one call", "decomposed"])
def test_statistics_that_overlap_are_refused(residual: float | None) -> None:
    mean = torch.zeros(1).expand(3)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        batch_norm(torch.randn(4, 3, 5), mean, torch.ones(3), None, None, True, residual=residual)


def test_statistics_that_share_memory() -> None:
    """One tensor for both is torch's to accept, and ours; statistics that overlap in part depend on the order of
    writes."""
    x, same = torch.randn(4, 3, 5) + 2, torch.ones(2, 3)
    batch_norm(x, same[0], same[0], training=True)
    F.batch_norm(x, same[1], same[1], training=True)
    torch.testing.assert_close(*same)
    memory = torch.ones(4)
    for residual in (None, 0.0):
        with pytest.raises(RuntimeError, match="running_mean and running_var share some of their memory"):
            batch_norm(x, memory[:3], memory[1:], None, None, True, residual=residual)
    assert torch.equal(memory, torch.ones(4))
    batch_norm(x, memory[:3], memory[1:], training=False)


def test_training_leaves_the_graph_of_an_evaluation_alone() -> None:
    module = bn_ext.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = module(x, 0.0)
    for residual in (None, 0.0):
        module.train()(x.detach(), residual)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x) * (1 + 1e-5) ** -0.5)


def test_a_counter_that_is_refused_under_functorch_leaves_the_statistics_alone() -> None:
    module, x = bn_ext.BatchNorm1d(3), torch.randn(4, 3, 5) + 3
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda p: functional_call(module, p, (x,)).sum())(dict(module.named_parameters()))
    assert torch.equal(module.running_mean, torch.zeros(3))
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
@pytest.mark.parametrize(
    ("momentum", "set_size", "words"), [(0.1, 2, "a set_size"), (None, None, "a cumulative average")], ids=str
)
@pytest.mark.parametrize("own_counter", [True, False])
def test_captured_statistics_are_refused_before_any_is_written(
    transform: Callable, momentum: float | None, set_size: int | None, words: str, own_counter: bool
) -> None:
    """Torch's own batch norm, which could write to them under grad, knows neither."""
    x, mean, var, batches = torch.randn(2, 4, 3, 5) + 3, torch.zeros(3), torch.ones(3), torch.tensor(0)

    def value(x: Tensor) -> Tensor:
        counter = batches.clone() if own_counter else batches if transform is torch.func.vmap else None
        norm = None, None, mean, var, counter, True, momentum, 1e-5
        return torch.ops.bn_ext.batch_norm(x, *norm, set_size=set_size).sum()

    if momentum is None and not own_counter and transform is torch.func.grad:
        pytest.skip("a cumulative average needs a counter, and grad refuses one from outside")
    if momentum is None and transform is torch.func.vmap:
        words = "were not batched"  # here torch's batch norm refuses first
    with pytest.raises(RuntimeError, match=words):
        transform(value)(x if transform is torch.func.vmap else x[0])
    torch.testing.assert_close((mean, var, batches), (torch.zeros(3), torch.ones(3), torch.tensor(0)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_statistics_of_other_shapes_under_functorch(shape: tuple[int, ...]) -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.zeros(shape), torch.ones(shape)
    torch.func.grad(lambda x: batch_norm(x, mean, var, training=True).square().sum())(x)
    torch.testing.assert_close(mean.flatten(), 0.1 * x.mean((0, 2)))


def test_two_threads_count_every_batch() -> None:
    module = bn_ext.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)

    def train() -> None:
        for _ in range(200):
            module(x, 0.0)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.num_batches_tracked == 400
