"""bn_ext.fuse: what it fuses and what it leaves, and that either way the model computes what it did."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, assert_same_training
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize

import bn_ext
from bn_ext.functional import batch_norm


class Model(nn.Module):
    """A convolution, a batch norm of it, and whatever ``then`` makes of that (and of another convolution)."""

    def __init__(self, then: Callable = lambda m, y, r: y, bn: nn.Module | None = None, **modules) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4) if bn is None else bn
        self.head = nn.Conv2d(4, 2, 1)
        self.then = then
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.side(x)
        return self.head(self.then(self, self.bn(self.conv(x)), residual))


def inputs(steps: int = 3) -> list[Tensor]:
    return [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(steps)]


def fusions(fused: nn.Module) -> dict[str, tuple[str, ...]]:
    return {fusion.batch_norm: fusion.fused for fusion in fused.fusions}


def assert_same(model: nn.Module, batches: list[Tensor] | None = None, tolerance: float = 1e-10) -> nn.Module:
    """``model``, fused: after it was trained and evaluated as ``model`` was."""
    model = model.double().train()
    mine = bn_ext.fuse(copy.deepcopy(model))
    fused = copy.copy(mine.fusions)
    batches = batches or inputs()
    assert_same_training(mine, model, batches, tolerance)
    torch.testing.assert_close(mine.eval()(batches[0].clone()), model.eval()(batches[0].clone()))
    assert mine.fusions == fused
    assert list(mine.state_dict()) == list(model.state_dict())
    return mine


# ---------------------------------------------------------------------------------------------- every spelling

ACTIVATIONS: dict[str, list[Callable]] = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        F.relu_,
        torch.relu,
        torch.relu_,
        lambda y: y.relu(),
        lambda y: y.relu_(),
        lambda y: F.relu(y, True),
        lambda y: F.relu(input=y, inplace=True),
    ],
    "relu6": [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, lambda y: F.relu6(y, inplace=True)],
    "leaky_relu": [
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3, inplace=True),
        nn.LeakyReLU(0),
        F.leaky_relu,
        lambda y: F.leaky_relu(y, 0.3, True),
        lambda y: F.leaky_relu(y, negative_slope=0.3),
        lambda y: F.leaky_relu_(y, 0.3),
    ],
    "elu": [
        nn.ELU(),
        nn.ELU(0.3, inplace=True),
        F.elu,
        lambda y: F.elu(y, 0.3, inplace=True),
        lambda y: F.elu(y, alpha=2),
        lambda y: F.elu_(y, 0.3),
    ],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu, lambda y: F.silu(y, inplace=True)],
    "gelu": [nn.GELU(), nn.GELU("none"), F.gelu, lambda y: F.gelu(y, approximate="none")],
    "hardswish": [nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish, lambda y: F.hardswish(y, True)],
    "hardsigmoid": [nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), F.hardsigmoid, lambda y: F.hardsigmoid(y, True)],
    "sigmoid": [nn.Sigmoid(), F.sigmoid, torch.sigmoid, torch.sigmoid_, lambda y: y.sigmoid(), lambda y: y.sigmoid_()],
    "tanh": [nn.Tanh(), F.tanh, torch.tanh, torch.tanh_, lambda y: y.tanh(), lambda y: y.tanh_()],
}


@pytest.mark.parametrize(
    ("name", "act"), [pytest.param(n, f, id=f"{n}{i}") for n in ACTIVATIONS for i, f in enumerate(ACTIVATIONS[n])]
)
def test_activations(name: str, act: Callable) -> None:
    tolerance = 1e-7 if name == "hardsigmoid" else 1e-10  # torch's gradient has a sixth in float32
    fused = assert_same(Model(lambda m, y, r: m.act(y), act=act), tolerance=tolerance)
    assert fusions(fused) == {"bn": (name,)}
    assert len(fused.graph.nodes) == 6


def test_every_activation_is_spelled_here() -> None:
    assert {"identity", *ACTIVATIONS} == set(bn_ext.activation.NAMES)


def add_in_place(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


@pytest.mark.parametrize("finish", [lambda y: y, F.relu, F.silu], ids=["identity", "relu", "silu"])
@pytest.mark.parametrize(
    "add",
    [
        lambda y, r: y + r,
        lambda y, r: r + y,
        add_in_place,
        torch.add,
        lambda y, r: torch.add(r, y),
        lambda y, r: torch.add(other=y, input=r, alpha=1),
        lambda y, r: y.add(r),
        lambda y, r: r.add(other=y, alpha=1),
        lambda y, r: y.add_(r),
    ],
)
def test_additions(add: Callable, finish: Callable) -> None:
    fused = assert_same(Model(lambda m, y, r: finish(add(y, r))))
    assert fusions(fused)["bn"] == ("add", *([finish.__name__] if finish in (F.relu, F.silu) else []))
    assert len(fused.graph.nodes) == 6


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
        lambda m, x: batch_norm(x, m.running_mean, m.running_var, bias=m.bias, training=m.training),
        lambda m, x: bn_ext.functional.batch_norm(x, m.running_mean, m.running_var, training=m.training),
    ],
)
def test_functional_batch_norms(call: Callable) -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 3, 1), Normalized(call)), Normalized(call)):
        assert fusions(assert_same(model)) == {"batch_norm": ("add", "leaky_relu")}


@pytest.mark.parametrize("make", [nn.BatchNorm2d, bn_ext.BatchNorm2d])
@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}], ids=str
)
def test_module_batch_norms(make: type, options: dict) -> None:
    fused = assert_same(Model(lambda m, y, r: (y + r).relu(), make(4, **options)))
    assert fusions(fused) == {"bn": ("add", "relu")}
    assert type(fused.bn) is bn_ext.BatchNorm2d


@pytest.mark.parametrize(("dims", "shape"), [(1, (8, 3)), (1, (4, 3, 5)), (2, (2, 3, 4, 5)), (3, (2, 3, 2, 3, 4))])
def test_dimensions(dims: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(getattr(nn, f"BatchNorm{dims}d")(3), nn.Tanh())
    fused = assert_same(model, [torch.randn(shape, dtype=torch.float64) for _ in range(3)])
    assert fusions(fused) == {"0": ("tanh",)}


def test_the_later_of_two_batch_norms_takes_the_other() -> None:
    fused = assert_same(Model(lambda m, y, r: F.relu(y + m.bn2(r)), bn2=nn.BatchNorm2d(4)))
    assert fusions(fused) == {"bn": (), "bn2": ("add", "relu")}
    fused = assert_same(Model(lambda m, y, r: F.relu(m.act(y) + m.bn2(r)), bn2=nn.BatchNorm2d(4), act=nn.ReLU(True)))
    assert fusions(fused) == {"bn": ("relu",), "bn2": ("add", "relu")}


def test_a_batch_norm_waits_for_what_is_added() -> None:
    late = Model(lambda m, y, r: F.relu(y + m.late(r)), late=nn.Conv2d(4, 4, 1))
    assert fusions(assert_same(late)) == {"bn": ("add", "relu")}


@pytest.mark.parametrize("other", [torch.randn(4, 1, 1), torch.randn(2, 1, 3, 3), torch.randn(1, dtype=torch.double)])
def test_what_is_added_may_have_another_shape_or_type(other: Tensor) -> None:
    model = Model(lambda m, y, r: F.silu(y + m.other))
    model.other = nn.Parameter(other)
    assert_same(model)
    fused = bn_ext.fuse(model.float())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fused.train()(x), model.train()(x))


# ---------------------------------------------------------------------------------------------- left alone


class Branching(nn.Module):
    """Not to be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) * (2 if self.training else 1)


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnOfOurs(bn_ext.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(input, residual) + 1


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def hooked(kind: str, module: nn.Module) -> nn.Module:
    register = getattr(module, f"register_{kind}_hook")
    register(lambda *_: None)
    return module


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda input: input * 2
    return module


def parametrized() -> nn.Module:
    bn = nn.BatchNorm2d(4)
    parametrize.register_parametrization(bn, "weight", Doubled())
    return bn


def into_the_other(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    r += y
    return F.relu(r)


def writing_later(write: Callable) -> nn.Module:
    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        out = F.relu(y + r)
        return m.write(r) + out

    return Model(then, write=write)


def writing_before(view: bool) -> nn.Module:
    """To the batch norm's input, after it and before the addition."""

    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        y = m.bn2(r.view_as(r) if view else r)
        r.relu_()
        return y + r * 2

    return Model(then, **norm2()).eval()


def relu(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
    return F.relu(y)


def norm2(**options) -> dict[str, nn.Module]:
    return {"bn2": nn.BatchNorm2d(4, **options)}


KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]
WRITES: dict[str, Callable] = {
    "method": lambda r: r.mul_(2),
    "operator": lambda r: operator.imul(r, 2),
    "module": nn.ReLU(inplace=True),
    "function": torch.relu_,
    "option": lambda r: F.relu(r, inplace=True),
    "positional option": lambda r: F.relu(r, True),
}
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...], str]] = {
    "called twice": (lambda: Model(lambda m, y, r: F.relu(y) + F.tanh(m.bn(r))), "bn", (), "is called more than once"),
    **{f"{k} hook": (lambda k=k: Model(relu, hooked(k, nn.BatchNorm2d(4))), "bn", (), "has hooks") for k in KINDS},
    **{
        f"{k} hook on the activation": (
            lambda k=k: Model(lambda m, y, r: m.act(y), act=hooked(k, nn.ReLU())),
            "bn",
            (),
            "then act",
        )
        for k in KINDS
    },
    "own forward": (lambda: Model(relu, with_forward(nn.BatchNorm2d(4))), "bn", (), "has hooks or a forward"),
    "activation's own forward": (
        lambda: Model(lambda m, y, r: m.act(y), act=with_forward(nn.ReLU())),
        "bn",
        (),
        "then act",
    ),
    "subclass": (lambda: Model(relu, Own(4)), "bn", (), "is a Own"),
    "subclass of ours": (lambda: Model(relu, OwnOfOurs(4)), "bn", (), "is a OwnOfOurs"),
    "parametrized": (lambda: Model(relu, parametrized()), "bn", (), "is a ParametrizedBatchNorm2d"),
    "has an activation": (
        lambda: Model(lambda m, y, r: F.relu(m.bn2(y, activation="tanh")), bn2=bn_ext.BatchNorm2d(4)),
        "bn2",
        (),
        "has a residual or an activation already",
    ),
    "has a residual": (
        lambda: Model(lambda m, y, r: F.relu(m.bn2(r, y)), bn2=bn_ext.BatchNorm2d(4)),
        "bn2",
        (),
        "has a residual or an activation already",
    ),
    "has both, functional": (
        lambda: Model(lambda m, y, r: F.relu(batch_norm(r, None, None, training=True, activation="tanh"))),
        "batch_norm",
        (),
        "has a residual or an activation already",
    ),
    "no activation": (Model, "bn", (), "then head"),
    "another function": (lambda: Model(lambda m, y, r: F.softplus(y)), "bn", (), "then softplus"),
    "output read again": (lambda: Model(lambda m, y, r: F.relu(y) * y), "bn", (), "bn is used 2 times"),
    "its size read": (lambda: Model(lambda m, y, r: F.relu(y) / y.size(0)), "bn", (), "bn is used 2 times"),
    "written in place": (lambda: Model(lambda m, y, r: [F.relu_(y), y][1]), "bn", (), "bn is used 2 times"),
    "sum read again": (
        lambda: Model(lambda m, y, r: [s := y + r, F.relu(s) * s][1]),
        "bn",
        ("add",),
        "add is used 2 times",
    ),
    "alpha": (lambda: Model(lambda m, y, r: torch.add(y, r, alpha=2)), "bn", (), "the addition has options"),
    "number": (lambda: Model(lambda m, y, r: F.relu(y + 1)), "bn", (), "what is added is no other tensor"),
    "to itself": (lambda: Model(lambda m, y, r: F.relu(y + y)), "bn", (), "what is added is no other tensor"),
    "gelu of another kind": (
        lambda: Model(lambda m, y, r: F.gelu(y, approximate="tanh")),
        "bn",
        (),
        "approximate=tanh",
    ),
    "module gelu of another kind": (
        lambda: Model(lambda m, y, r: m.act(y + r), act=nn.GELU("tanh")),
        "bn",
        ("add",),
        "approximate=tanh",
    ),
    "elu with a scale": (lambda: Model(lambda m, y, r: F.elu_(y, 1.0, 2.0)), "bn", (), "elu has other options"),
    "elu with a named scale": (lambda: Model(lambda m, y, r: F.elu_(y, scale=2.0)), "bn", (), "elu has other options"),
    "slope from a tensor": (
        lambda: Model(lambda m, y, r: F.leaky_relu(y, r.size(0) / 10)),
        "bn",
        (),
        "negative_slope=truediv",
    ),
    "into the other": (lambda: Model(into_the_other), "bn", (), "is added to side in place"),
    **{
        f"writes later, {how}": (lambda w=w: writing_later(w), "bn", (), "side, which is added, is written to later")
        for how, w in WRITES.items()
    },
    "writes before": (lambda: writing_before(False), "bn2", (), "side, its input, might be written to before"),
    "writes before, to what it views": (lambda: writing_before(True), "bn2", (), "might be written to before"),
    "a module named as a method": (lambda: Model(lambda m, y, r: m.add(y), add=nn.Softplus()), "bn", (), "then add"),
    "a module named as an activation": (
        lambda: Model(lambda m, y, r: m.relu(y), relu=nn.Softplus()),
        "bn",
        (),
        "then relu",
    ),
    "an empty module named as an activation": (
        lambda: Model(lambda m, y, r: m.relu(y), relu=nn.Sequential()),
        "bn",
        (),
        "then head",
    ),
    "called by an opaque module": (
        lambda: Model(lambda m, y, r: m.part(F.relu(m.part.bn(y))), part=Branching()),
        "part.bn",
        (),
        "is called more than once",
    ),
    "not called": (lambda: Model(**norm2()), "bn2", (), "not called"),
}
# Those that write torch refuses to differentiate, the others give some parameter no gradient.
EVALUATED_ONLY = ("writes", "not called", "has both, functional")


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    make, name, fused, reason = LEFT_ALONE[case]
    model = make().double()
    mine = bn_ext.fuse(copy.deepcopy(model))
    fusion = next(fusion for fusion in mine.fusions if fusion.batch_norm == name)
    assert fusion.fused == fused
    assert reason in fusion.reason
    assert str(fusion) == f"{name}: {' + '.join(fused) or 'nothing fused'} ({fusion.reason})"
    if case.startswith(EVALUATED_ONLY):
        for x in inputs():
            torch.testing.assert_close(mine(x), model(x))
        torch.testing.assert_close(mine.state_dict(), model.state_dict())
    else:
        assert_same(model)


def test_a_sequence_without_batch_norm_is_looked_into() -> None:
    fused = assert_same(Model(lambda m, y, r: m.rest(y), rest=nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))))
    assert fusions(fused) == {"bn": ("relu",)}


@pytest.mark.parametrize("write", [operator.iadd, operator.isub, operator.imul, operator.itruediv])
def test_writing_in_place_stays(write: Callable) -> None:
    """fx by itself makes ``+=`` a ``+``, which another name for the same tensor does not see."""

    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        same = r
        write(r, F.relu(y) + 1)
        return same.tanh()

    assert_same(Model(then))


def test_synchronized_batch_norms_are_left_alone() -> None:
    fused = bn_ext.fuse(Model(relu, nn.SyncBatchNorm(4)))
    assert type(fused.bn) is nn.SyncBatchNorm
    assert fused.fusions[0].reason == "is a SyncBatchNorm"


def test_hooks_still_run() -> None:
    seen = []
    model = Model(relu, act=nn.Identity())
    model.bn.register_forward_hook(lambda m, args, output: seen.append(output.min() < 0))
    model.register_forward_hook(lambda *_: seen.append("the model's"))
    bn_ext.fuse(model)(torch.randn(2, 3, 5, 5))
    assert seen == [True, "the model's"]


# ---------------------------------------------------------------------------------------------- whole networks

FUSED = {  # of how many batch norms, with activations, additions, both
    "resnet18": (20, 9, 0, 8),
    "resnet50": (12, 7, 0, 3),
    "preact_resnet": (10, 10, 0, 0),
    "mobilenet_v2": (10, 7, 2, 0),
    "efficientnet": (10, 7, 2, 0),
    "densenet": (11, 11, 0, 0),
    "unet3d": (10, 10, 0, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks(name: str, layout: torch.memory_format) -> None:
    network = NETWORKS[name]
    if layout is torch.channels_last and len(network.shape) == 4:
        layout = torch.channels_last_3d
    model = network.make().to(memory_format=layout)
    batches = [network.input(batch, dtype=torch.float64).to(memory_format=layout) for batch in (4, 2, 3)]
    found = list(fusions(assert_same(model, batches)).values())
    both, adds = sum(len(f) == 2 for f in found), found.count(("add",))
    assert (len(found), sum(len(f) == 1 for f in found) - adds, adds, both) == FUSED[name]


# ---------------------------------------------------------------------------------------------- modes and control flow


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.bn(x)), 0.5, training=self.training)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("again", [lambda m: m, copied, pickled, saved, bn_ext.fuse], ids=lambda f: f.__name__)
def test_the_flags_of_functions_are_followed(again: Callable, first: bool) -> None:
    model = nn.Sequential(Dropped(), nn.Identity(), Dropped()).train(first)
    fused = again(bn_ext.fuse(model))
    assert [part.training for part in model.modules()] == [first] * len(list(model.modules()))
    x = torch.randn(2, 3, 5, 5)
    for flags in ((True, True), (True, False), (False, True), (False, False)):
        for part, training in zip((0, 2), flags, strict=True):
            fused.get_submodule(str(part)).train(training)
            model[part].train(training)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(fused(x), expected)


class ByValue(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Branching, ByValue])
def test_a_module_that_cannot_be_traced_is_called_as_it_is(kind: type) -> None:
    fused = assert_same(Model(lambda m, y, r: m.part(F.relu(y)), part=nn.Sequential(kind(), nn.Identity())))
    assert fusions(fused) == {"bn": ("relu",), "part.0.bn": ()}
    reason = fused.fusions[1].reason
    assert reason.startswith("inside part.0, which cannot be traced: ")
    assert __file__ in reason


def test_a_module_with_hooks_is_called_as_it_is() -> None:
    seen = []
    model = Model(lambda m, y, r: m.part(F.relu(y)), part=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    model.part.register_forward_hook(lambda *_: seen.append("hook"))
    fused = assert_same(model)
    assert len(seen) == 2 * 4
    assert fused.fusions[1] == ("part.0", (), "inside part, which has hooks")


class Detour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else -x


def test_a_module_without_batch_norm_may_do_anything() -> None:
    fused = assert_same(Model(lambda m, y, r: m.any(F.relu(y)), any=Detour()))
    assert fusions(fused) == {"bn": ("relu",)}


@pytest.mark.parametrize("kind", [Branching, ByValue])
def test_an_untraceable_model(kind: type) -> None:
    model = kind().eval()
    before = [(part, type(part), set(vars(part)), part.training) for part in model.modules()]
    with pytest.raises(TraceError, match=rf"{kind.__name__} cannot be traced: .*{__file__}:\d+: .*control flow") as e:
        bn_ext.fuse(model)
    assert isinstance(e.value.__cause__, TraceError)
    assert [(part, type(part), set(vars(part)), part.training) for part in model.modules()] == before


def test_a_model_with_a_forward_on_the_object() -> None:
    with pytest.raises(TraceError, match="forward set on the object"):
        bn_ext.fuse(with_forward(Model()))


class Interface(nn.Module):
    """More than one input, by name, with defaults; more than one output, by name; what is not called, in between."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1))
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("table", torch.randn(3), persistent=False)
        self.never = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor, other: Tensor | None = None, *, factor: float = 2.0) -> dict[str, Tensor]:
        y = F.relu(self.norm(x))
        return {"y": y * factor, "z": [self.scale * x, self.table]}


def test_interface() -> None:
    model = Interface()
    fused = bn_ext.fuse(model)
    for one, other in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert one[0] == other[0]
        assert one[1] is other[1]
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    for options in ({}, {"factor": 3.0}, {"other": x}):
        torch.testing.assert_close(fused(x, **options), model(x, **options))
    assert list(pickled(fused).state_dict()) == list(copied(fused).state_dict()) == list(model.state_dict())


# ---------------------------------------------------------------------------------------------- sharing


def test_the_model_stays_as_it_is() -> None:
    model = NETWORKS["resnet50"].make().eval()
    before = [(name, part, type(part), set(vars(part)), part.training) for name, part in model.named_modules()]
    x = NETWORKS["resnet50"].input()
    expected = model(x)
    fused = bn_ext.fuse(model).train()
    assert [(name, part, type(part), set(vars(part)), part.training) for name, part in model.named_modules()] == before
    assert torch.equal(model(x), expected)
    fused(x)
    assert model.bn1.num_batches_tracked.item() == 1


def test_parameters_and_buffers_stay_shared() -> None:
    model = Model(relu)
    fused = bn_ext.fuse(model)
    fused.double()
    fused.load_state_dict({k: torch.ones_like(v) for k, v in fused.state_dict().items()}, assign=True)
    for one, other in zip(model.state_dict(keep_vars=True).values(), fused.state_dict(keep_vars=True).values()):
        assert one is other
        assert one.eq(1).all()
    other = copied(fused)
    other.bn.running_mean.zero_()
    assert fused.bn.running_mean.eq(1).all()


def test_a_traced_module_has_no_forward_left() -> None:
    """It would compute something else with the batch norms that are in it now."""
    fused = bn_ext.fuse(NETWORKS["resnet18"].make())
    with pytest.raises(NotImplementedError):
        fused.stages(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("again", [copied, pickled, saved, bn_ext.fuse, torch.fx.symbolic_trace])
def test_copies(again: Callable) -> None:
    network = NETWORKS["resnet50"]
    model = network.make().double()
    fused = bn_ext.fuse(copied(model))
    assert_same_training(again(fused), model, [network.input(dtype=torch.float64)])


@pytest.mark.parametrize("training", [True, False])
def test_compiles(training: bool) -> None:
    torch._dynamo.reset()
    then = Model(lambda m, y, r: F.relu(y + m.bn2(r)), bn2=nn.BatchNorm2d(4))
    model = nn.Sequential(Dropped(), then).double().train(training)
    fused = bn_ext.fuse(copied(model))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for x in inputs(2):
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(fused.state_dict(), model.state_dict())
    torch._dynamo.reset()


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
    with pytest.raises(TraceError, match="changes gradient mode"):
        bn_ext.fuse(FrozenBegin())
    model = nn.Sequential(FrozenBegin(), nn.BatchNorm2d(3), nn.ReLU())
    fused = bn_ext.fuse(model)
    assert fusions(fused)["1"] == ("relu",)
    fused(torch.randn(2, 3, 4, 4)).sum().backward()
    assert fused.get_submodule("0.first.0").weight.grad is None


def test_a_batch_norm_alone() -> None:
    for of_model in (bn_ext.fuse, bn_ext.fold):
        with pytest.raises(TraceError, match="is a batch norm itself"):
            of_model(nn.BatchNorm2d(3).eval())


def test_each_batch_norm_is_reported_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2, self.b1, self.b2 = (
                nn.Conv2d(3, 3, 1),
                nn.Conv2d(3, 3, 1),
                nn.BatchNorm2d(3),
                nn.BatchNorm2d(3),
            )

        def forward(self, x: Tensor) -> Tensor:
            a = self.b1(self.c1(x))
            return torch.relu(a + torch.relu(self.b2(self.c2(x))))

    assert [(f.batch_norm, f.fused) for f in bn_ext.fuse(Two()).fusions] == [("b1", ("add", "relu")), ("b2", ("relu",))]
