"""bn_ext.fold leaves some batch norms as they are, and gives the reasons."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folding import Custom, assert_same_outputs, batch_norms, image, outcomes, pair, trained
from torch import Tensor, nn

import bn_ext
from bn_ext.graph import folds


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class FunctionNorm(nn.BatchNorm2d):
    """By a function, with something besides."""

    def __init__(self, function: Callable = F.batch_norm, factor: float | None = None, **options: object) -> None:
        super().__init__(6)
        self.function, self.factor, self.options = function, factor, options

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        weight = self.weight if self.factor is None else self.weight * self.factor
        return self.function(x, self.running_mean, self.running_var, weight, self.bias, **self.options)


class Alternating(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.eps = 2 - self.eps
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnParameter(nn.Parameter):
    pass


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.std(), self.bias)


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 3), norm)


def with_(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    change(model)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3))
    model[2].weight = model[0].weight
    return model


def residual_of_itself() -> nn.Module:
    return Custom(lambda m, x: m.norm(y := m.conv(x), y), bn_ext.BatchNorm2d(6))


def output_used() -> nn.Module:
    return Custom(lambda m, x: m.norm(y := m.conv(x)) + y)


def replaced_forward(module: nn.Module) -> None:
    module.forward = lambda input: type(module).forward(module, input) + 1


def half(model: nn.Module) -> None:
    """A weight that float16 cannot hold."""
    model.half()
    nn.init.constant_(model[0].weight, 6e4)
    nn.init.constant_(model[1].weight, 1e4)


def twice(layer: Callable) -> nn.Module:
    """A batch norm after conv and after another layer."""
    return Custom(lambda m, x: m.norm(m.conv(x)) + m.norm(layer(m, x)))


def two_layers() -> nn.Module:
    return Custom(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), other=nn.Conv2d(6, 6, 3, padding=1))


def own_function(weight: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A batch norm module whose parameters its parent uses."""
    return Custom(
        lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, weight(m, x), m.norm.bias)
    )


def written(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 1:3].mul_(2)
    return m.norm(y)


NOT_FOLDED = {
    "statistics": (
        lambda: with_(lambda m: m.register_module("1", nn.BatchNorm2d(6, track_running_stats=False))),
        "no running",
    ),
    "subclass of norm": (
        lambda: with_(lambda m: m.register_module("1", OwnNorm(6))),
        r"OwnNorm|cannot be traced: .*test_fold_left.py:\d+",
    ),
    "subclass of layer": (lambda: with_(lambda m: m.register_module("0", OwnConv(6, 6, 3))), "follows"),
    "other layer": (lambda: with_(lambda m: m.register_module("0", nn.ReLU())), "follows re"),
    "no layer": (lambda: nn.Sequential(nn.BatchNorm2d(6)), "follows"),
    "weight norm": (lambda: with_(lambda m: nn.utils.weight_norm(m[0])), "follows"),
    "spectral norm": (lambda: with_(lambda m: nn.utils.spectral_norm(m[0])), "follows"),
    "parametrization": (
        lambda: with_(lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Double())),
        "weight is computed",
    ),
    "parameter of another class": (
        lambda: with_(lambda m: m[0].register_parameter("weight", OwnParameter(m[0].weight))),
        "of another class",
    ),
    "standardized weight": (lambda: with_(lambda m: m.register_module("0", Standardized(6, 6, 3))), "is computed"),
    "layer's hook": (lambda: with_(lambda m: m[0].register_forward_hook(lambda *a: a[-1] + 1)), "follows"),
    "layer's pre-hook": (lambda: with_(lambda m: m[0].register_forward_pre_hook(lambda m, a: a[0] + 1)), "follows"),
    "layer's backward hook": (lambda: with_(lambda m: m[0].register_full_backward_hook(lambda *a: None)), "follows"),
    "norm's hook": (lambda: with_(lambda m: m[1].register_forward_hook(lambda *a: a[-1] + 1)), "hooks"),
    "norm's backward pre-hook": (
        lambda: with_(lambda m: m[1].register_full_backward_pre_hook(lambda *a: None)),
        "hooks",
    ),
    "layer's forward": (lambda: with_(lambda m: replaced_forward(m[0])), "follows"),
    "norm's forward": (lambda: with_(lambda m: replaced_forward(m[1])), "forward of its own"),
    "tied weights": (tied, "shares"),
    "weight used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean()), "shares"),
    "weight used with the input": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x * m.conv.weight[0, 0, 0, 0]))),
        "shares",
    ),
    "bias used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.conv.bias.mean()), "shares"),
    "bias used with the output": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x)).sum((0, 2, 3)) * m.conv.bias),
        "shares",
    ),
    "bias not always used": (lambda: twice(lambda m, x: F.conv2d(x, m.conv.weight, None, 1, 1)), "in another way"),
    "weight of two layers": (
        lambda: twice(lambda m, x: F.conv_transpose2d(x, m.conv.weight, m.conv.bias, 1, 1)),
        "in another way",
    ),
    "bias not used": (lambda: Custom(lambda m, x: m.norm(F.conv2d(x, m.conv.weight))), "no place for a bias"),
    "norm's weight used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.norm.weight.mean()), "used elsewhere"),
    "statistics used": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.norm.running_var.mean()), "used elsewhere"),
    "norm asked for a weight": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x)) if hasattr(m.norm, "weight") else x),
        "settings are used elsewhere",
    ),
    "norm asked for statistics": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x)) if m.norm.running_var is not None else x),
        "settings are used elsewhere",
    ),
    "norm asked for a setting": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) * m.norm.eps), "used elsewhere"),
    "norm asked for another": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x)) if getattr(m.norm, "no", None) is None else x),
        "used elsewhere",
    ),
    "norm in training for once": (
        lambda: Custom(lambda m, x: (m.norm.train(), m.norm(m.conv(x)), m.norm.eval())[1]),
        "used elsewhere",
    ),
    "all in training for once": (
        lambda: Custom(lambda m, x: (m.train(), m.norm(m.conv(x)), m.eval())[1]),
        "used elsewhere",
    ),
    "norm's setting set": (
        lambda: Custom(lambda m, x: (setattr(m.norm, "eps", 3.0), m.norm(m.conv(x)))[1]),
        "used elsewhere",
    ),
    "norm's calls differ": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x)), Alternating(6)),
        "differ",
    ),
    "layer called again": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) + m.conv(x)), "output is used"),
    "norm called again": (lambda: Custom(lambda m, x: m.norm(m.conv(x)) + m.norm(x)), "follows"),
    "two layers": (two_layers, "several layers"),
    "output used": (output_used, "output is used"),
    "output returned": (lambda: Custom(lambda m, x: (y := m.conv(x), m.norm(y))), "output is used"),
    "output written to": (lambda: Custom(written), "output is used"),
    "view of the output": (lambda: Custom(lambda m, x: m.norm(m.conv(x).transpose(2, 3))), "follows"),
    "residual of itself": (residual_of_itself, "output is used"),
    "own norm in training": (lambda: with_norm(FunctionNorm(training=True)), "computes more"),
    "own norm's weight computed": (lambda: with_norm(FunctionNorm(factor=2)), "computes more"),
    "own norm and activation": (
        lambda: with_norm(FunctionNorm(bn_ext.functional.batch_norm, activation="relu")),
        "computes more",
    ),
    "own norm with arguments": (
        lambda: Custom(lambda m, x: m.norm(m.conv(x), x), FunctionNorm()),
        "computes more",
    ),
    "function in the parent": (lambda: own_function(lambda m, x: m.norm.weight), "not called"),
    "not finite": (lambda: with_(half), "finite"),
}


@pytest.mark.parametrize("given", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize(("make", "reason"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded(make: Callable[[], nn.Module], reason: str, given: bool) -> None:
    torch.manual_seed(1)
    model = make().eval()
    if reason != "finite":
        trained(model)
    folded = bn_ext.fold(model, *([image(dtype=next(model.parameters()).dtype)] if given else []))
    assert set(outcomes(folded).values()) == {""}
    assert re.search(reason, str(folds(folded)[0]))
    assert batch_norms(folded) == batch_norms(model)
    if reason != "finite":
        assert_same_outputs(folded, model, image(), tolerance=0)


@pytest.mark.parametrize("part", ["0", "1"])
def test_parameters_without_values(part: str) -> None:
    model = with_(lambda m: m).eval()
    model.get_submodule(part).to("meta")
    assert "have no values" in str(folds(bn_ext.fold(model))[0])


def test_output_that_is_kept() -> None:
    """A tensor that a run stores may be read later."""

    def call(m: nn.Module, x: Tensor) -> Tensor:
        m.features = m.conv(x)
        return m.norm(m.features)

    folded = bn_ext.fold(trained(Custom(call)), image())
    assert "output is used elsewhere" in str(folds(folded)[0])


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
            bn_ext.fold(folded)(input)
        folded = bn_ext.fold(model, (input,))  # it normalizes positions
        assert "does not normalize" in str(folds(folded)[0])
        assert_same_outputs(folded, model, input, tolerance=0)
    else:
        assert "does not normalize the 6 features" in str(folds(folded)[0])
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
