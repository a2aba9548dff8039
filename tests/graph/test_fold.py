"""bn_ext.fold gives the same outputs with fewer batch norms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import assert_same_outputs, batch_norms, image, outcomes, pair, trained
from networks import NETWORKS
from torch import Tensor, nn

import bn_ext

# Their batch norms that follow something else than a convolution, and those that follow one.
FOLDED = {
    "resnet18": 8,
    "resnet50": 9,
    "preact_resnet": 5,
    "mobilenet_v2": 7,
    "efficientnet": 7,
    "densenet": 4,
    "unet3d": 6,
}
LEFT = {"preact_resnet": 2, "densenet": 5}

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("converted", [False, True], ids=["torchs", "ours"])
@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, given: bool, converted: bool, dtype: torch.dtype, device: str) -> None:
    network = NETWORKS[name]
    model = network.make().to(device, dtype)
    for _ in range(3):
        model(network.input(device=device, dtype=dtype))
    model.eval()
    if converted:
        bn_ext.convert(model)
    input = network.input(device=device, dtype=dtype)
    folded = bn_ext.fold(model, *([input] if given else []))
    assert_same_outputs(folded, model, input, tolerance={torch.float64: 1e-12, torch.float32: 1e-5}[dtype])
    assert sum(map(bool, outcomes(folded).values())) == FOLDED[name]
    assert batch_norms(folded) == LEFT.get(name, 0)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.3}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["Conv", "ConvTranspose"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, kinds: dict, groups: int, bias: bool, options: dict) -> None:
    layer = kinds[dims](4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = pair(layer, NORMS[dims], **options).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": "0"}
    assert type(folded.get_submodule("0")) is kinds[dims]
    assert_same_outputs(folded, model, torch.randn(3, 4, *[5] * dims, dtype=torch.double))


def test_batch_norm_without_bias() -> None:
    model = pair(nn.Conv2d(4, 6, 1)).double()
    model[1].bias = None
    assert_same_outputs(bn_ext.fold(model), model, torch.randn(3, 4, 2, 2, dtype=torch.double))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_linear(bias: bool) -> None:
    model = pair(nn.Linear(4, 6, bias), nn.BatchNorm1d).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": "0"}
    assert_same_outputs(folded, model, torch.randn(5, 4, dtype=torch.double))


def test_sync_batch_norm() -> None:
    model = pair(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": "0"}
    assert_same_outputs(folded, model, torch.randn(3, 4, 5, 5, dtype=torch.double))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_once(dtype: torch.dtype) -> None:
    """A folded weight is the exact one, rounded; the batch norm may be of another type."""
    model = pair(nn.Conv2d(4, 6, 3, bias=False).to(dtype))
    exactly = bn_ext.fold(copy.deepcopy(model).double()).state_dict()
    for name, folded in bn_ext.fold(model).state_dict().items():
        assert folded.dtype == dtype
        assert torch.equal(folded, exactly[name].to(dtype))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_is_kept(kind: type, kernel: int) -> None:
    model = pair(kind(4, 6, kernel, groups=2)).to(memory_format=torch.channels_last)
    assert bn_ext.fold(model).get_submodule("0").weight.stride() == model[0].weight.stride()


@pytest.mark.parametrize("required", [False, True])
def test_requires_grad_is_the_weights(required: bool) -> None:
    model = pair(nn.Conv2d(4, 6, 3, bias=False))
    model[0].weight.requires_grad_(required)
    folded = bn_ext.fold(model)
    assert [p.requires_grad for p in folded.parameters()] == [required] * 2
    assert all(p.is_leaf for p in folded.parameters())


def test_padding_mode_and_settings_are_kept() -> None:
    model = pair(nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", dilation=2)).double()
    assert_same_outputs(bn_ext.fold(model), model, torch.randn(3, 4, 7, 7, dtype=torch.double))


def test_same_pair_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.norm(self.conv(x)).relu()))

    model = trained(Twice()).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norm": "conv"}
    assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5, dtype=torch.double))


def test_two_batch_norms_in_a_row() -> None:
    model = trained(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6))).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": "0", "2": "0"}
    assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5, dtype=torch.double))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["of the call", "of the module"])
@pytest.mark.parametrize(("activation", "param"), [(None, None), ("relu", None), ("leaky_relu", 0.3), ("elu", 0.5)])
def test_ours_with_residual_and_activation(
    activation: str | None, param: float | None, own: bool, residual: bool, keyword: bool
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)
            options = {"activation": activation, "activation_param": param}
            self.norm = bn_ext.BatchNormAct2d(6, **options) if own else bn_ext.BatchNorm2d(6)
            self.options = {} if own else options

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x.square() if residual else None
            y = self.conv(x)
            if keyword:
                return self.norm(input=y, residual=shortcut, **self.options)
            return self.norm(y, shortcut, *self.options.values())

    model = trained(Block()).double()
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norm": "conv"}
    assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5, dtype=torch.double))


class NoForward(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding="same", bias=False)


class PaddedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias)


class NormWithoutForward(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=0.1)


class FunctionNorm(nn.Module):
    """A batch norm of its own, by torch's function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.scale, self.shift, self.training, eps=0.2)


class TorchFunctionNorm(FunctionNorm):
    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return torch.batch_norm(x, self.scale, self.shift, *statistics, self.training, 0.1, 0.2, True)


class OursFunctionNorm(FunctionNorm):
    def forward(self, x: Tensor) -> Tensor:
        return bn_ext.functional.batch_norm(x, self.running_mean, self.running_var, self.scale, self.shift)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def named(name: str) -> Callable[[type], type]:
    """Gives a class the full name of another."""

    def rename(cls: type) -> type:
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        cls.__name__ = cls.__qualname__
        return cls

    return rename


@named("torchvision.ops.misc.FrozenBatchNorm2d")
class Frozen(nn.Module):
    def __init__(self, channels: int, eps: float = 0.3) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


@named("transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d")
class FrozenOfTransformers(Frozen):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


@named("timm.layers.norm_act.BatchNormAct2d")
class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: Callable[[], nn.Module] = nn.PReLU) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


OTHERS = {
    "conv without forward": (lambda: NoForward(6, 6, 3), nn.BatchNorm2d),
    "conv that pads": (lambda: PaddedConv(6, 6, 4, 1, 0, 1, 2, False), nn.BatchNorm2d),
    **{norm.__name__: (lambda: nn.Conv2d(6, 6, 3, padding=1), norm) for norm in (NormWithoutForward, FunctionNorm)},
    **{norm.__name__: (lambda: nn.Conv2d(6, 6, 3), norm) for norm in (TorchFunctionNorm, OursFunctionNorm, Frozen)},
    **{norm.__name__: (lambda: nn.Conv2d(6, 6, 3), norm) for norm in (FrozenOfTransformers, NormAct)},
}


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
@pytest.mark.parametrize(("layer", "norm"), OTHERS.values(), ids=OTHERS)
def test_other_classes(layer: Callable[[], nn.Module], norm: type[nn.Module], converted: bool, given: bool) -> None:
    model = pair(layer(), norm).double()
    if converted:
        bn_ext.convert(model)
    input = image(dtype=torch.double)
    folded = bn_ext.fold(model, *([input] if given else []))
    assert outcomes(folded) == {"1": "0"}
    assert batch_norms(folded) == 0
    assert_same_outputs(folded, model, input)


def test_modules_in_a_batch_norm_stay() -> None:
    model = pair(nn.Conv2d(6, 6, 3), NormAct)
    folded = bn_ext.fold(model)
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]
    assert folded[1].act.weight is model[1].act.weight


def test_parametrized_batch_norm() -> None:
    model = pair(nn.Conv2d(6, 6, 3)).double()
    nn.utils.parametrize.register_parametrization(model[1], "weight", Double())
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": "0"}
    assert_same_outputs(folded, model, image(dtype=torch.double))


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5, inplace=True)], ids=str)
def test_what_does_nothing_is_seen_through(between: nn.Module, given: bool) -> None:
    model = trained(nn.Sequential(nn.Conv2d(6, 6, 3), between, nn.BatchNorm2d(6))).double()
    input = image(dtype=torch.double)
    folded = bn_ext.fold(model, *([input] if given else []))
    assert outcomes(folded) == {"2": "0"}
    assert_same_outputs(folded, model, input)


def test_another_rank_than_that_of_the_example() -> None:
    """The function takes any rank, and normalizes rows where a convolution gives one example."""
    folded = bn_ext.fold(pair(nn.Conv2d(6, 6, 1), FunctionNorm), image())
    with pytest.raises(AssertionError, match="0 holds 1, folded for inputs of 4 dimensions alone"):
        folded(image()[0])
