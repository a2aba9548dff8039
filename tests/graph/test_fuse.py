"""A model stays itself when it is fused in place: what is fused, what is not, and what else is done with models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, Model, assert_same, example, fused_with, graphs_of, operators
from networks import NETWORKS, assert_same_training
from torch import Tensor, nn

import bn_ext
from bn_ext.graph import fusions, unfuse
from bn_ext.graph.fusion.installed import installed


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


FUSED = {"bn_ext::batch_norm": 1}
PLAIN = {"bn_ext::batch_norm": 1, "aten::add": 1, "aten::relu": 1}


# ---------------------------------------------------------------------------------------------- recompile limits


def test_many_instances_of_a_class() -> None:
    """More than torch's limit of graphs of one forward."""
    x = example()
    models = [bn_ext.fuse(Block()) for _ in range(20)]
    for model in models:
        for training in (True, False):
            model.train(training)
            assert operators(lambda: model(x)) == FUSED  # noqa: B023


class Blocks(nn.Module):
    def __init__(self, widths: range) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, torch._dynamo.graph_break) for width in widths)
        self.between = nn.ModuleList(nn.Conv2d(width, width + 1, 1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block, conv in zip(self.blocks, self.between):
            x = conv(block(x))
        return x


def test_many_blocks_behind_graph_breaks() -> None:
    x = example()
    model = bn_ext.fuse(Blocks(range(3, 23)))
    for training in (True, False):
        model.train(training)
        assert operators(lambda: model(x)) == {"bn_ext::batch_norm": 20}
    assert fused_with(model) == {f"blocks.{i}.bn": ("add", "relu") for i in range(20)}
    assert torch._dynamo.config.recompile_limit == 8


class Leaky(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.bn, self.slope = nn.BatchNorm2d(3), slope

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.leaky_relu(self.bn(x), self.slope)


def test_numbers_that_differ_between_instances_stay_numbers() -> None:
    """Dynamo would make a variable of a slope that is another from call to call."""
    slopes = (0.1, 0.2, 0.3)
    model = bn_ext.fuse(nn.Sequential(*map(Leaky, slopes)))
    model(example())
    assert fused_with(model) == {f"{i}.bn": ("leaky_relu",) for i in range(len(slopes))}


def test_a_model_does_not_remember_the_sizes_of_another() -> None:
    for width in (3, 5, 7):
        model = bn_ext.fuse(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU()))
        (graph,) = graphs_of(model, torch.randn(width, width, 4, 4))
        inputs = [node.meta["example_value"] for node in graph.find_nodes(op="placeholder")]
        assert all(isinstance(size, int) for tensor in inputs for size in tensor.shape)


def test_limits_that_others_set() -> None:
    model = bn_ext.fuse(Blocks(range(3, 8)))
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=2):
        model(example())
    assert fused_with(model) == {f"blocks.{i}.bn": ("add", "relu") for i in range(5)}


def test_limits_that_others_reached() -> None:
    x = example()
    for _ in range(10):
        torch.compile(Block(), backend="eager", dynamic=False)(x)
    model = bn_ext.fuse(Block())
    assert operators(lambda: model(x)) == FUSED


# ---------------------------------------------------------------------------------------------- what is called


def test_methods_and_parts_are_not_fused() -> None:
    x = example()
    model = bn_ext.fuse(nn.Sequential(Block()))
    assert operators(lambda: model(x)) == FUSED
    assert operators(lambda: model[0](x)) == PLAIN
    assert operators(lambda: model[0].method(x)) == PLAIN
    assert operators(lambda: model.forward(x)) == PLAIN
    bn_ext.fuse(model[0])
    assert operators(lambda: model[0](x)) == FUSED
    assert operators(lambda: model(x)) == FUSED
    assert operators(lambda: model.__call__(x)) == FUSED


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Stateful(nn.Sequential):
    """Gives all of itself to copies."""

    def __getstate__(self) -> dict:
        return self.__dict__.copy()


class Copying(nn.Sequential):
    """Copies itself by a way of its own."""

    def __deepcopy__(self, memo: dict) -> nn.Module:
        twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def block(width: int = 3) -> nn.Module:
    return Block(width, len_of_nothing)


def len_of_nothing() -> None: ...


@pytest.mark.parametrize("wrapper", [nn.Sequential, Stateful, Copying])
@pytest.mark.parametrize("again", [copied, pickled, saved, lambda m: copied(pickled(copied(m))), copy.copy])
def test_copies(again: Callable, wrapper: type) -> None:
    x = example()
    model = bn_ext.fuse(wrapper(block()))
    model(x)
    twin = again(model)
    if not (again is copy.copy and wrapper is Stateful):  # shares what it is told to share
        assert installed(twin) is None
        assert fusions(twin) == []
        assert getattr(twin._compiled_call_impl, "__self__", twin) is twin
        assert operators(lambda: twin(x)) == PLAIN
    if again is not copy.copy:
        for p in twin.parameters():
            p.data.zero_()
        assert twin(x).equal(x.relu())
        assert not model(x).equal(x.relu())
    bn_ext.fuse(twin)
    assert operators(lambda: twin(x)) == FUSED
    assert operators(lambda: model(x)) == FUSED


def test_a_fused_model_is_what_it_was() -> None:
    model = NETWORKS["resnet50"].make().double().eval()
    x = NETWORKS["resnet50"].input(dtype=torch.float64)
    parts = dict(model.named_modules())
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    shown, expected = str(bn_ext.convert(model)), model(x)
    fused = bn_ext.fuse(model)
    torch.testing.assert_close(fused(x), expected)
    assert fused is model
    assert dict(model.named_modules()) == parts
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert str(model) == shown
    unfuse(model)
    assert not {"_compiled_call_impl", "__call__", "compile"} & vars(model).keys()
    assert model(x).equal(expected)
    assert fusions(model) == []


def test_attributes_of_the_model_stay() -> None:
    model = block()
    model.compile = "a setting"
    bn_ext.fuse(model)
    assert operators(lambda: model(example())) == FUSED
    assert unfuse(model).compile == "a setting"


def test_hooks_still_run() -> None:
    seen = []
    model = Model(lambda m, y, r: F.relu(y))
    model.bn.register_forward_hook(lambda m, args, output: seen.append("batch norm"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    bn_ext.fuse(model)(torch.randn(2, 3, 5, 5)).sum().backward()
    assert seen == ["before", "batch norm", "after", "backward"]
    seen.clear()
    model(torch.randn(2, 3, 5, 5))
    assert seen == ["before", "batch norm", "after"]


def test_a_hook_that_changes_the_output() -> None:
    model = Model(lambda m, y, r: F.relu(y)).double()
    model.bn.register_forward_hook(lambda m, args, output: output * 2)
    assert fused_with(assert_same(model)) == {"bn": ()}


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.bn(x)), 0.5, training=self.training)


@pytest.mark.parametrize("first", [True, False])
def test_training_flags_are_followed_one_by_one(first: bool) -> None:
    model = nn.Sequential(Dropped(), nn.Identity(), Dropped()).train(first)
    fused = bn_ext.fuse(copy.deepcopy(model))
    x = example()
    for flags in ((True, True), (True, False), (False, True), (False, False)):
        for part, training in zip((0, 2), flags, strict=True):
            fused[part].train(training)
            model[part].train(training)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(fused(x), expected)
    assert fused_with(fused) == {"0.bn": ("relu",), "2.bn": ("relu",)}


def test_sizes_layouts_and_types_may_change() -> None:
    model, other = (nn.Sequential(block(), nn.Conv2d(3, 3, 1)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    bn_ext.fuse(model)
    for shape in ((2, 3, 4, 4), (5, 3, 4, 4), (1, 3, 7, 2)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(memory_format=memory_format)
            torch.testing.assert_close(model(x), other(x))
            assert operators(lambda: model(x)) == FUSED  # noqa: B023
            other(x), other(x)
    model.double(), other.double()
    torch.testing.assert_close(model(x.double()), other(x.double()))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-4)


def test_errors_are_those_of_the_model() -> None:
    model = bn_ext.fuse(Model())
    for wrong in (torch.randn(2, 5, 5, 5), torch.randn(2, 3, 3, 3)[:1], torch.randn(2, 3)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            bn_ext.convert(Model())(wrong)
        with pytest.raises(type(expected.value)) as found:
            model(wrong)
        assert str(found.value) == str(expected.value)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(torch.randn(2, 3, 5, 5), other=1)


# ---------------------------------------------------------------------------------------------- python in a forward


class ByValue(nn.Module):
    """Goes a way that a tensor's values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1000:
            return x
        return self.second(x)


class ByType(nn.Module):
    """MONAI's BasicUNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def up(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        if isinstance(skip, torch.Tensor):
            y = y + skip
        return y.relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.up(x, 2 * x)


class OneArgument(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class ByError(nn.Module):
    """speechbrain's Xvector."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), OneArgument()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


class Sliced(nn.Module):
    """Makes modules in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1:](nn.ZeroPad2d(1)(self.layers[:1](x)))


class ByFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) * (2 if self.training else 1)


PYTHON: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    ByValue: {"first.1": ("relu",), "second.1": ("relu",)},
    ByType: {"bn": ("add", "relu")},
    ByError: {"batch_norm": (), "layers.1": ()},  # Dynamo leaves it to Python, and captures the layers one by one
    Sliced: {"layers.1": ("relu",)},
    ByFlag: {"bn": ("relu",)},
}


@pytest.mark.parametrize("kind", PYTHON, ids=lambda kind: kind.__name__)
def test_python_decides(kind: type[nn.Module]) -> None:
    assert fused_with(assert_same(kind())) == PYTHON[kind]


class Interface(nn.Module):
    """More than one input, by name, with defaults; more than one output, by name; what is not called, in between."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, factor: float = 2.0) -> dict[str, object]:
        y = F.relu(self.norm(x))
        if mask is not None:
            return {"y": y * mask, "z": [x, self.table]}
        return {"y": y * factor, "z": None}


def test_optional_arguments() -> None:
    model = Interface()
    fused = bn_ext.fuse(copy.deepcopy(model))
    x = example()
    for options in ({}, {"factor": 3.0}, {"mask": x}, {"mask": None}, {"mask": x, "factor": 4.0}):
        torch.testing.assert_close(fused(x, **options), model(x, **options))
    assert [str(fusion) for fusion in fusions(fused)] == [
        "norm: relu",
        "unused.1: nothing fused (in no graph of the model, unless an equal part's stands for it)",
    ]


class Unconvertible(nn.Module):
    """A model that Dynamo does not take at all is no error."""

    def forward(self, x: Tensor) -> Tensor:
        return eval("x + 1", {"x": x}) if torch._C._get_privateuse1_backend_name() else x


@pytest.mark.parametrize("part", [Unconvertible(), nn.GRU(4, 4), nn.Identity()], ids=lambda part: type(part).__name__)
def test_what_cannot_be_captured_runs_as_it_is(part: nn.Module) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.part = Block(), part

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            found = self.part(x.flatten(1, 2))
            return found[0] if isinstance(found, tuple) else found

    assert fused_with(assert_same(Around(), [torch.randn(2, 3, 4, 4, dtype=torch.float64)]))["block.bn"] == (
        "add",
        "relu",
    )


def test_several_steps_and_sizes() -> None:
    network = NETWORKS["mobilenet_v2"]
    model = network.make().double()
    fused = bn_ext.fuse(copy.deepcopy(model))
    assert_same_training(fused, model, [network.input(n, dtype=torch.float64) for n in (4, 2, 4, 7)])


# ---------------------------------------------------------------------------------------------- memory


def test_inputs_are_not_kept() -> None:
    model = bn_ext.fuse(block())
    x = example()
    model(x)
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None
