"""bn_ext.convert recognizes classes of other libraries, and the results stay the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import forked
import lookalikes
import pytest
import torch
from lookalikes import (  # noqa: F401
    FROZEN,
    RECOGNIZED,
    WITH_ACTIVATION,
    BatchNormAct2d,
    DetrFrozenBatchNorm2d,
    FrozenBatchNorm2d,
    GELUTanh,
    Mish,
    Swish,
    assert_alike,
    homes,
    is_fused,
    operators,
    trained,
)
from modules import unmarked
from networks import assert_same_training
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bn_ext

pytestmark = [pytest.mark.usefixtures("homes"), pytest.mark.filterwarnings("error:bn_ext.convert")]

every_recognized = pytest.mark.parametrize("cls", RECOGNIZED)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.3, inplace=True),
    "elu": lambda: nn.ELU(0.5),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
    "celu": lambda: nn.CELU(0.5),
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "swish": Swish,
    "timm's mish": Mish,
    "timm's gelu_tanh": GELUTanh,
}


@every_recognized
def test_the_same_object_of_a_class_derived_from_its_own(cls: type) -> None:
    module, seen = trained(cls(3)), []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    module.note = "kept"
    keys, attributes, text = list(module.state_dict()), dict(vars(module)), repr(module)
    tensors = [*module.parameters(), *module.buffers()]
    assert bn_ext.convert(module) is module
    assert isinstance(module, cls)
    assert type(module) is not cls
    assert seen == [], "the trial runs no hooks"
    assert list(module.state_dict()) == keys
    assert vars(module) == attributes
    assert unmarked(repr(module)) == text != repr(module)
    assert all(one is other for one, other in zip((*module.parameters(), *module.buffers()), tensors, strict=True))
    module(torch.randn(2, 3, 4, 4))
    assert seen == ["hook"]
    assert type(bn_ext.revert(module)) is cls


@every_recognized
def test_computes_the_same_in_one_call(cls: type) -> None:
    theirs = trained(cls(3))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert_alike(mine, theirs)
    for training in (True, False):
        assert is_fused(mine.train(training), torch.randn(4, 3, 5, 2))
    assert not is_fused(theirs, torch.randn(4, 3, 5, 2))


@pytest.mark.parametrize("cls", WITH_ACTIVATION)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(cls: type, name: str) -> None:
    theirs = trained(cls(3, ACTIVATIONS[name]()))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert_alike(mine, theirs)
    assert is_fused(mine, torch.randn(4, 3, 5, 2))


@pytest.mark.parametrize("cls", WITH_ACTIVATION)
@pytest.mark.parametrize("act", [nn.SELU, nn.Softplus, nn.Hardtanh])
def test_other_activations_are_called_as_they_are(cls: type, act: Callable[[], nn.Module]) -> None:
    theirs = trained(cls(3, act()))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert_alike(mine, theirs)
    called = operators(mine, torch.randn(4, 3, 5, 2))
    assert called[0].startswith("bn_ext::")
    assert len(called) == 2


@pytest.mark.parametrize("cls", WITH_ACTIVATION)
def test_dropout_between_is_called(cls: type) -> None:
    module = trained(cls(3, nn.Sigmoid(), nn.Dropout(1.0)))
    bn_ext.convert(module)
    assert module(torch.randn(2, 3, 4, 4)).eq(0.5).all(), "sigmoid of nothing"
    assert module.eval()(torch.randn(2, 3, 4, 4)).ne(0.5).all()


@pytest.mark.parametrize("cls", WITH_ACTIVATION)
def test_what_is_changed_after_conversion_is_seen(cls: type) -> None:
    theirs = trained(cls(3))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    for module in (mine, theirs):
        module.act = nn.LeakyReLU(0.1)
    assert_alike(mine, theirs)
    for module in (mine, theirs):
        module.act.negative_slope = 0.7
        module.eps = 0.5
    assert_alike(mine, theirs)
    for module in (mine, theirs):
        module.drop = nn.Hardtanh(0, 1)
    assert_alike(mine, theirs)
    mine.drop, seen = nn.Identity(), []
    assert is_fused(mine, torch.randn(2, 3, 4, 4))
    for name in ("act", "drop"):
        hook = getattr(mine, name).register_forward_hook(lambda *_, name=name: seen.append(name))
        mine(torch.randn(2, 3, 4, 4))
        hook.remove()
    assert seen == ["act", "drop"]


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"eps": 0.1, "momentum": 0.7},
    ],
    ids=str,
)
def test_options(options: dict) -> None:
    theirs = trained(BatchNormAct2d(3, **options))
    assert_alike(bn_ext.convert(copy.deepcopy(theirs)), theirs)


@every_recognized
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(cls: type, dtype: torch.dtype) -> None:
    theirs = trained(cls(3)).to(dtype)
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert type(mine) is not cls
    x = torch.randn(4, 3, 5, 2, dtype=dtype)
    unit = torch.finfo(dtype).eps
    for training in (True, False):
        expected = theirs.train(training)(x)
        torch.testing.assert_close(mine.train(training)(x), expected, rtol=8 * unit, atol=16 * unit)


@every_recognized
def test_on_meta_by_name_alone(cls: type) -> None:
    module = bn_ext.convert(cls(3).to("meta"))
    assert type(module) is not cls
    assert module(torch.randn(2, 3, 4, 4, device="meta")).is_meta


@pytest.mark.parametrize("cls", FROZEN)
def test_frozen_ones_broadcast_and_promote(cls: type) -> None:
    theirs = trained(cls(3))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    for x in (torch.randn(3, 4, 2), torch.randn(4), torch.randn(2, 3, 4, 2).half(), torch.randn(2, 3, 4, 2).double()):
        torch.testing.assert_close(mine(x), theirs(x), msg=f"{tuple(x.shape)}, {x.dtype}: {{}}".format)
    one = trained(cls(1))
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(bn_ext.convert(copy.deepcopy(one))(x), one(x))


def test_the_eps_of_frozen_ones() -> None:
    """Torchvision's is an attribute, transformers' a constant."""
    x = torch.randn(2, 3, 4, 4)
    for theirs in (FrozenBatchNorm2d(3, eps=0.5), DetrFrozenBatchNorm2d(3)):
        theirs.running_var.fill_(1e-6)
        torch.testing.assert_close(bn_ext.convert(copy.deepcopy(theirs))(x), theirs(x))


# ---------------------------------------------------------------------------------------------- copies, parametrization


class Subclass(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("cls", [*RECOGNIZED, Subclass])
def test_copied_and_pickled(cls: type) -> None:
    model = bn_ext.convert(nn.Sequential(trained(cls(3))))
    x = torch.randn(2, 3, 4, 4)
    for same in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(same[0]) is type(model[0])
        torch.testing.assert_close(same.eval()(x), model.eval()(x), rtol=0, atol=0)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(bn_ext.revert(same)[0]) is cls
        assert type(model[0]) is not cls
        assert vars(same[0]).keys() == vars(model[0]).keys()


@pytest.mark.parametrize("cls", RECOGNIZED)
def test_unpickled_by_another_process(cls: type, tmp_path: Path) -> None:
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(bn_ext.convert(nn.Sequential(cls(3)))))
    ran = forked.run(lookalikes.__file__, str(file))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [f"bn_ext.graph.conversion.classes.{cls.__name__}", f"{cls.__module__}.{cls.__name__}"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, y: Tensor) -> Tensor:
        return y / 2


@pytest.mark.parametrize("cls", [BatchNormAct2d, Subclass])
def test_parametrized(cls: type) -> None:
    theirs = trained(cls(3))
    parametrize.register_parametrization(theirs, "weight", Doubled())
    kind = type(theirs)
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert type(theirs) is kind
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert sum(name.startswith("bn_ext::") for name in operators(mine.eval(), torch.randn(2, 3, 4, 4))) == 1
    mine, theirs = mine.train().double(), theirs.double()
    assert_same_training(mine, theirs, [torch.randn(4, 3, 5, 5).double() for _ in range(3)])
    weight = mine.weight
    parametrize.remove_parametrizations(mine, "weight")
    assert torch.equal(mine.weight, weight)
    assert type(mine) is not cls
    assert isinstance(mine, cls)
    assert type(bn_ext.revert(mine)) is cls
    again = bn_ext.revert(bn_ext.convert(copy.deepcopy(theirs)))
    parametrize.remove_parametrizations(again, "weight")
    assert type(again) is cls


def test_revert_knows_its_own_classes_alone() -> None:
    class Model(nn.Module):
        _original = nn.Linear

    assert type(bn_ext.revert(Model())) is Model


# ---------------------------------------------------------------------------------------------- compilers


def example(cls: type) -> tuple[nn.Module, nn.Module, Tensor]:
    theirs = nn.Sequential(nn.Conv2d(3, 3, 1), trained(cls(3))).eval()
    return bn_ext.convert(copy.deepcopy(theirs)), theirs, torch.randn(2, 3, 4, 4)


@every_recognized
def test_scripted(cls: type) -> None:
    mine, theirs, x = example(cls)
    scripted = torch.jit.script(mine)
    torch.testing.assert_close(scripted(x), theirs(x))
    assert "bn_ext::batch_norm" in str(scripted.inlined_graph)
    if cls in FROZEN:
        torch.testing.assert_close(torch.jit.script(mine[1])(x.double()), theirs[1](x.double()))


@every_recognized
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traced(cls: type) -> None:
    mine, theirs, x = example(cls)
    larger = torch.randn(3, 3, 5, 6)
    torch.testing.assert_close(torch.jit.trace(mine, x)(larger), theirs(larger))


@every_recognized
def test_compiled(cls: type) -> None:
    mine, theirs, x = example(cls)
    for training in (False, True):
        compiled = torch.compile(mine.train(training), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), theirs.train(training)(x))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


@every_recognized
def test_compiled_sees_another_activation(cls: type) -> None:
    if cls not in WITH_ACTIVATION:
        return
    mine, theirs, x = example(cls)
    compiled = torch.compile(mine, fullgraph=True, backend="eager")
    for act in (nn.ReLU(), nn.SiLU(), nn.Mish()):
        mine[1].act = theirs[1].act = act
        torch.testing.assert_close(compiled(x), theirs(x))


@every_recognized
def test_symbolically_traced(cls: type) -> None:
    mine, theirs, x = example(cls)
    torch.testing.assert_close(torch.fx.symbolic_trace(mine)(x), theirs(x))


@every_recognized
def test_exported_in_standard_operators(cls: type) -> None:
    mine, theirs, x = example(cls)
    program = torch.export.export(mine, (x,))
    assert "bn_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), theirs(x))


@every_recognized
def test_fused_and_folded_models_compute_the_same(cls: type) -> None:
    mine, theirs, x = example(cls)
    torch.testing.assert_close(bn_ext.fuse(mine)(x), theirs(x))
    torch.testing.assert_close(bn_ext.fold(mine, x)(x), theirs(x))


def test_a_trial_leaves_what_modules_collect_alone() -> None:
    class Collects(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return super().forward(x)

    module = BatchNormAct2d(3)
    module.act = Collects()
    module.act.seen = []
    bn_ext.convert(module)
    assert module.act.seen == []
