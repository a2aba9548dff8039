"""Calls of a fused model over its life: in threads, with hooks that come and go, captured again, and collected."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from fusing import Block, example, fused_with, nothing, operators
from torch import Tensor, nn

import bn_ext
from bn_ext.graph import fusions, unfuse
from bn_ext.graph.fusion import fused


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


class Widening(nn.Module):
    """A block of each width, each with a graph of its own."""

    def __init__(self, first: nn.Module, widths: range) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([first, *(Block(width, torch._dynamo.graph_break) for width in widths)])
        self.between = nn.ModuleList(nn.Conv2d(width - 1, width, 1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for conv, block in zip(self.between, self.blocks[1:]):
            x = block(conv(x))
        return x


# ---------------------------------------------------------------------------------------------- threads


def settings() -> dict[str, object]:
    return torch._dynamo.config.get_config_copy()


def in_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Starts ``function`` in a thread; the result waits for it, and gives or raises what it did."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> object:
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return result


def test_calls_that_overlap_in_threads() -> None:
    """The first to begin is the first to end; the other is captured under the settings all the same."""
    before = settings()
    first_runs, second_runs, first_ended = (threading.Event() for _ in range(3))

    @torch._dynamo.disable
    def in_first() -> None:
        first_runs.set()
        assert second_runs.wait(100)

    @torch._dynamo.disable
    def in_second() -> None:
        second_runs.set()
        assert first_ended.wait(100)

    first = bn_ext.fuse(Block(3, in_first))
    second = bn_ext.fuse(Widening(Block(3, in_second), range(4, 15)))

    def run_second() -> object:
        assert first_runs.wait(100)
        second(example())
        return settings()

    result = in_thread(run_second)
    first(example())
    first_ended.set()
    assert result() == before
    assert settings() == before
    assert fused_with(second) == {f"blocks.{i}.bn": ("add", "relu") for i in range(12)}


def test_one_model_in_many_threads() -> None:
    model = bn_ext.fuse(nn.Sequential(Block(), Block())).eval()
    x = example()
    expected = bn_ext.convert(model).forward(x)
    for result in [in_thread(lambda: [model(x) for _ in range(50)]) for _ in range(4)]:
        for found in result():
            torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------- hooks

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("path", ["", "0", "0.bn"])
def test_hooks_that_come_and_go(register: str, path: str) -> None:
    model = bn_ext.fuse(nn.Sequential(Block()))
    x = example().requires_grad_()
    seen: list[str] = []
    part = model.get_submodule(path)
    for _ in range(2):
        model(x).sum().backward()
        assert not seen
        handle = getattr(part, register)(lambda *_: seen.append("hook"))
        model(x).sum().backward()
        assert seen == ["hook"]
        handle.remove()
        seen.clear()
        model(x).sum().backward()
        assert not seen


def test_a_hook_that_comes_later_changes_the_output() -> None:
    model = bn_ext.fuse(nn.Sequential(Block()))
    x = example()
    model(x)
    model[0].bn.register_forward_hook(lambda module, args, output: output * 0)
    assert model(x).equal(x.relu())


def test_hooks_of_all_modules() -> None:
    model = bn_ext.fuse(nn.Sequential(Block()))
    x = example()
    model(x)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(x)
    handle.remove()
    assert seen == [model[0].conv, model[0].bn, model[0], model]
    model(x)
    assert len(seen) == 4


# ---------------------------------------------------------------------------------------------- captures


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.calls = Block(), 0

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        self.calls += 1
        return self.block(x) * factor * self.calls


def captures() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("by", ["an argument", "an attribute"])
def test_python_that_varies_without_end(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not captured without end: the model then runs as it is, and says so once."""
    monkeypatch.setattr(fused, "_MOST_CAPTURES", 3)
    torch._dynamo.utils.counters.clear()
    model, other = Scaled(), Scaled()
    other.load_state_dict(model.state_dict())
    bn_ext.fuse(model), bn_ext.fuse(other)
    x = example()
    with pytest.warns(
        UserWarning, match="Scaled: the model runs as it is: its Python code varies without end"
    ) as warned:
        for i in range(6):
            model.calls, other.calls = (i, i) if by == "an attribute" else (0, 0)
            factor = 1 + i / 8 if by == "an argument" else 1.0
            torch.testing.assert_close(model(x, factor), other.forward(x, factor))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert captures() == 3
    ((name, found, reason, on_kernels),) = fusions(model)
    assert (name, found, on_kernels) == ("block.bn", (), None)
    assert "varies without end" in reason


def test_a_call_of_many_graphs_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_MOST_CAPTURES", 3)
    model = bn_ext.fuse(Widening(Block(), range(4, 12)))
    x = example()
    for training in (True, False):
        model.train(training)(x)
        model(x)
    assert fused_with(model) == {f"blocks.{i}.bn": ("add", "relu") for i in range(9)}


# ---------------------------------------------------------------------------------------------- memory


def graph_modules() -> int:
    gc.collect()  # what goes with the models is collected after them
    gc.collect()
    return sum(issubclass(type(thing), torch.fx.GraphModule) for thing in gc.get_objects())


@pytest.mark.parametrize("pause", [nothing, torch._dynamo.graph_break], ids=["whole", "in parts"])
@pytest.mark.parametrize("end", [lambda model: None, unfuse], ids=["deleted", "unfused"])
def test_models_and_their_graphs_are_collected(pause: Callable, end: Callable) -> None:
    def once() -> weakref.ref:
        model = bn_ext.fuse(nn.Sequential(Block(3, pause)))
        model(example())
        end(model)
        return weakref.ref(model)

    once()
    before, names = graph_modules(), set(vars(fused))
    seen = [once() for _ in range(3)]
    assert graph_modules() <= before
    assert [model() for model in seen] == [None] * 3
    assert not [name for name in vars(fused).keys() - names if "compiled" in name]


def test_a_model_that_is_deleted_leaves_others_their_graphs() -> None:
    first, second = (bn_ext.fuse(nn.Sequential(Block(3, torch._dynamo.graph_break))) for _ in range(2))
    x = example()
    first(x), second(x)
    captured = captures()
    del first
    gc.collect()
    second(x)
    assert captures() == captured


def test_an_unfused_model_that_lives_keeps_no_graphs() -> None:
    before = graph_modules()
    model = bn_ext.fuse(Block())
    model(example())
    assert graph_modules() > before
    unfuse(model)
    assert graph_modules() == before


# ---------------------------------------------------------------------------------------------- parts, compilations


def test_equal_parts_behind_graph_breaks() -> None:
    """They share a graph: the report does not know of each."""
    model = bn_ext.fuse(nn.Sequential(*(Block(3, torch._dynamo.graph_break) for _ in range(3))))
    x = example()
    assert operators(lambda: model(x)) == {"bn_ext::batch_norm": 3}
    *found, last = fusions(model)
    assert {fusion.fused for fusion in found} == {("add", "relu")}
    assert last.reason == "in no graph of the model, unless an equal part's stands for it"


def test_a_compiled_model_is_refused() -> None:
    model = Block()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    with pytest.raises(RuntimeError, match=r"compiled in place already.* model.compile\(backend='bn_ext_inductor'\)"):
        bn_ext.fuse(model)
    assert model._compiled_call_impl is compiled
    assert type(model.bn) is nn.BatchNorm2d


class Calling(Block):
    """Has a call of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


def test_a_call_of_the_class_stays() -> None:
    model = bn_ext.fuse(Calling())
    x = example()
    expected = model.forward(x) + 1
    for call in (model, model.__call__, torch.compile(model, backend="bn_ext")):
        torch.testing.assert_close(call(x), expected)
    assert fused_with(model) == {"bn": ("add", "relu")}
