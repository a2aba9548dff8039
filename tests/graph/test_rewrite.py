"""A graph's batch norms become one call or are left, and either way the model computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fusing import Called, Model, assert_same, fused_with, graphs_of, inputs, norm2
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bn_ext
from bn_ext.functional import batch_norm
from bn_ext.graph import fusions


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# ---------------------------------------------------------------------------------------------- batch norms


class Normalized(nn.Module):
    """By functional calls."""

    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.randn(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[0] * F.leaky_relu(self.call(self, x) + x, 0.2)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, m.training, 0.2, 1e-3),
        lambda m, x: F.batch_norm(input=x, running_mean=None, running_var=None, weight=m.weight, training=True),
        lambda m, x: torch.batch_norm(
            x, m.weight, None, m.running_mean, m.running_var, m.training, 0.2, 1e-3, torch.backends.cudnn.enabled
        ),
        lambda m, x: batch_norm(x, m.running_mean, m.running_var, bias=m.bias, training=m.training),
        lambda m, x: bn_ext.functional.batch_norm(x, m.running_mean, m.running_var, training=m.training),
    ],
)
def test_functional_batch_norms(call: Callable) -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 3, 1), Normalized(call)), Normalized(call)):
        (found,) = fused_with(assert_same(model)).values()
        assert found == ("add", "leaky_relu")


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn_ext.BatchNorm2d])
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}], ids=str
)
def test_module_batch_norms(make: type, options: dict) -> None:
    fused = assert_same(Model(lambda m, y, r: (y + r).relu(), make(4, **options)))
    assert fused_with(fused) == {"bn": ("add", "relu")}
    assert type(fused.bn) is bn_ext.BatchNorm2d


@pytest.mark.parametrize(("dims", "shape"), [(1, (8, 3)), (1, (4, 3, 5)), (2, (2, 3, 4, 5)), (3, (2, 3, 2, 3, 4))])
def test_dimensions(dims: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(getattr(nn, f"BatchNorm{dims}d")(3), nn.Tanh())
    fused = assert_same(model, [torch.randn(shape, dtype=torch.float64) for _ in range(2)])
    assert fused_with(fused) == {"0": ("tanh",)}


def test_a_batch_norm_alone() -> None:
    assert fused_with(assert_same(nn.BatchNorm2d(3))) == {"batch_norm": ()}


class Own(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(y))


def parametrized() -> nn.Module:
    bn = nn.BatchNorm2d(4)
    parametrize.register_parametrization(bn, "weight", Called(lambda weight: weight * 2))
    return bn


class Unconverted(nn.BatchNorm2d):
    """Overrides its forward, and is not made ours: only its functional call is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("make", [Own, Unconverted, lambda n: nn.SyncBatchNorm(n).eval()])
def test_batch_norms_of_any_class(make: Callable) -> None:
    model = Model(lambda m, y, r: F.relu(y), make(4))
    if isinstance(model.bn, nn.SyncBatchNorm):  # on a CPU it evaluates only
        model = model.eval()
        fused = bn_ext.fuse(model)
        fused(torch.randn(2, 3, 5, 5))
    else:
        fused = assert_same(model)
        assert fused.bn.num_batches_tracked == 2
    assert fused_with(fused) == {"bn": ("silu",) if make is Own else ("relu",)}


def test_the_counter_is_counted_by_the_operator() -> None:
    model = bn_ext.fuse(Model(lambda m, y, r: y.relu(), Unconverted(4)))
    (graph,) = graphs_of(model, torch.randn(2, 3, 5, 5))
    assert type(model.bn) is Unconverted
    assert not [node for node in graph.nodes if node.target == "add_"]
    assert model.bn.num_batches_tracked == 1


class Reading(nn.BatchNorm2d):
    """Reads its counter after it has counted and before it normalizes."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        x = x * self.num_batches_tracked
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


def test_a_counter_that_is_read_is_counted_before() -> None:
    fused = assert_same(Model(lambda m, y, r: y.relu(), Reading(4, eps=1)))
    assert fused.bn.num_batches_tracked == 3
    (graph,) = graphs_of(bn_ext.fuse(Model(lambda m, y, r: y.relu(), Reading(4))), torch.randn(2, 3, 5, 5))
    assert [node for node in graph.nodes if node.target == "add_"]


def test_parametrized_and_own_forwards() -> None:
    assert fused_with(assert_same(Model(lambda m, y, r: F.relu(y), parametrized()))) == {"bn": ("relu",)}
    model = Model(lambda m, y, r: F.relu(y)).double()
    model.bn.forward = lambda input: nn.BatchNorm2d.forward(model.bn, input) * 2
    x = inputs()[0]
    expected = model(x)
    model.bn.running_mean.zero_(), model.bn.running_var.fill_(1)
    torch.testing.assert_close(bn_ext.fuse(model)(x), expected)
    assert fused_with(model) == {"bn": ()}


def test_the_later_of_two_batch_norms_takes_the_other() -> None:
    fused = assert_same(Model(lambda m, y, r: F.relu(y + m.bn2(r)), **norm2()))
    assert fused_with(fused) == {"bn": (), "bn2": ("add", "relu")}
    assert str(fusions(fused)[0]) == "bn: nothing fused (bn2 adds it)"
    fused = assert_same(Model(lambda m, y, r: F.relu(m.act(y) + m.bn2(r)), act=nn.ReLU(True), **norm2()))
    assert fused_with(fused) == {"bn": ("relu",), "bn2": ("add", "relu")}


def test_three_are_added() -> None:
    fused = assert_same(Model(lambda m, y, r: F.relu(sum([r, y, m.bn2(r)])), **norm2()))
    assert fused_with(fused) == {"bn": ("add",), "bn2": ("add", "relu")}


def test_a_batch_norm_waits_for_what_is_added() -> None:
    late = Model(lambda m, y, r: F.relu(y + m.late(r)), late=nn.Conv2d(4, 4, 1))
    assert fused_with(assert_same(late)) == {"bn": ("add", "relu")}


@pytest.mark.parametrize("twice", [lambda m, y, r: F.relu(y) + F.tanh(m.bn(r)), lambda m, y, r: F.relu(m.bn(r) + y)])
def test_a_batch_norm_that_is_called_twice(twice: Callable) -> None:
    fused = assert_same(Model(twice))
    assert fused.bn.num_batches_tracked == 4
    assert [fusion.batch_norm for fusion in fusions(fused)] == ["bn", "bn"]


@pytest.mark.parametrize("other", [torch.randn(4, 1, 1), torch.randn(2, 1, 3, 3), torch.randn(1, dtype=torch.double)])
def test_what_is_added_may_have_another_shape_or_type(other: Tensor) -> None:
    model = Model(lambda m, y, r: F.silu(y + m.other))
    model.other = nn.Parameter(other)
    assert fused_with(assert_same(model)) == {"bn": ()}
    x = torch.randn(2, 3, 5, 5)
    model = model.float().train()
    expected = model(x)
    torch.testing.assert_close(bn_ext.fuse(model)(x), expected)


# ---------------------------------------------------------------------------------------------- left alone


def writing_before(view: bool) -> nn.Module:
    """To the batch norm's input, after it and before the addition."""

    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        y = m.bn2(r.view_as(r) if view else r)
        r.relu_()
        return y + r * 2

    return Model(then, **norm2()).eval()


def writing_to_the_weight(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    y = m.bn2(r)
    with torch.no_grad():
        m.bn2.weight.mul_(2)
    return y + m.side2(r)


def reading_statistics(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    return y + r * m.bn.running_mean.view(1, -1, 1, 1)


def without_gradient(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.relu(y)
    return z * r


def inner_without_gradient(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.bn2(r)
    return F.relu(z + y)


def viewed(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    flat = y.flatten(1)
    F.relu_(y)
    return y * flat.view_as(y)


def read_elsewhere(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    view = r.view(-1)
    r += y
    return F.relu(r) * view.view_as(r)


NO_TENSOR = "what is added is no other tensor"
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], str]] = {
    "has an activation": (
        lambda: Model(lambda m, y, r: F.relu(batch_norm(r, None, None, training=True, activation="tanh"))),
        "batch_norm_1",
        (),
        "has an activation already",
    ),
    "no activation": (Model, "bn", (), "conv2d follows, which has no fused form"),
    "another function": (
        lambda: Model(lambda m, y, r: F.softplus(y)),
        "bn",
        (),
        "softplus follows, which has no fused form",
    ),
    "output read again": (lambda: Model(lambda m, y, r: F.relu(y) * y), "bn", (), "is read 2 times"),
    "its deviation read": (lambda: Model(lambda m, y, r: F.relu(y) / y.std()), "bn", (), "is read 2 times"),
    "a view of it read": (lambda: Model(viewed), "bn", (), "times"),
    "sum read again": (
        lambda: Model(lambda m, y, r: [s := y + r, F.relu(s) * s][1]),
        "bn",
        ("add",),
        "is read 2 times",
    ),
    "alpha": (lambda: Model(lambda m, y, r: torch.add(y, r, alpha=2)), "bn", (), "what is added is scaled"),
    "number": (lambda: Model(lambda m, y, r: F.relu(y + 1)), "bn", (), NO_TENSOR),
    "to itself": (lambda: Model(lambda m, y, r: F.relu(y + y)), "bn", (), NO_TENSOR),
    "softplus of another kind": (
        lambda: Model(lambda m, y, r: y * torch.tanh(F.softplus(y, beta=2))),
        "bn",
        (),
        "is read 2 times",
    ),
    "module of another activation": (
        lambda: Model(lambda m, y, r: m.act(y + r), act=nn.SELU()),
        "bn",
        ("add",),
        "selu follows, which has no fused form",
    ),
    "elu with a scale": (
        lambda: Model(lambda m, y, r: F.elu_(y, 1.0, 2.0)),
        "bn",
        (),
        "elu_ follows, which in this form is not fused",
    ),
    "elu with a named scale": (
        lambda: Model(lambda m, y, r: F.elu_(y, scale=2.0)),
        "bn",
        (),
        "elu_ follows, which in this form is not fused",
    ),
    "hardtanh": (lambda: Model(lambda m, y, r: F.hardtanh(y)), "bn", (), "hardtanh follows, which has no fused form"),
    "clamped": (lambda: Model(lambda m, y, r: y.clamp(0, 6)), "bn", (), "clamp follows, which has no fused form"),
    "clamped, a hardsigmoid but for gradients at its limits": (
        lambda: Model(lambda m, y, r: (y + 3).clamp(0, 6) / 6),
        "bn",
        (),
        NO_TENSOR,
    ),
    "rounded": (
        lambda: Model(lambda m, y, r: torch.div(F.relu6(y + 3), 6, rounding_mode="floor")),
        "bn",
        (),
        NO_TENSOR,
    ),
    "sigmoid times another": (lambda: Model(lambda m, y, r: y.sigmoid() * r), "bn", ("sigmoid",), ""),
    "written out, in place": (
        lambda: Model(lambda m, y, r: y.mul_(y.add_(3).clamp(0, 6) / 6).detach() + r),
        "bn",
        (),
        NO_TENSOR,
    ),
    "into another that is read": (
        lambda: Model(read_elsewhere),
        "bn",
        (),
        "added in place to a tensor that others read",
    ),
    "writes before": (lambda: writing_before(False), "bn2", (), "is written to before the addition"),
    "writes before, to what it views": (lambda: writing_before(True), "bn2", (), "is written to before the addition"),
    "writes to the weight": (
        lambda: Model(writing_to_the_weight, side2=nn.Conv2d(4, 4, 1), **norm2()).eval(),
        "bn2",
        (),
        "is written to before the addition",
    ),
    "statistics read": (lambda: Model(reading_statistics), "bn", (), "is written to before the addition"),
    "its activation has no gradient": (lambda: Model(without_gradient), "bn", (), "gradient mode"),
    "not called": (lambda: Model(**norm2()), "bn2", (), "in no graph of the model"),
}
# Those that write torch refuses to differentiate, the others give some parameter no gradient.
EVALUATED_ONLY = ("writes", "not called", "has an activation", "written out, in place", "rounded")


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    make, name, fused, reason = LEFT_ALONE[case]
    model = make().double()
    if case.startswith(EVALUATED_ONLY):
        mine = bn_ext.fuse(copy.deepcopy(model))
        with torch.no_grad():
            for x in inputs():
                torch.testing.assert_close(mine(x), model(x))
        torch.testing.assert_close(mine.state_dict(), model.state_dict())
    else:
        mine = assert_same(model)
    fusion = next(fusion for fusion in fusions(mine) if fusion.batch_norm == name)
    assert fusion.fused == fused
    assert reason in fusion.reason
    ending = f" ({fusion.reason})" if reason else ""
    assert str(fusion) == f"{name}: {' + '.join(fused) or 'nothing fused'}{ending}"


class FrozenBegin(nn.Module):
    """Computes a part of itself without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


def test_a_change_of_gradient_mode_is_not_lost() -> None:
    model = bn_ext.fuse(FrozenBegin())
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model.first[0].weight.grad is None
    assert model.second[0].weight.grad is not None
    assert fused_with(model) == {"first.1": ("relu",), "second.1": ("relu",)}
    fused = assert_same(Model(inner_without_gradient, **norm2()))
    assert fused_with(fused) == {"bn": (), "bn2": ()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Types are those without fusing: here a half input, float32 statistics, a half sum."""
    model = Model(lambda m, y, r: F.relu(y + r))
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", dtype):
        expected = model(x)
        found = bn_ext.fuse(model)(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert fused_with(model) == {"bn": ("add", "relu")}


# ---------------------------------------------------------------------------------------------- whole networks

FUSED = {  # of how many batch norms, with activations, additions, both
    "resnet18": (8, 4, 0, 3),
    "resnet50": (9, 5, 0, 2),
    "preact_resnet": (7, 7, 0, 0),
    "mobilenet_v2": (7, 5, 1, 0),
    "efficientnet": (7, 5, 1, 0),
    "densenet": (9, 9, 0, 0),
    "unet3d": (6, 6, 0, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks(name: str, layout: torch.memory_format) -> None:
    network = NETWORKS[name]
    if layout is torch.channels_last and len(network.shape) == 4:
        layout = torch.channels_last_3d
    model = network.make().to(memory_format=layout)
    batches = [network.input(batch, dtype=torch.float64).to(memory_format=layout) for batch in (4, 2, 3)]
    found = [fusion.fused for fusion in fusions(assert_same(model, batches))]
    both, adds = sum(len(f) == 2 for f in found), found.count(("add",))
    assert (len(found), sum(len(f) == 1 for f in found) - adds, adds, both) == FUSED[name]
