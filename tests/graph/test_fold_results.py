"""bn_ext.fold returns a model of the same class, checked, whatever the model is and does."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folding import Custom, assert_same_outputs, batch_norms, image, outcomes, pair, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext.graph import folds

# ---------------------------------------------------------------------------------------------- model and result


def test_the_model_is_unchanged() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    model = trained(nn.Sequential(stem, nn.Conv2d(6, 2, 1)))
    state, parts = copy.deepcopy(model.state_dict()), list(model.modules())
    attributes = [copy.copy(vars(part)) for part in parts]
    for inputs in ((), (torch.randn(2, 3, 5, 5),)):
        folded = bn_ext.fold(model, *inputs)
        assert list(model.modules()) == parts
        assert [vars(part) for part in parts] == attributes
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert folded[1].weight is model[1].weight
        assert folded[0][0].weight is not stem[0].weight
        assert list(folded.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
        assert vars(folded[0][1]).keys() == vars(nn.Identity()).keys()
        assert not any(part.training for part in folded.modules())


class Network(nn.Module):
    """Does what no trace of torch.fx sees."""

    sizes = (6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(*self.sizes, 3, padding=1), nn.BatchNorm2d(6)
        self.parts = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Any] = []
        self.pair = [self.conv, self.norm]  # what is no module of its own

    @property
    def channels(self) -> int:
        return self.sizes[1]

    def features(self, x: Tensor) -> Tensor:
        for part in self.pair:
            x = part(x)
        return x

    def forward(self, x: Any, mask: Tensor | None = None, *, scale: float = 2.0) -> dict[str, Any]:
        if not isinstance(x, Tensor):
            x = x["image"]
        if x.shape[1] != self.channels:
            raise ValueError("wrong channels")
        self.calls += 1
        self.seen.append(x.sum().item())
        y = nn.ReLU()(self.features(x)) * scale
        if mask is not None:
            y = y * mask
        if self.training:
            y = F.dropout(y)
        y = self.parts[1:](nn.ZeroPad2d(1)(self.parts[:1](y)))
        return {"y": [y], "mean": y.mean() if y.sum() > 0 else -y.mean(), "name": "network"}


def test_the_class_stays_and_what_no_trace_sees_is_folded() -> None:
    model, x = trained(Network()).double(), image(dtype=torch.double)
    folded = bn_ext.fold(model, x)
    assert type(folded) is Network
    assert folded.channels == 6
    assert outcomes(folded) == {"norm": "conv", "parts.1": ""}
    assert "follows constant_pad_nd" in str(folds(folded)[1])
    assert model.calls == folded.calls == 0
    assert model.seen == folded.seen == []
    assert folded.pair[0] is folded.conv
    assert_same_outputs(folded, model, x)
    torch.testing.assert_close(folded.features(x), model.features(x))
    for args, kwargs in (((x, torch.rand(2, 6, 5, 5)), {"scale": 0.5}), (({"image": x},), {})):
        assert_same_outputs(folded, model, *args, **kwargs)
        same = bn_ext.fold(model, *args, **kwargs)
        assert_same_outputs(same, model, *args, **kwargs)
        assert outcomes(same)["norm"] == "conv"


def test_without_inputs_the_parts_that_can_be_traced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.ReLU()(self.norm(self.conv(x)))
            return F.dropout(y) if self.training else y

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    model = trained(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), Untraceable(), Block()))
    folded = bn_ext.fold(model)
    pairs = {"1": "0", "2.blocks.0.norm": "2.blocks.0.conv", "2.blocks.1.norm": "2.blocks.1.conv"}
    assert outcomes(folded) == pairs | {"3.norm": "3.conv", "2.norm": ""}
    (left,) = (fold for fold in folds(folded) if not fold.into)
    assert f"2 cannot be traced: {__file__}:" in left.reason
    assert_same_outputs(folded, model, image(), tolerance=1e-5)
    assert set(outcomes(bn_ext.fold(model[2])).values()) == {"blocks.0.conv", "blocks.1.conv", ""}

    outer = trained(Custom(lambda m, x: m.part(m.norm(m.conv(x))) if x.sum() > 0 else x, part=model[2]))
    reasons = {fold.batch_norm: fold.reason for fold in folds(bn_ext.fold(outer)) if not fold.into}
    assert reasons["norm"].startswith("the model cannot be traced")
    assert reasons["part.norm"].startswith("part cannot be traced")


def caught(ask: Callable[[], Any]) -> bool:
    try:
        return bool(ask())
    except Exception:
        return False


@pytest.mark.parametrize(
    "ask",
    [
        lambda y: isinstance(y, Tensor),
        torch.is_tensor,
        lambda y: torch.jit.isinstance(y, Tensor),
        lambda y: y.shape[1] == 6,
        lambda y: len(y) > 0,
        lambda y: caught((y < 9).all),
        lambda y: caught(lambda: list(y)),
        lambda y: caught(lambda: int(y.ndim)),
        lambda y: caught(lambda: isinstance(y.shape, tuple)),
    ],
)
def test_a_trace_does_not_guess(ask: Callable[[Any], bool]) -> None:
    """A reader that a trace would not see."""
    model = trained(Custom(lambda m, x: m.norm(y := m.conv(x)) + (y if ask(y) else 0)))
    for inputs in ((), (image(),)):
        folded = bn_ext.fold(model, *inputs)
        assert outcomes(folded) == {"norm": ""}
        assert_same_outputs(folded, model, image(), tolerance=0)


def test_a_part_that_catches_an_error_of_its_trace() -> None:
    part = Custom(lambda m, x: m.norm(y := m.conv(x)) + (y if caught(lambda: x.sum() != 0) else 0))
    model = trained(Custom(lambda m, x: m.part(m.norm(m.conv(x))), part=part))
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norm": "conv", "part.norm": ""}
    assert_same_outputs(folded, model, image(), tolerance=1e-5)


def test_arguments_that_a_part_does_not_take() -> None:
    """While it is traced, a part that is called as it is takes no other arguments than else."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        try:
            return m.act(m.norm(y), scale=1)
        except TypeError:
            return m.act(m.norm(y)) + y

    folded = bn_ext.fold(trained(Custom(call, act=nn.ReLU())))
    assert outcomes(folded) == {"norm": ""}


def test_many_instances() -> None:
    models = [trained(Custom(lambda m, x: {"y": m.norm(m.conv(x))})) for _ in range(20)]
    for model in models:
        folded = bn_ext.fold(model, image())
        assert outcomes(folded) == {"norm": "conv"}
        assert_same_outputs(folded, model, image(), tolerance=1e-5)


def test_module_with_two_names() -> None:
    model = trained(Custom(lambda m, x: m.block(x)))
    model.block = nn.Sequential(model.conv, model.norm)
    folded = bn_ext.fold(model, image())
    assert folded.block[1] is folded.norm
    assert batch_norms(folded) == 0
    assert_same_outputs(folded, model, image(), tolerance=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
def test_parameter_with_two_names(given: bool) -> None:
    model = trained(Custom(lambda m, x: m.norm(m.conv(x)), other=nn.Conv2d(6, 6, 3)))
    model.other.bias = model.conv.bias
    assert "shares parameters" in str(folds(bn_ext.fold(model, *([image()] if given else [])))[0])


def test_hooks_of_the_model_and_of_containers_run() -> None:
    inner = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model = trained(nn.Sequential(inner, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    seen = []
    for name, module in (("inner", inner), ("model", model)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    for inputs in ((), (image(),)):
        folded = bn_ext.fold(model, *inputs)
        assert outcomes(folded) == {"2": "1", "0.1": "0.0"}
        seen.clear()
        folded(image())
        assert seen == ["inner", "model"]


class Normalizer(nn.Module):
    """Has buffers as a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(()))
        self.register_buffer("running_var", torch.ones(()))

    def forward(self) -> Tensor:
        return self.running_mean / self.running_var


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
def test_buffers_as_of_a_batch_norm(given: bool) -> None:
    inner = Custom(lambda m, x: m.norm(m.conv(x - m.running_mean)))
    inner.running_mean, inner.running_var = nn.Buffer(torch.ones(())), nn.Buffer(torch.ones(()))
    other = Normalizer()
    model = trained(Custom(lambda m, x: m.norm(m.conv(x - m.other())) + m.inner(x), inner=inner, other=other))
    for same in (model, inner):
        folded = bn_ext.fold(same, *([image()] if given else []))
        assert {name: into for name, into in outcomes(folded).items() if into} == (
            {"norm": "conv", "inner.norm": "inner.conv"} if same is model else {"norm": "conv"}
        )
        assert_same_outputs(folded, same, image(), tolerance=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script, lambda m: nn.Sequential(torch.jit.script(m))])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(pair(nn.Conv2d(6, 6, 1)))
    folded = bn_ext.fold(model.eval())
    assert outcomes(folded) == ({"module.1": "module.0"} if wrap is nn.DataParallel else {})
    assert_same_outputs(folded, model, image(), tolerance=1e-5)


def test_under_vmap() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + torch.vmap(lambda row: m.conv(row[None])[0])(x)

    model = trained(Custom(call))
    folded = bn_ext.fold(model, image())
    assert outcomes(folded) == {"norm": ""}
    assert_same_outputs(folded, model, image(), tolerance=0)


def test_checkpointed_and_scripted_parts() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.scripted(checkpoint(lambda x: m.norm(m.conv(x)), x, use_reentrant=False))

    model = trained(
        Custom(call, scripted=torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).eval()))
    )
    folded = bn_ext.fold(model, image())
    assert outcomes(folded) == {"norm": "conv"}
    assert_same_outputs(folded, model, image(), tolerance=1e-5)


def test_what_a_script_reads_is_seen() -> None:
    model = trained(Custom(lambda m, x: m.norm(y := m.conv(x)) + m.act(y), act=torch.jit.script(nn.ReLU())))
    folded = bn_ext.fold(model, image())
    assert "used elsewhere" in str(folds(folded)[0])


def test_fused_and_compiled_models() -> None:
    """The folded model is neither, and no compiled code hides what is read."""
    ran = []

    def backend(module: nn.Module, inputs: list[Tensor]) -> Callable:
        return lambda *inputs: ran.append(module) or module.forward(*inputs)

    model = trained(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()))
    whole = nn.Sequential(bn_ext.fuse(copy.deepcopy(model)), torch.compile(model, backend=backend)).eval()
    with torch.no_grad():
        whole(image())
    assert len(ran) == 1
    folded = bn_ext.fold(whole, image())
    assert len(ran) == 1
    assert outcomes(folded) == {"0.1": "0.0", "1._orig_mod.1": "1._orig_mod.0"}
    assert_same_outputs(folded, whole, image(), tolerance=1e-5)


def test_result_can_be_copied_pickled_and_folded_again() -> None:
    model = pair(nn.Linear(4, 6), nn.BatchNorm1d)
    input = torch.randn(5, 4)
    folded = bn_ext.fold(model)
    for same in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert folds(same) == folds(folded)
        assert torch.equal(same(input), folded(input))
    assert torch.equal(bn_ext.fold(folded)(input), folded(input))
    assert folds(model) == []


def test_result_can_be_scripted() -> None:
    folded = bn_ext.fold(pair(nn.Linear(4, 6), nn.BatchNorm1d))
    scripted = torch.jit.script(folded)
    assert_same_outputs(scripted, folded, torch.randn(5, 4), tolerance=0)
    with pytest.raises(Exception, match="inputs of 2 dimensions alone"):
        scripted(torch.randn(5, 6, 4))
    act = torch.jit.script(bn_ext.fold(pair(nn.Conv2d(6, 6, 1), bn_ext.BatchNormAct2d, activation="relu")))
    with pytest.raises(Exception, match="cannot be scripted"):
        act(image())


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
def test_in_inference_mode(given: bool) -> None:
    model = pair(nn.Conv2d(6, 6, 1))
    with torch.inference_mode():
        folded = bn_ext.fold(model, *([image()] if given else []))
    assert not any(parameter.is_inference() for parameter in folded.parameters())
    folded(image()).sum().backward()


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("part", [(), ("1",)], ids=["model", "batch norm"])
def test_training_mode_is_refused(part: tuple[str, ...]) -> None:
    model = pair(nn.Conv2d(4, 6, 3))
    model.get_submodule("".join(part)).train()
    with pytest.raises(ValueError, match=rf"{''.join(part) or 'the model'} is in training mode, call model.eval\(\)"):
        bn_ext.fold(model)


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="0 is not initialized, call the model first"):
        bn_ext.fold(nn.Sequential(nn.LazyConv2d(6, 1), nn.BatchNorm2d(6)).eval())


@pytest.mark.parametrize(("module", "place"), [("", "state of the model"), ("norm", "state of norm")])
def test_what_cannot_be_copied_is_named(module: str, place: str) -> None:
    model = trained(Custom(lambda m, x: m.norm(m.conv(x))))
    for state in (threading.Lock(), [model.conv(image())]):
        model.get_submodule(module).state = state
        with pytest.raises(TypeError, match=f"fold: {place} cannot be copied: "):
            bn_ext.fold(model)


def test_forward_set_on_the_object() -> None:
    model = trained(Custom(lambda m, x: x))
    model.forward = lambda x: model.norm(model.conv(x))
    assert outcomes(bn_ext.fold(model)) == {"norm": ""}


OTHER_OUTPUTS = {
    "form": (lambda y: y, lambda y: (y,)),
    "type": (lambda y: y, lambda y: y.double()),
    "type of integers": (lambda y: y.argmax(1), lambda y: y.argmax(1).int()),
    "no tensor": (lambda y: y, lambda y: None),
    "values": (lambda y: y, lambda y: y + 1),
    "complex values": (lambda y: y * 1j, lambda y: (y + 1) * 1j),
    "values beside infinite ones": (lambda y: torch.cat([y, y / 0]), lambda y: torch.cat([y + 1, y / 0])),
}


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"a": [1, y]}], ids=["tensor", "dictionary"])
@pytest.mark.parametrize(("of_model", "of_folded"), OTHER_OUTPUTS.values(), ids=OTHER_OUTPUTS)
def test_outputs_are_checked(of_model: Callable, of_folded: Callable, wrap: Callable) -> None:
    """With a model that asks whether it is folded."""
    model = trained(Custom(lambda m, x: wrap(of[isinstance(m.norm, nn.BatchNorm2d)](m.norm(m.conv(x))))))
    of = of_folded, of_model
    with pytest.raises(AssertionError, match=r"fold: (the folded model returns|output . differs)"):
        bn_ext.fold(model, image())
    of = of_model, of_model
    assert outcomes(bn_ext.fold(model, image())) == {"norm": "conv"}


def test_random_numbers_are_the_same_in_both() -> None:
    model = trained(
        Custom(lambda m, x: F.dropout(m.norm(m.conv(x)), training=True) + random.random() + np.random.rand())
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert outcomes(bn_ext.fold(model, image(generator=torch.Generator()))) == {"norm": "conv"}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(map(np.array_equal, np.random.get_state(), states[2]))


def test_a_wrong_result_is_refused() -> None:
    """The model is compared, not a copy that is changed to be watched: layers have a bias in it."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return y if m.conv.bias is None else 2 * y

    model = trained(Custom(call))
    model.conv.bias = None
    with pytest.raises(AssertionError, match="fold: output 0 differs"):
        bn_ext.fold(model, image())


def test_layer_of_another_copy() -> None:
    def function(x: Tensor) -> Tensor:
        return model.conv(x)

    model = trained(Custom(lambda m, x: m.norm(function(x))))
    for inputs in ((), (image(),)):
        folded = bn_ext.fold(model, *inputs)
        assert outcomes(folded) == {"norm": ""}
        assert_same_outputs(folded, model, image(), tolerance=0)


def halve(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(0.5)


def halve_data(module: nn.Module) -> None:
    module.weight.data = module.weight.data * 0.5


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize("write", [halve, halve_data])
@pytest.mark.parametrize("name", ["conv", "norm"])
def test_model_that_writes_to_its_parameters(name: str, write: Callable[[nn.Module], None], given: bool) -> None:
    model = trained(Custom(lambda m, x: (write(getattr(m, name)), m.norm(m.conv(x)))[1]))
    before = copy.deepcopy(model.state_dict())
    folded = bn_ext.fold(model, *([image()] if given else []))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert outcomes(folded) == {"norm": ""}


def test_errors_name_the_line() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + torch.ones(7)

    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        bn_ext.fold(trained(Custom(call)), image())
    line = call.__code__.co_firstlineno + 1
    assert caught.value.__notes__ == [f"bn_ext.fold: {__file__}:{line}: the model fails with these inputs"]


# ---------------------------------------------------------------------------------------------- arguments


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False, scale: float = 2.0) -> Any:
        y = self.norm(self.conv(x)) * scale
        y = y if mask is None else y * mask
        return (y, y) if twice else y


@pytest.mark.parametrize("args", [(), ((image(),),), (image(),), (image(), None, True)], ids=len)
def test_all_arguments_stay(args: tuple[Any, ...]) -> None:
    model, x, mask = trained(Optional()).double(), image(dtype=torch.double), torch.rand(2, 4, 5, 5)
    folded = bn_ext.fold(model, *torch.utils._pytree.tree_map_only(Tensor, Tensor.double, args))
    assert outcomes(folded) == {"norm": "conv"}
    for given in ((), (mask,), (None, True), (None, False, 3.0)):
        assert_same_outputs(folded, model, x, *given)


def test_keyword_arguments() -> None:
    model, x = trained(Optional()), image()
    assert outcomes(bn_ext.fold(model, x=x, scale=3.0)) == {"norm": "conv"}


def test_graph_module_of_modules() -> None:
    model = torch.fx.symbolic_trace(pair(nn.Conv2d(6, 6, 1))).double()
    folded = bn_ext.fold(model, x := image(dtype=torch.double))
    assert outcomes(folded) == {"1": "0"}
    assert_same_outputs(folded, model, x)
