"""Findings about statistics and training speak where they should and not elsewhere, and nothing is left changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lookalikes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diagnosed import BIAS, IMAGES, PREPARATIONS, Calls, conv, found, frozen, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from lookalikes import homes  # noqa: F401
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

import bn_ext
from bn_ext.train import diagnose

# ------------------------------------------------------------------------------------------ values and statistics


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS)
def test_few_values(prepare: Callable) -> None:
    model = prepare(nn.Sequential(norm(), nn.Flatten(), nn.Linear(12, 4, bias=False), nn.BatchNorm1d(4)))
    for images, expected in {
        32: [],
        31: [("3", "31 values per channel in training")],
        7: [("0", "28 values per channel in training"), ("3", "7 values per channel in training")],
        1: [("0", "4 values per channel in training"), ("3", "1 value per channel in training")],
    }.items():
        assert found(model, example=IMAGES[:images, :, :2, :2]) == expected
    for part in model:
        part.eval()
    for module in (model[0], model[3]):
        module.num_batches_tracked.fill_(1)
    assert found(model, example=IMAGES[:1, :, :2, :2]) == []


def test_few_values_where_batch_norm_is_called_with_several() -> None:
    model = Calls(lambda m, x: m.norm(x).sum() + m.norm(x[:1, :, :3, :3]).sum(), norm=norm())
    assert found(model, example=IMAGES) == [("norm", "9 values per channel in training")]


def test_never_updated() -> None:
    used = "statistics never updated, and in use: evaluation mode"
    model = nn.Sequential(norm(), norm())
    assert found(model) == []
    model[1].eval()
    assert found(model) == [("1", used)]
    assert found(model.eval()) == [("0", used), ("1", used)]
    assert found(nn.Sequential(norm(momentum=0))) == [("0", "statistics never updated: a momentum of 0")]
    assert found(nn.Sequential(conv(), frozen(norm(momentum=0)))) == []
    for name, value in (("running_mean", 1), ("running_var", 2), ("num_batches_tracked", 1)):
        trained = norm().eval()
        getattr(trained, name).fill_(value)
        assert found(nn.Sequential(trained, conv())) == []
    assert found(norm(track_running_stats=False).eval()) == []


@pytest.mark.usefixtures("homes")
def test_frozen_statistics_that_were_not_loaded() -> None:
    for cls in lookalikes.FROZEN:
        assert [path for path, _ in found(nn.Sequential(cls(3)))] == ["0"]


def test_never_called() -> None:
    called = "statistics never updated: not called with the example"
    model = Calls(lambda m, x: m.one(x), one=norm(), two=norm())
    assert found(model, example=IMAGES) == [("two", called)]
    assert found(model) == []  # a trace need not see every call
    model.two.num_batches_tracked.fill_(1)
    assert found(model, example=IMAGES) == []

    def function(m: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(x, m.one.running_mean, m.one.running_var, training=m.training)

    assert found(Calls(function, one=norm()), example=IMAGES) == []


@pytest.mark.parametrize(
    ("momentum", "batches", "what"),
    [
        (0.1, 44, None),
        (0.1, 43, "a momentum of 0.1 leaves 1% of the old after 43 batches"),
        (0.1, 1, "a momentum of 0.1 leaves 90% of the old after 1 batch"),
        (0.1, None, None),
        (0.01, 400, "a momentum of 0.01 leaves 2% of the old after 400 batches"),
        (0.01, 500, None),
        (0.5, 7, None),
        (0.99, None, "a momentum of 0.99 sees 1.0 batches"),
        (0.99, 1000, "a momentum of 0.99 sees 1.0 batches"),
        (None, 1, None),
    ],
)
def test_few_batches(momentum: float | None, batches: int | None, what: str | None) -> None:
    model = nn.Sequential(norm(momentum=momentum), bn_ext.BatchNormAct2d(3, momentum=momentum), conv(), norm())
    model[0].eval().num_batches_tracked.fill_(1)
    model[3].track_running_stats = False
    assert found(model, batches=batches) == ([] if what is None else [("1", what)])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.floats(0.001, 0.5), st.integers(1, 5000))
def test_few_batches_are_those_that_leave_some(momentum: float, batches: int) -> None:
    """Against the running mean itself: batches of mean 1 move it from 0."""
    module = nn.BatchNorm1d(1, momentum=momentum).double()
    mean = 1 - torch.lerp(torch.zeros(1).double(), torch.ones(1).double(), 1 - (1 - momentum) ** batches).item()
    assert bool(found(module, batches=batches)) == (mean > 0.01)


def test_batches_of_a_loader() -> None:
    loader = DataLoader(torch.zeros(80), batch_size=8)
    assert found(norm(), batches=loader) == [("", "a momentum of 0.1 leaves 35% of the old after 10 batches")]
    assert found(norm(), batches=DataLoader(torch.zeros(80))) == []


# ------------------------------------------------------------------------------------------ the training


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS)
def test_weight_decay(prepare: Callable) -> None:
    model = prepare(nn.Sequential(conv(), norm(), conv(), norm(affine=False), norm()))
    optimizers = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
    for optimizer in optimizers:
        both = "weight decay of 0.001 on weight and bias"
        assert found(model, optimizer(model.parameters(), weight_decay=1e-3)) == [("1", both), ("4", both)]
        assert found(model, optimizer(model.parameters(), weight_decay=0)) == []
    groups = [
        {"params": [model[0].weight, model[1].weight, model[4].weight]},
        {"params": [model[1].bias], "weight_decay": 0.5},
        {"params": [model[2].weight, model[4].bias], "weight_decay": 0},
    ]
    assert found(model, torch.optim.SGD(groups, weight_decay=0.25)) == [
        ("1", "weight decay of 0.25 and 0.5 on weight and bias"),
        ("4", "weight decay of 0.25 on weight"),
    ]
    for module in (model[1], model[4]):
        module.requires_grad_(False)
    assert found(model, torch.optim.SGD(groups, weight_decay=0.25)) == []


def test_weight_decay_on_what_a_weight_is_computed_from() -> None:
    model = nn.Sequential(norm())
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    optimizer = torch.optim.SGD(model.parameters(), weight_decay=0.5)
    assert found(model, optimizer) == [("0", "weight decay of 0.5 on bias and weight")]


def test_accumulation() -> None:
    model = nn.Sequential(conv(), norm())
    assert found(model, accumulation=4) == [("", "gradients of 4 batches accumulated beside batch norm")]
    assert found(model, accumulation=1) == []
    model[1] = norm(track_running_stats=False).eval()  # has no other statistics than the batch's
    assert len(found(model, accumulation=4)) == 1
    assert found(nn.Sequential(conv(), nn.GroupNorm(1, 3)), accumulation=4) == []
    assert found(nn.Sequential(conv(), frozen(norm())), accumulation=4) == []


@pytest.fixture
def processes() -> Iterator[Callable[[int], None]]:
    """Makes this process the first of so many that do not exist."""

    def make(count: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def test_small_batches_in_processes(processes: Callable[[int], None]) -> None:
    processes(2)
    model = DistributedDataParallel(nn.Sequential(conv(bias=True), norm(), frozen(norm())))
    few = [("module.1", "8 images in each of 2 processes, not synchronized")]
    bias = [("module.0", BIAS[0][1])]
    assert found(model, example=IMAGES[:8]) == bias + few
    assert found(model, example=IMAGES[:16]) == bias
    assert found(model, batches=DataLoader(torch.zeros(1000), batch_size=8)) == bias + few
    assert found(model, batches=DataLoader(torch.zeros(1000), batch_size=16)) == bias
    assert found(model) == bias
    assert found(model.module, example=IMAGES[:8]) == BIAS
    parts = {"inside": copy.deepcopy(model), "outside": norm()}
    partly = Calls(lambda m, x: m.outside(m.inside(x)), **parts)
    assert found(partly, example=IMAGES[:8])[-1:] == [(f"inside.{few[0][0]}", few[0][1])]
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model, dist.new_group())
    assert found(synchronized, example=IMAGES[:8]) == bias
    # Two processes of 18 values have 36.
    assert found(synchronized, example=IMAGES[:2, :, :3, :3]) == bias
    alone = DistributedDataParallel(nn.Sequential(conv(), norm()))
    assert ("module.1", "18 values per channel in training") in found(alone, example=IMAGES[:2, :, :3, :3])


def test_one_process(processes: Callable[[int], None]) -> None:
    processes(1)
    assert found(DistributedDataParallel(nn.Sequential(conv(), norm())), example=IMAGES[:8]) == []


# ------------------------------------------------------------------------------------------ findings


def test_nothing_to_say() -> None:
    for model in (nn.Sequential(conv(), norm()), nn.Linear(3, 3), nn.Sequential()):
        findings = diagnose(model)
        assert findings == [] and isinstance(findings, list)
        assert str(findings) == "nothing was found"


def test_findings_print_as_a_table() -> None:
    model = nn.Sequential(*(layer for _ in range(3) for layer in (conv(bias=True), norm())))
    findings = diagnose(model, accumulation=2)
    assert len(findings) == 4 and all(all(finding[1:]) for finding in findings)
    path, what, why, remedy, source = findings[0]
    assert (path, what, findings[0].path, findings[0].remedy) == (*BIAS[0], "0", remedy)
    lines = str(findings).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["where", "0"] and "0 and 2 more" in lines[1]
    assert lines[2].startswith("the model") and max(map(len, lines)) <= 110
    text = " ".join(str(findings).split())
    assert all(text.count(part) == 1 for part in (why, remedy, source))
    assert repr(findings) == str(findings) and "<table>" in findings._repr_html_()


def test_every_source_can_be_found() -> None:
    from bn_ext.train.diagnosis.rules import RULES

    assert len({rule.why for rule in RULES}) == len(RULES) == 9
    assert all("arXiv" in rule.source or "#" in rule.source for rule in RULES)


# ------------------------------------------------------------------------------------------ nothing is changed


@pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS)
def test_everything_is_left_as_it_was(prepare: Callable) -> None:
    layers = nn.Dropout(0.3), parametrizations.spectral_norm(conv(bias=True)), norm(), nn.ReLU(), norm().eval()
    model = prepare(nn.Sequential(*layers))
    model(IMAGES).sum().backward()
    handle = model[2].register_forward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(model.parameters())
    for training in (True, False):
        model.train(training)
        model[4].train(not training)
        for example in (None, IMAGES.clone().requires_grad_()):
            with nothing_changed(model):
                assert diagnose(model, optimizer, example, batches=10)
            assert list(model[2]._forward_hooks) == [handle.id]
            assert example is None or (example.grad is None and torch.equal(example, IMAGES))


def test_an_example_that_the_model_writes_to() -> None:
    example = IMAGES.clone()
    diagnose(nn.Sequential(nn.ReLU(inplace=True), norm()), example=example)
    assert torch.equal(example, IMAGES)


@contextmanager
def nothing_changed(model: nn.Module) -> Iterator[None]:
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    tensors = [*model.parameters(), *model.buffers()]
    versions = [tensor._version for tensor in tensors]
    own = [(type(module), {**vars(module)}) for module in model.modules()]
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert all(map(torch.equal, (p.grad for p in model.parameters()), grads))
    assert all(one is other for one, other in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert versions == [tensor._version for tensor in tensors]
    assert own == [(type(module), vars(module)) for module in model.modules()]


# ------------------------------------------------------------------------------------------ arguments


def test_examples_of_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)

    few = [("norm", "9 values per channel in training")]
    x = IMAGES[:1, :, :3, :3]
    assert found(Two(), example=(x, x)) == found(Two(), example={"y": x, "x": x}) == few


def test_compiled_models() -> None:
    model = torch.compile(nn.Sequential(conv(bias=True), norm()), backend="eager")
    assert found(model, example=IMAGES) == found(model) == [("_orig_mod.0", BIAS[0][1])]


def test_scripts_are_not_looked_into() -> None:
    assert found(torch.jit.script(nn.Sequential(conv(bias=True), norm())), example=IMAGES) == []


def test_statistics_without_values() -> None:
    model = nn.Sequential(conv(bias=True), norm()).to("meta").eval()
    assert found(model, example=IMAGES.to("meta")) == found(model) == BIAS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.BatchNorm2d}, TypeError, "model should be a torch.nn.Module, got the class BatchNorm2d"),
        ({"model": nn.LazyBatchNorm2d()}, ValueError, "the model is not initialized"),
        ({"optimizer": 0.1}, TypeError, "optimizer should have param_groups, got float"),
        ({"batches": iter([])}, TypeError, "batches should be a number or a loader with a length, got list_iterator"),
        ({"batches": 0}, ValueError, "batches should be 1 or more, got 0"),
        ({"batches": []}, ValueError, "batches should be 1 or more, got 0"),
        ({"accumulation": 0}, ValueError, "accumulation should be 1 or more, got 0"),
        ({"accumulation": 2.0}, TypeError, "accumulation should be a number, got float"),
        ({"example": IMAGES[0]}, ValueError, "expected 4D input"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose(**{"model": norm(), **arguments})


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(norm())
    model.stream = (i for i in range(3))
    with pytest.raises(TypeError, match=r"train\.diagnose: stream of the model cannot be copied"):
        diagnose(model)


class OfDomains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = bn_ext.nn.DomainBatchNorm2d(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, torch.arange(len(x)) % 2)


@pytest.mark.parametrize(
    ("model", "shape", "found"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 1), bn_ext.nn.GhostBatchNorm2d(6, 4)), (8, 3, 4, 4), ["0"]),
        (nn.Sequential(nn.Conv2d(3, 6, 1), bn_ext.nn.SharedBatchNorm2d(6, 2)), (8, 3, 4, 4), []),
        (nn.Sequential(nn.Conv1d(3, 6, 1), bn_ext.nn.BatchNormLast(6)), (8, 3, 6), []),
        (nn.Sequential(nn.Conv2d(3, 6, 1), OfDomains()), (8, 3, 4, 4), []),
        (bn_ext.nn.BatchNormLast(100), (8, 40, 100), []),  # 320 values per channel
        (bn_ext.nn.BatchNormLast(100), (2, 3, 100), [""]),
    ],
    ids=["ghost", "shared", "last", "domain", "many values", "few values"],
)
def test_other_sets_of_values(model: nn.Module, shape: tuple[int, ...], found: list[str]) -> None:
    assert [finding.path for finding in bn_ext.train.diagnose(model, example=torch.randn(shape))] == found
