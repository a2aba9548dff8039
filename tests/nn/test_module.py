"""The modules stand in for torch's: constructor, state, copies, modes, number types, counter."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import TYPES, Types
from modules import CHANNELS, NAMES, SHAPES, assert_same_state, assert_same_step, constructible, ours, pair, torchs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext

every_module = pytest.mark.parametrize("name", NAMES)

CONSTRUCTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None, "bias": False},
    {"dtype": torch.float64},
]
every_construction = pytest.mark.parametrize(
    "options", constructible(CONSTRUCTIONS), ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default"
)


def inputs(name: str, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype) * 2 + 1 for shape in SHAPES[name]]


# ---------------------------------------------------------------------------------------------- construction


@every_module
def test_is_a_torchs_module_with_the_same_constructor(name: str) -> None:
    assert issubclass(ours(name), torchs(name))
    assert inspect.signature(ours(name)) == inspect.signature(torchs(name))


@every_module
@every_construction
def test_construction(name: str, options: dict, device: str) -> None:
    mine, theirs = ours(name)(CHANNELS, device=device, **options), torchs(name)(CHANNELS, device=device, **options)
    assert isinstance(mine, torchs(name))
    assert repr(mine) == repr(theirs)[:-1] + ", bn_ext)"
    public = {k: v for k, v in vars(theirs).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(mine).items() if not k.startswith("_")} == public
    assert_same_state(mine, theirs)


@every_module
def test_positional_construction(name: str) -> None:
    arguments = (CHANNELS, 1e-3, None, False, True, "meta", torch.float64)
    mine, theirs = ours(name)(*arguments), torchs(name)(*arguments)
    assert repr(mine) == repr(theirs)[:-1] + ", bn_ext)"
    assert mine.running_mean.device.type == "meta"
    assert mine.running_mean.dtype == torch.float64


# ---------------------------------------------------------------------------------------------- the same steps


@every_module
@every_construction
def test_three_steps_and_an_evaluation(name: str, options: dict, device: str) -> None:
    mine, theirs = pair(name, CHANNELS, device=device, **options)
    dtype = options.get("dtype", torch.float32)
    for step in range(3):
        for input in inputs(name, device, dtype):
            mine.load_state_dict(theirs.state_dict())  # or the roundings of one step are seen in the next
            assert_same_step(mine, theirs, input)
        if mine.num_batches_tracked is not None:
            assert mine.num_batches_tracked.item() == (step + 1) * len(SHAPES[name])
            assert mine.num_batches_tracked.dtype == torch.int64
    mine.eval(), theirs.eval()
    before = copy.deepcopy(mine.state_dict())
    for input in inputs(name, device, dtype):
        assert_same_step(mine, theirs, input)
    for key, value in mine.state_dict().items():
        assert torch.equal(value, before[key]), f"evaluation changed {key}"


@every_module
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_number_types(name: str, types: Types, device: str) -> None:
    """The output has the input's type; parameters and statistics keep theirs."""
    module = ours(name)(CHANNELS, device=device)
    for kind, group in ((types.param, module._parameters), (types.stat, module._buffers)):
        for t in group.values():
            if t.is_floating_point():
                t.data = t.data.to(kind)
    for input in inputs(name, device, types.input):
        for training in (True, False):
            output = module.train(training)(input.requires_grad_())
            assert output.dtype == types.input
            output.float().square().sum().backward()
    assert input.grad.dtype == types.input
    assert module.weight.grad.dtype == module.bias.grad.dtype == types.param
    assert module.running_mean.dtype == module.running_var.dtype == types.stat


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_to_half(half: torch.dtype, device: str) -> None:
    mine, theirs = pair("BatchNorm2d", CHANNELS, device=device)
    mine.to(half), theirs.to(half)
    assert_same_step(mine, theirs, torch.randn(4, CHANNELS, 5, 5, device=device).to(half))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("toggle", ["track_running_stats", "num_batches_tracked", "both statistics"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_attributes_changed_after_construction(toggle: str, training: bool, momentum, device: str) -> None:
    mine, theirs = pair("BatchNorm2d", CHANNELS, momentum=momentum, device=device)
    for module in (mine, theirs):
        if toggle == "track_running_stats":
            module.track_running_stats = False
        elif toggle == "num_batches_tracked":
            module.num_batches_tracked = None
        else:
            module.running_mean = module.running_var = None
        module.train(training)
    assert_same_step(mine, theirs, torch.randn(4, CHANNELS, 5, 5, device=device))


@pytest.mark.parametrize("momentum", [0.25, None])
def test_running_average(momentum: float | None, device: str) -> None:
    """Over five batches, by hand in float64."""
    module = bn_ext.BatchNorm1d(3, momentum=momentum, device=device, dtype=torch.float64)
    batches = [torch.randn(8, 3, device=device, dtype=torch.float64) * k + k for k in range(1, 6)]
    mean = torch.zeros(3, dtype=torch.float64, device=device)
    var = torch.ones(3, dtype=torch.float64, device=device)
    for k, batch in enumerate(batches, 1):
        module(batch)
        m = momentum or 1 / k
        mean, var = (1 - m) * mean + m * batch.mean(0), (1 - m) * var + m * batch.var(0)
    torch.testing.assert_close(module.running_mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(module.running_var, var, rtol=1e-14, atol=0)
    assert module.num_batches_tracked.item() == 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("momentum", [0.25, None])
def test_counter_of_another_type(dtype: torch.dtype, momentum: float | None, device: str) -> None:
    """Ours counts in the dtypes in which torch's counts, and refuses the others with nothing changed."""
    mine, theirs = pair("BatchNorm2d", CHANNELS, momentum=momentum, device=device)
    for module in (mine, theirs):
        module.num_batches_tracked = module.num_batches_tracked.to(dtype)
    before = copy.deepcopy(mine.state_dict())
    for _ in range(2):
        input = torch.randn(4, CHANNELS, 5, 5, device=device)
        try:
            theirs(input)
        except RuntimeError:
            with pytest.raises(RuntimeError, match=r"num_batches_tracked.*Bool"):
                mine(input)
            assert all(map(torch.equal, mine.state_dict().values(), before.values()))
        else:
            mine(input)
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("shape", [(0, CHANNELS, 4, 5), (3, CHANNELS, 0, 5), (0, CHANNELS, 0, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_no_values(shape: tuple[int, ...], training: bool, layout: torch.memory_format, device: str) -> None:
    """An empty batch counts, and changes no statistics; its gradients are zero, as torch's."""
    mine, theirs = pair("BatchNorm2d", CHANNELS, device=device)
    mine.train(training), theirs.train(training)
    assert_same_step(mine, theirs, torch.empty(shape, device=device).to(memory_format=layout))
    assert mine.num_batches_tracked.item() == training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 3)], ids=str)
def test_no_channels(shape: tuple[int, ...], training: bool, device: str) -> None:
    mine, theirs = pair("BatchNorm1d", 0, affine=False, device=device)  # torch's own fails with a weight
    assert_same_step(mine.train(training), theirs.train(training), torch.empty(shape, device=device))


def test_single_image_of_rows_columns_channels() -> None:
    """Strides of sizes 1 say nothing about memory, but torch's next layer reads the format from them."""
    image = torch.randn(8, 9, 3).permute(2, 0, 1)[None]
    mine, theirs = pair("BatchNorm2d", 3)
    assert mine(image).stride() == theirs(image).stride()


# ---------------------------------------------------------------------------------------------- state and copies


@every_module
@every_construction
def test_state_dict_goes_both_ways(name: str, options: dict, device: str) -> None:
    mine, theirs = pair(name, CHANNELS, device=device, **options)
    assert mine.state_dict()._metadata == theirs.state_dict()._metadata
    fresh = torchs(name)(CHANNELS, device=device, **options)
    assert fresh.load_state_dict(mine.state_dict(), strict=True) == ([], [])
    assert_same_state(fresh, theirs)


def test_state_dict_from_before_the_counter(device: str) -> None:
    module = bn_ext.BatchNorm2d(CHANNELS, device=device)
    state = module.state_dict()
    del state["num_batches_tracked"]
    state._metadata.clear()
    assert module.load_state_dict(state, strict=True) == ([], [])


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_module
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies(name: str, copied, device: str) -> None:
    module, _ = pair(name, CHANNELS, eps=1e-3, momentum=None, device=device)
    module(inputs(name, device)[0])
    twin = copied(module.eval())
    assert type(twin) is ours(name)
    assert (twin.eps, twin.momentum, twin.training) == (1e-3, None, False)
    assert_same_state(twin, module)
    assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    assert torch.equal(twin(inputs(name, device)[0].fill_(2)), module(inputs(name, device)[0].fill_(2)))


def test_reset() -> None:
    module, _ = pair("BatchNorm2d", CHANNELS)
    module.reset_parameters()
    assert_same_state(module, nn.BatchNorm2d(CHANNELS))


def test_torchs_own_conversion_to_synchronized() -> None:
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), bn_ext.BatchNorm2d(CHANNELS))
    weight = model[1].weight
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].weight is weight


def test_hooks(device: str) -> None:
    module = bn_ext.BatchNorm2d(CHANNELS, device=device)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, output: seen.append("after"))
    module.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    module(torch.randn(2, CHANNELS, 3, 3, device=device, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


# ---------------------------------------------------------------------------------------------- one operator, no more


class Recorder(TorchDispatchMode):
    """Writes down every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_call_is_one_operator(momentum, training: bool, layout: torch.memory_format, device: str) -> None:
    """Counter, running statistics and cumulative momentum are inside it: nothing is read on the host."""
    module = bn_ext.BatchNorm2d(CHANNELS, momentum=momentum, device=device).train(training)
    input = torch.randn(2, CHANNELS, 3, 3, device=device).to(memory_format=layout).requires_grad_()
    with Recorder() as forward:
        output = module(input)
    assert forward.ran == [f"bn_ext.batch_norm_forward.{'default' if training else 'evaluation'}"]
    dy = torch.ones_like(output)
    with Recorder() as backward:
        torch.autograd.grad(output, (input, module.weight, module.bias), dy)
    assert [op for op in backward.ran if "detach" not in op] == ["bn_ext.batch_norm_backward.default"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_backward_keeps_the_input_and_a_few_values_a_channel(training: bool, layout, device: str) -> None:
    module = bn_ext.BatchNorm2d(CHANNELS, device=device).train(training)
    input = torch.randn(9, CHANNELS, 9, 9, device=device).to(memory_format=layout).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(input)
    large = [t for t in kept if t.numel() > CHANNELS]
    assert [t.data_ptr() for t in large] == [input.data_ptr()]
