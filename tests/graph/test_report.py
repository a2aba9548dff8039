"""bn_ext.report: where each batch norm runs, what is fused with it, and why no more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, Called, Model, example, norm2
from lookalikes import BatchNormAct2d, homes  # noqa: F401
from networks import NETWORKS, Network, resnet18
from torch import Tensor, nn

import bn_ext
from bn_ext.graph.conversion.classes import is_batch_norm
from bn_ext.graph.report import Report, Row

TAKEN = "bn_ext.convert takes it"
NONE = "no batch norm modules (calls of functions show in fused models alone)"
UNCALLED = "no call of the fused model is captured yet: call the model once"


def rows(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Class, place, what is fused, and the reason, by path."""
    return {path: rest for path, *rest in bn_ext.report(model).rows}


def only(model: nn.Module) -> Row:
    (row,) = bn_ext.report(model).rows
    return row


def images() -> Tensor:
    return torch.randn(2, 3, 5, 5)


# ---------------------------------------------------------------------------------------------- the whole table


class Small(nn.Module):
    """One batch norm for every way to fuse, and one that stays plain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.down = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.stem(x)))
        return F.relu(self.down(y) + self.bn2(self.stem(y)))


def test_a_fused_model() -> None:
    assert str(bn_ext.report(bn_ext.fuse(Small(), images()))).splitlines() == [
        "3 batch norms: 1 with relu, 1 with add + relu, 1 plain",
        "3 on bn_ext",
        "batch norm  class        runs on  fused       reason",
        "bn1         BatchNorm2d  bn_ext   relu",
        "bn2         BatchNorm2d  bn_ext   add + relu",
        "down.1      BatchNorm2d  bn_ext               bn2 adds it",
    ]


def test_it_shows_in_terminals_and_notebooks() -> None:
    report = bn_ext.report(Small())
    assert repr(report) == str(report)
    assert "3 batch norms: 3 plain<br>3 on torch" in report._repr_html_()
    assert isinstance(report, Report)
    assert report.rows[2] == Row("down.1", "BatchNorm2d", "torch", "", TAKEN)
    assert report.rows[2].path == "down.1"


def test_totals_begin_with_the_largest_and_end_with_the_plain_ones() -> None:
    plain, relu = (nn.Sequential(nn.BatchNorm2d(3)) for _ in range(2)), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(*plain, relu, copy.deepcopy(relu), nn.BatchNorm2d(3), nn.Tanh(), nn.SyncBatchNorm(3)).eval()
    bn_ext.fuse(model)(images())
    assert bn_ext.report(model).above[0] == "6 batch norms: 2 with relu, 1 with tanh, 3 plain"
    mixed = nn.Sequential(bn_ext.BatchNorm2d(3), nn.SyncBatchNorm(3), bn_ext.BatchNorm2d(3))
    assert bn_ext.report(mixed).above == ["3 batch norms: 3 plain", "2 on bn_ext, 1 on torch"]


def test_what_is_not_known_is_counted_apart() -> None:
    model = nn.Sequential(OwnOfOurs(3), replaced(nn.BatchNorm2d(3)), bn_ext.BatchNorm2d(3))
    assert bn_ext.report(model).above == ["3 batch norms: 3 plain", "2 not known, 1 on bn_ext"]


def test_what_a_replaced_forward_calls_is_seen_in_a_graph() -> None:
    model = nn.Sequential(OwnOfOurs(3), nn.ReLU())
    assert only(bn_ext.fuse(model)).runs_on == "not known"
    model(images())
    assert only(model) == Row("0", "OwnOfOurs", "bn_ext", "relu", "")


def test_no_batch_norms() -> None:
    assert str(bn_ext.report(nn.Sequential(nn.Linear(2, 2)))) == NONE


def test_torchscript_hides_its_modules() -> None:
    hidden = "parts in TorchScript are not looked into"
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    assert str(bn_ext.report(scripted)) == f"{NONE}\n{hidden}"
    assert bn_ext.report(nn.Sequential(scripted, nn.BatchNorm2d(3))).below == [hidden]
    assert bn_ext.report(nn.BatchNorm2d(3)).below == []


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_batch_norm_of_a_network_has_a_row(network: Network) -> None:
    model = network.make()
    paths = [path for path, module in model.named_modules() if is_batch_norm(module)]
    for prepare, place in ((lambda m: m, "torch"), (bn_ext.convert, "bn_ext"), (bn_ext.fuse, "bn_ext")):
        report = bn_ext.report(prepare(model))
        assert [row.path for row in report.rows] == paths
        assert {row.runs_on for row in report.rows} == {place}


# ---------------------------------------------------------------------------------------------- where it runs


class Own(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.1, self.eps, True
        )


class OwnOfOurs(bn_ext.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


class Quiet(bn_ext.BatchNorm2d):
    note = "overrides nothing"


def with_complex_weight() -> nn.Module:
    module = bn_ext.BatchNorm2d(3)
    module.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    return module


def parametrized() -> nn.Module:
    module = bn_ext.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


def replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


REPLACED = "its forward was replaced, and what the new one calls is not seen"
LEFT = "bn_ext.convert leaves modules of this class: "
PLACES: dict[str, tuple[Callable[[], nn.Module], Row]] = {
    "torch's": (lambda: nn.BatchNorm3d(3), Row("", "BatchNorm3d", "torch", "", TAKEN)),
    "torch's, lazy": (nn.LazyBatchNorm2d, Row("", "LazyBatchNorm2d", "torch", "", TAKEN)),
    "synchronized": (
        lambda: nn.SyncBatchNorm(3),
        Row("", "SyncBatchNorm", "torch", "", f"{LEFT}statistics across processes"),
    ),
    "a forward of its own": (lambda: Own(3), Row("", "Own", "torch", "", f"{LEFT}a forward of their own")),
    "timm's": (
        lambda: BatchNormAct2d(3),
        Row("", "BatchNormAct2d", "torch", "", f"{TAKEN}, if a trial shows no difference"),
    ),
    "timm's, converted": (
        lambda: bn_ext.convert(BatchNormAct2d(3, nn.SiLU())),
        Row("", "BatchNormAct2d", "bn_ext", "silu", ""),
    ),
    "timm's, with another activation": (
        lambda: bn_ext.convert(BatchNormAct2d(3, nn.Softplus())),
        Row("", "BatchNormAct2d", "bn_ext", "", "Identity and Softplus behind it have no fused form"),
    ),
    "ours": (lambda: bn_ext.BatchNorm1d(3), Row("", "BatchNorm1d", "bn_ext", "", "")),
    "ours, lazy": (lambda: bn_ext.convert(nn.LazyBatchNorm2d()), Row("", "LazyBatchNorm2d", "bn_ext", "", "")),
    "ours, parametrized": (parametrized, Row("", "BatchNorm2d", "bn_ext", "", "")),
    "ours, in half": (lambda: bn_ext.BatchNorm1d(3).half(), Row("", "BatchNorm1d", "bn_ext", "", "")),
    "ours, without tensors": (
        lambda: bn_ext.BatchNorm1d(3, affine=False, track_running_stats=False),
        Row("", "BatchNorm1d", "bn_ext", "", ""),
    ),
    "ours, with an activation": (
        lambda: bn_ext.BatchNormAct2d(3, activation="gelu"),
        Row("", "BatchNormAct2d", "bn_ext", "gelu", ""),
    ),
    "ours, with none": (
        lambda: bn_ext.BatchNormAct2d(3, activation="identity"),
        Row("", "BatchNormAct2d", "bn_ext", "", ""),
    ),
    "of ours": (lambda: Quiet(3), Row("", "Quiet", "bn_ext", "", "")),
    "of ours, its forward replaced": (
        lambda: replaced(bn_ext.BatchNormAct2d(3)),
        Row("", "BatchNormAct2d", "not known", "", REPLACED),
    ),
    "torch's, its forward replaced": (
        lambda: replaced(nn.BatchNorm2d(3)),
        Row("", "BatchNorm2d", "not known", "", REPLACED),
    ),
    "of ours, a forward of its own": (
        lambda: OwnOfOurs(3),
        Row("", "OwnOfOurs", "not known", "", "OwnOfOurs has a forward of its own, and what it calls is not seen"),
    ),
    "on a device without kernels": (
        lambda: bn_ext.BatchNorm2d(3, device="meta"),
        Row("", "BatchNorm2d", "torch", "", "there are no kernels for meta"),
    ),
    "of a type without kernels": (
        with_complex_weight,
        Row("", "BatchNorm2d", "torch", "", "there are no kernels for torch.complex64"),
    ),
}


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("case", PLACES)
def test_where_it_runs(case: str) -> None:
    make, expected = PLACES[case]
    assert only(make()) == expected


@pytest.mark.usefixtures("homes")
def test_nothing_is_changed_or_run() -> None:
    model = nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    for module in model:
        module.register_forward_hook(lambda *_: pytest.fail("run"))
    classes, attributes = [type(module) for module in model], [dict(vars(module)) for module in model]
    state = torch.get_rng_state()
    bn_ext.report(model)
    assert [type(module) for module in model] == classes
    assert [vars(module) for module in model] == attributes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shared_module_counts_once() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(rows(model)) == ["0"]
    bn_ext.fuse(model)(images())
    assert rows(model) == {"0": ["BatchNorm2d", "bn_ext", "relu or nothing", "its output is returned"]}


# ---------------------------------------------------------------------------------------------- what is fused


def test_a_fused_model_that_was_not_called() -> None:
    model = bn_ext.fuse(Block())
    assert only(model) == Row("bn", "BatchNorm2d", "bn_ext", "", UNCALLED)
    model(example())
    assert only(model) == Row("bn", "BatchNorm2d", "bn_ext", "add + relu", "")


def test_one_row_for_several_captures() -> None:
    model = bn_ext.fuse(Model(lambda m, y, r: F.relu(y) if m.training else F.softplus(y)))
    for mode in (True, False, True):
        model.train(mode)(images())
    assert rows(model) == {
        "bn": ["BatchNorm2d", "bn_ext", "relu or nothing", "softplus follows, which has no fused form"]
    }
    model = bn_ext.fuse(Model(lambda m, y, r: F.relu(y)), images())
    assert rows(model) == {"bn": ["BatchNorm2d", "bn_ext", "relu", ""]}


def test_calls_of_functions() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, training=True))

    model = nn.Sequential(nn.BatchNorm2d(3), Called(function))
    assert list(rows(model)) == ["0"]
    bn_ext.fuse(model)(images())
    norm, call = bn_ext.report(model).rows
    assert norm == Row("0", "BatchNorm2d", "bn_ext", "", "batch_norm follows, which has no fused form")
    assert call == Row("1.batch_norm_1", "function", "bn_ext", "relu", "")


def test_fused_classes_that_are_left() -> None:
    """A batch norm that torch's function computed in them is ours, where it was captured."""
    model = nn.Sequential(Own(3), nn.ReLU(), nn.SyncBatchNorm(3)).eval()
    bn_ext.fuse(model)
    assert rows(model)["0"] == ["Own", "torch", "", f"{LEFT}a forward of their own; {UNCALLED}"]
    model(images())
    assert rows(model) == {
        "0": ["Own", "bn_ext", "relu", ""],
        "2": ["SyncBatchNorm", "bn_ext", "", "its output is returned"],
    }


@pytest.mark.parametrize("function", [F.batch_norm, bn_ext.functional.batch_norm], ids=["torch's", "ours"])
def test_what_torch_computes_in_a_graph(function: Callable) -> None:
    model = bn_ext.fuse(Called(lambda x: function(x, None, None, training=True).relu()))
    model(images().to("meta"))
    assert only(model).runs_on == "torch"
    if function is F.batch_norm:
        assert only(model) == Row("batch_norm", "function", "torch", "", "there are no kernels for meta")
    model(images())
    assert only(model).runs_on == "torch or bn_ext"


def test_our_activations_in_a_fused_model() -> None:
    model = nn.Sequential(bn_ext.BatchNormAct2d(3, activation="silu"), bn_ext.BatchNormAct2d(3, activation=None))
    model.append(nn.ReLU())
    assert rows(bn_ext.fuse(model))["0"] == ["BatchNormAct2d", "bn_ext", "silu", ""]
    model(images())
    assert rows(model) == {
        "0": ["BatchNormAct2d", "bn_ext", "silu", ""],
        "1": ["BatchNormAct2d", "bn_ext", "relu", ""],
    }


def test_fused_parts() -> None:
    model = nn.Sequential(Block(), bn_ext.fuse(Block()), bn_ext.fuse(bn_ext.BatchNorm2d(3)))
    model(example())
    assert rows(model) == {
        "0.bn": ["BatchNorm2d", "torch", "", TAKEN],
        "1.bn": ["BatchNorm2d", "bn_ext", "add + relu", ""],
        "2": ["BatchNorm2d", "bn_ext", "", "its output is returned"],
    }
    bn_ext.fuse(model)(example())
    assert rows(model)["1.bn"] == ["BatchNorm2d", "bn_ext", "add + relu", ""], "not what only its own call did not see"


def test_copies_and_reverted_models_are_not_fused() -> None:
    model = bn_ext.fuse(Block(), example())
    assert only(copy.deepcopy(model)) == Row("bn", "BatchNorm2d", "bn_ext", "", "")
    assert only(bn_ext.revert(model)) == Row("bn", "BatchNorm2d", "torch", "", TAKEN)


def test_a_batch_norm_that_is_not_called() -> None:
    model = bn_ext.fuse(Model(**norm2()))
    model(images())
    unseen = "in no graph of the model, unless an equal part's stands for it"
    assert rows(model)["bn2"] == ["BatchNorm2d", "bn_ext", "", unseen]


# ---------------------------------------------------------------------------------------------- what is folded


def foldable() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), bn_ext.BatchNorm2d(4)).eval()


FOLLOWS = "it follows re_lu, no plain convolution or linear layer"


def test_a_folded_model() -> None:
    report = bn_ext.report(bn_ext.fold(foldable()))
    assert report.above == ["2 batch norms: 1 folded, 1 plain", "1 on bn_ext"]
    assert list(report.rows) == [
        Row("1", "", "folded into 0", "", ""),
        Row("3", "BatchNorm2d", "bn_ext", "", f"not folded: {FOLLOWS}"),
    ]
    plain = bn_ext.report(bn_ext.fold(bn_ext.revert(foldable())))
    assert plain.rows[1].reason == f"{TAKEN}; not folded: {FOLLOWS}"
    assert bn_ext.report(bn_ext.fold(resnet18().eval())).above == ["20 batch norms: 20 folded"]


def test_a_folded_part() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), bn_ext.fold(foldable()))
    assert rows(model)["1.1"] == ["", "folded into 1.0", "", ""]
    assert list(rows(model)) == ["0", "1.1", "1.3"]


def test_a_layer_that_holds_its_batch_norm() -> None:
    class Layer(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(super().forward(x))

    folded = bn_ext.fold(Layer().eval(), images())
    assert only(folded).runs_on == "folded into the model"
    assert only(nn.Sequential(folded)).runs_on == "folded into 0"


def test_a_folded_program() -> None:
    program = torch.export.export(foldable(), (images(),))
    report = bn_ext.report(bn_ext.fold(program))
    assert report.above == ["2 batch norms: 1 folded, 1 plain", "1 on torch"]
    assert list(report.rows) == [
        Row("1", "function", "folded into 0", "", ""),
        Row("3", "function", "torch", "", f"not folded: {FOLLOWS.replace('re_lu', 'relu')}"),
    ]
    with pytest.raises(TypeError, match=r"only those that bn_ext\.fold returned have a report"):
        bn_ext.report(program)


@pytest.mark.parametrize("given", [None, [nn.BatchNorm2d(3)], nn.BatchNorm2d], ids=str)
def test_no_module(given: object) -> None:
    with pytest.raises(TypeError, match=r"bn_ext\.report: model should be a torch\.nn\.Module or ExportedProgram, got"):
        bn_ext.report(given)
