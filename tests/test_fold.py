"""bn_ext.fold: the same outputs with fewer batch norms, and a reason for each that is left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn
from torch.fx.proxy import TraceError

import bn_ext

# Their batch norms that follow something else than a convolution, and those that follow one.
FOLDED = {"resnet18": 20, "resnet50": 12, "preact_resnet": 7, "mobilenet_v2": 10, "efficientnet": 10, "densenet": 5}
LEFT = {"preact_resnet": 3, "densenet": 6}

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def trained(model: nn.Module) -> nn.Module:
    """In evaluation mode, with random parameters and statistics in its batch norms."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def pair(layer: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d, **options) -> nn.Module:
    return trained(nn.Sequential(layer, norm(6, **options)))


def assert_same_outputs(folded: nn.Module, model: nn.Module, *inputs: Tensor, tolerance: float = 1e-12) -> None:
    one, other = (m(*copy.deepcopy(inputs)).detach() for m in (folded, model))
    scale = other.abs().max().item()
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def outcomes(folded: nn.Module) -> dict[str, str]:
    return {fold.batch_norm: fold.into for fold in folded.folds}


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# ---------------------------------------------------------------------------------------------- what is folded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("converted", [False, True], ids=["torchs", "ours"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, converted: bool, dtype: torch.dtype, device: str) -> None:
    network = NETWORKS[name]
    model = network.make().to(device, dtype)
    for _ in range(3):
        model(network.input(device=device, dtype=dtype))
    model.eval()
    if converted:
        bn_ext.convert(model)
    input = network.input(device=device, dtype=dtype)
    folded = bn_ext.fold(model, (input,))
    assert_same_outputs(folded, model, input, tolerance={torch.float64: 1e-12, torch.float32: 1e-5}[dtype])
    assert sum(map(bool, outcomes(folded).values())) == FOLDED.get(name, 10)
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


def test_batch_norm_after_two_layers() -> None:
    """It goes into each of them, and stays where it follows none."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.norm = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.one(x)) + self.norm(self.other(x)) + self.norm(x)

    model = trained(Model()).double()
    folded = bn_ext.fold(model)
    assert [fold.into for fold in folded.folds] == ["one", "other", ""]
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


# ---------------------------------------------------------------------------------------------- what is not


class Custom(nn.Module):
    """conv and norm, called as told."""

    def __init__(self, call: Callable, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), norm or nn.BatchNorm2d(6)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    change(model)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3))
    model[2].weight = model[0].weight
    return model


def residual_of_itself() -> nn.Module:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y, y)

    return Custom(call, bn_ext.BatchNorm2d(6))


def output_used() -> nn.Module:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    return Custom(call)


def replaced_forward(module: nn.Module) -> None:
    module.forward = lambda input: type(module).forward(module, input) + 1


def half(model: nn.Module) -> None:
    """A weight that float16 cannot hold."""
    model.half()
    nn.init.constant_(model[0].weight, 6e4)
    nn.init.constant_(model[1].weight, 1e4)


NOT_FOLDED = {
    "statistics": (
        lambda: with_(lambda m: m.register_module("1", nn.BatchNorm2d(6, track_running_stats=False))),
        "no running",
    ),
    "subclass of norm": (lambda: with_(lambda m: m.register_module("1", OwnNorm(6))), "OwnNorm"),
    "subclass of layer": (lambda: with_(lambda m: m.register_module("0", OwnConv(6, 6, 3))), "follows"),
    "other layer": (lambda: with_(lambda m: m.register_module("0", nn.ReLU())), "follows"),
    "no layer": (lambda: nn.Sequential(nn.BatchNorm2d(6)), "follows"),
    "weight norm": (lambda: with_(lambda m: nn.utils.weight_norm(m[0])), "hooks"),
    "spectral norm": (lambda: with_(lambda m: nn.utils.spectral_norm(m[0])), "hooks"),
    "parametrization": (
        lambda: with_(lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Double())),
        "follows",
    ),
    "norm's parametrization": (
        lambda: with_(lambda m: nn.utils.parametrize.register_parametrization(m[1], "weight", Double())),
        "Parametrized",
    ),
    "layer's hook": (lambda: with_(lambda m: m[0].register_forward_hook(lambda *a: a[-1] + 1)), "hooks"),
    "layer's pre-hook": (lambda: with_(lambda m: m[0].register_forward_pre_hook(lambda m, a: a[0] + 1)), "hooks"),
    "layer's backward hook": (lambda: with_(lambda m: m[0].register_full_backward_hook(lambda *a: None)), "hooks"),
    "norm's hook": (lambda: with_(lambda m: m[1].register_forward_hook(lambda *a: a[-1] + 1)), "hooks"),
    "norm's backward pre-hook": (
        lambda: with_(lambda m: m[1].register_full_backward_pre_hook(lambda *a: None)),
        "hooks",
    ),
    "layer's forward": (lambda: with_(lambda m: replaced_forward(m[0])), "forward of its own"),
    "norm's forward": (lambda: with_(lambda m: replaced_forward(m[1])), "forward of its own"),
    "tied weights": (tied, "shares"),
    "weight used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean()), "shares"),
    "bias used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.conv.bias.mean()), "shares"),
    "layer called again": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) + m.conv(x)), "called elsewhere"),
    "output used": (output_used, "output is used"),
    "residual of itself": (residual_of_itself, "output is used"),
    "container's hook": (
        lambda: nn.Sequential(with_(lambda m: m.register_forward_hook(lambda *a: a[-1] + 1))),
        "not traced",
    ),
    "not finite": (lambda: with_(half), "finite"),
}


@pytest.mark.parametrize(("make", "reason"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded(make: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(1)
    model = make().eval()
    if reason != "finite":
        trained(model)
    folded = bn_ext.fold(model)
    assert set(outcomes(folded).values()) == {""}
    assert reason in str(folded.folds[0])
    assert batch_norms(folded) == batch_norms(model)
    if reason != "finite":
        assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5), tolerance=0)


def test_layer_with_two_batch_norms() -> None:
    """One convolution, a batch norm for each level, as detection heads have."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norms = nn.Conv2d(6, 6, 1), nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[0](self.conv(x)) + self.norms[1](self.conv(x))

    model = trained(Head())
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norms.0": "", "norms.1": ""}
    assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5), tolerance=0)


def test_layer_inside_one_that_is_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.TransformerEncoderLayer(6, 2, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer.linear1(x)) + self.layer(x)

    model = trained(Model())
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norm": ""}
    assert_same_outputs(folded, model, torch.randn(5, 6), tolerance=0)


@pytest.mark.parametrize("features", [6, 5])
def test_batch_norm_over_positions(features: int) -> None:
    """Of (N, L, C) it normalizes the L positions, not the features that a linear layer gives."""
    model = trained(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(features)))
    folded = bn_ext.fold(model)
    input = torch.randn(3, features, 4)
    if features == 6:  # it may be meant for (N, C)
        with pytest.raises(AssertionError, match="0 holds 1, folded for inputs of 2 dimensions alone"):
            folded(input)
        with pytest.raises(AssertionError):
            bn_ext.fold(model, (input,))
        folded = bn_ext.fold(folded)  # tracing again keeps the assertion
        with pytest.raises(AssertionError):
            folded(input)
    else:
        assert "does not normalize the 6 features" in str(folded.folds[0])
        assert_same_outputs(folded, model, input, tolerance=0)


def test_single_example_of_a_convolution() -> None:
    """(C, L) is a batch of C rows to BatchNorm1d; where the lengths agree, only the rank tells."""
    model = pair(nn.Conv1d(4, 6, 1), nn.BatchNorm1d)
    with pytest.raises(AssertionError, match="3 dimensions"):
        bn_ext.fold(model)(torch.randn(4, 6))


def test_batch_norm_of_other_dimensions() -> None:
    """BatchNorm1d sees the (C, H, W) of a single example as N = C examples of H features."""
    model = pair(nn.Conv2d(4, 6, 1), nn.BatchNorm1d)
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"1": ""}
    assert_same_outputs(folded, model, torch.randn(4, 6, 3), tolerance=0)


# ---------------------------------------------------------------------------------------------- model and result


def test_the_model_is_unchanged() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    model = trained(nn.Sequential(stem, nn.Conv2d(6, 2, 1)))
    state, parts = copy.deepcopy(model.state_dict()), list(model.modules())
    attributes = [dict(vars(part)) for part in parts]
    folded = bn_ext.fold(model, (torch.randn(2, 3, 5, 5),))
    assert list(model.modules()) == parts
    assert [vars(part) for part in parts] == attributes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert folded.get_submodule("1") is model[1]
    assert folded.get_submodule("0.0").weight is not stem[0].weight
    assert list(folded.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert not any(part.training for part in folded.modules())


def test_constants_do_not_go_into_the_model() -> None:
    model = trained(Custom(lambda m, x: m.norm(m.conv(x)) * torch.arange(5.0)))
    attributes = dict(vars(model))
    folded = bn_ext.fold(model)
    assert vars(model) == attributes
    assert_same_outputs(folded, model, torch.randn(2, 6, 5, 5), tolerance=1e-5)


def test_hooks_of_the_model_and_of_containers_run() -> None:
    inner = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model = trained(nn.Sequential(inner, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    seen = []
    for name, module in (("inner", inner), ("model", model)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    folded = bn_ext.fold(model)
    assert seen == []
    assert outcomes(folded) == {"2": "1", "0.1": ""}
    folded(torch.randn(2, 6, 5, 5))
    assert seen == ["inner", "model"]


def test_result_can_be_copied_pickled_and_folded_again() -> None:
    model = pair(nn.Linear(4, 6), nn.BatchNorm1d)
    input = torch.randn(5, 4)
    folded = bn_ext.fold(model)
    for same in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), bn_ext.fold(folded)):
        assert torch.equal(same(input), folded(input))


@pytest.mark.parametrize("part", [(), ("1",)], ids=["model", "batch norm"])
def test_training_mode_is_refused(part: tuple[str, ...]) -> None:
    model = pair(nn.Conv2d(4, 6, 3))
    model.get_submodule("".join(part)).train()
    with pytest.raises(ValueError, match=rf"{''.join(part) or 'the model'} is in training mode, call model.eval\(\)"):
        bn_ext.fold(model)


def by_value(m: nn.Module, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return y if y.sum() > 0 else -y


def test_untraceable_model() -> None:
    model = Custom(by_value).eval()
    attributes = dict(vars(model))
    with pytest.raises(TraceError, match="fold: Custom cannot be traced"):
        bn_ext.fold(model)
    model.forward = lambda x: x
    with pytest.raises(TraceError, match="forward set on the object"):
        bn_ext.fold(model)
    del model.forward
    assert vars(model) == attributes


def test_results_are_checked() -> None:
    """A random number is drawn once by tracing, and each time by the model."""
    model = trained(Custom(lambda m, x: {"y": [m.norm(m.conv(x)) + torch.randn(5)]}))
    input = torch.randn(2, 6, 5, 5)
    with pytest.raises(AssertionError, match="fold: output 0 differs"):
        bn_ext.fold(model, (input,))


def test_addition_in_place_stays_in_place() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.c(x))
            z = y
            y += 1
            return y * z

    model, x = Aliased().eval(), torch.randn(2, 3, 4, 4)
    folded = bn_ext.fold(model)
    assert folded.folds[0].into == "c"
    torch.testing.assert_close(folded(x), model(x))


# ---------------------------------------------------------------------------------------------- optional arguments


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False, scale: float = 2.0) -> Any:
        y = self.norm(self.conv(x)) * scale
        y = y if mask is None else y * mask
        return (y, y) if twice else y


def test_optional_arguments_have_their_defaults() -> None:
    model, x, mask = trained(Optional()), torch.randn(2, 3, 5, 5), torch.rand(2, 4, 5, 5)
    folded = bn_ext.fold(model)
    assert outcomes(folded) == {"norm": "conv"}
    torch.testing.assert_close(folded(x), model(x))
    for other in ((mask,), (None, True), (None, False, 3.0)):
        with pytest.raises((AssertionError, TypeError)):
            folded(x, *other)
    torch.testing.assert_close(bn_ext.fold(model, (x, mask))(x, mask), model(x, mask))


def test_an_example_may_be_a_tensor() -> None:
    model, x = trained(Optional()), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(bn_ext.fold(model, x)(x), model(x))


@pytest.mark.parametrize("other", [lambda y: (y, y), lambda y: y.relu()], ids=["structure", "values"])
def test_what_tracing_does_not_see_is_refused_by_an_example(other: Callable[[Tensor], Any]) -> None:
    model = trained(Custom(lambda m, x: other(m.norm(m.conv(x))) if isinstance(x, Tensor) else m.norm(m.conv(x))))
    with pytest.raises(AssertionError, match=r"fold: (the folded model returns|output 0 differs)"):
        bn_ext.fold(model, torch.randn(2, 6, 5, 5))
