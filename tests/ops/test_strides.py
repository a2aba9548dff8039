"""The output lies in memory as torch's does, for every layout of the input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import channel_slice, channels_last, contiguous, expanded, strided, transposed
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bn_ext


def reversed_dims(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def one_from_images(x: Tensor) -> Tensor:
    """As ``image.permute(2, 0, 1)[None]`` leaves it: the stride of the only sample is that of a channel."""
    return channels_last(x)[0][None]


LAYOUTS = [contiguous, channels_last, transposed, reversed_dims, strided, channel_slice, expanded, one_from_images]
SHAPES = [shape for d in range(2, 6) for shape in itertools.product((2,), (1, 3), *[(1, 4)] * (d - 2))]


def output_of(batch_norm: Callable, input: Tensor, training: bool) -> Tensor:
    zeros = torch.zeros(input.size(1), device=input.device)
    statistics = (None, None) if training else (zeros, zeros + 1)
    return batch_norm(input, *statistics, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_torchs(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], training: bool, device: str) -> None:
    input = layout(torch.randn(shape, device=device))
    if training and input.numel() == input.size(1):
        pytest.skip("one value per channel")
    mine, theirs = (
        output_of(f, input, training) for f in (bn_ext.functional.batch_norm, torch.nn.functional.batch_norm)
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = output_of(bn_ext.functional.batch_norm, mode.from_tensor(input), training)
    assert fake.stride() == mine.stride()
    assert mine.stride() == theirs.stride()


@pytest.mark.parametrize("training", [True, False])
def test_what_follows_a_transposed_input(training: bool, device: str) -> None:
    """``view`` works, and a dropout draws the same mask from the same seed, in eager and compiled code."""
    x = torch.randn(4, 7, 5, device=device).transpose(1, 2)
    ours = bn_ext.BatchNorm1d(5, device=device)
    results = []
    for norm in (torch.nn.BatchNorm1d(5, device=device), ours, torch.compile(ours, backend="eager")):
        torch.manual_seed(0)
        y = torch.nn.functional.dropout(norm.train(training)(x))
        results.append(y.view(4, -1) if y.is_contiguous() else y)
    for one in results[1:]:
        torch.testing.assert_close(one, results[0], check_stride=True)
