"""Models averaged with their statistics pooled as statistics."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from bn_ext.train.record import Record, Row, record

_MEAN, _VAR, _COUNTER = "running_mean", "running_var", "num_batches_tracked"


class MergedState(OrderedDict[str, Any]):
    """A state dict for ``load_state_dict``. It prints as the table of what was merged, its ``record``."""

    record: Record

    def __repr__(self) -> str:
        return repr(self.record)


@torch.no_grad()
def merge_state_dicts(states: Sequence[Mapping[str, Any]], counts: Sequence[float] | None = None) -> MergedState:
    """The state of the average of several models, with their batch norms' statistics pooled as statistics.

    Use it for a round of federated averaging, and for averages of weights ("soups"). Parameters and other buffers
    become their means, weighted by ``counts``. The running statistics become those of all models' data together: the
    mean is the weighted mean, the variance the weighted mean of the variances and the variance between the models'
    means, which plain averages leave out. Batch counters add up and stay integers.

    The averaged weights give other activations than the models' own: with data at hand, :func:`recalibrate` after it is
    better still.

    Args:
        states: what ``state_dict()`` of each model gave; they are left as they are.
        counts: how much each model counts, such as the number of its examples; all the same unless given. A model of 0
            is not read, but for its counter.

    Returns:
        A state dict, with tensors of the first one's dtypes and devices. It prints as a table of the batch norms.

    Raises:
        ValueError: no states; other names or shapes in one of them; counts of another number, or negative, not finite,
            or all 0; integers or other values, beside counters, that differ.

    Example:
        >>> models = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
        >>> models[1].running_mean.fill_(2.0)
        tensor([2., 2.])
        >>> merged = bn_ext.train.merge_state_dicts([model.state_dict() for model in models], counts=[100, 300])
        >>> merged["running_mean"], merged["running_var"]
        (tensor([1.5000, 1.5000]), tensor([1.7500, 1.7500]))

    Source: PFLlib#260 and #269, FedScale#57, FLamby#260 and others report statistics that were forgotten, counters that
    became fractions, and variances below 0 from averages that took statistics for weights. McMahan et al. 2017, arXiv
    1602.05629, is the average itself; Li et al. 2021, arXiv 2102.07623, found that clients with unlike data do better
    if their batch norms are not averaged at all.
    """
    shares = _shares(states, counts)
    first = states[0]
    for number, state in enumerate(states[1:], 1):
        if unlike := sorted(set(first) ^ set(state)):
            raise ValueError(f"bn_ext.train.merge_state_dicts: states 0 and {number} differ in {unlike[0]!r}")
    used = [(share, state) for share, state in zip(shares, states) if share > 0]
    merged, rows = MergedState(), []
    for name in first:
        prefix, last = name.rpartition(".")[::2]
        partner = f"{prefix}.{_MEAN}".lstrip(".")
        if last == _COUNTER:
            merged[name] = sum(state[name].to(first[name]) for state in states)
        elif last == _VAR and partner in merged:
            within, between = _average(name, used), _average(partner, used, merged[partner])
            merged[name] = (within + between).to(first[name])
            most = (between / (within + between)).nan_to_num().max().item() if within.numel() else 0.0
            rows.append(Row(prefix, "", f"statistics pooled: {most:.0%} of a variance at most is between the models"))
        else:
            merged[name] = _same(name, states) if _is_fixed(first[name]) else _average(name, used)
    for name, value in merged.items():
        if isinstance(value, Tensor) and isinstance(first[name], Tensor):
            merged[name] = value.to(first[name])
    if hasattr(first, "_metadata"):
        merged._metadata = first._metadata  # type: ignore[attr-defined]
    merged.record = record(f"average of {len(states)} models", rows)
    return merged


def averaging(decay: float | None = None) -> Callable[[Any, Any, Any], None]:
    """The ``multi_avg_fn`` of a :class:`torch.optim.swa_utils.AveragedModel` with buffers whose counters stay right.

    By torch's own function an average of counters is rounded at every step: it lags or stands still. Here integers are
    the model's own, which has seen the batches; everything else is averaged as by torch. Use it with
    ``use_buffers=True``, for an average whose statistics may trail as its weights do. If the weights moved far,
    :func:`recalibrate` the average.

    Args:
        decay: of an exponential average; None for the mean of all.

    Returns:
        A function for ``AveragedModel(model, multi_avg_fn=..., use_buffers=True)``.

    Raises:
        ValueError: a ``decay`` outside of 0 to 1.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> average = torch.optim.swa_utils.AveragedModel(
        ...     model, multi_avg_fn=bn_ext.train.averaging(0.9), use_buffers=True
        ... )
        >>> for _ in range(5):
        ...     y = model(torch.randn(4, 2))
        ...     average.update_parameters(model)
        >>> average.module.num_batches_tracked
        tensor(5)

    Source: swa#8 and pytorch_ema#13, where buffers were forgotten or averaged as weights.
    """
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"bn_ext.train.averaging: decay should be from 0 to 1, got {decay}")
    of_torch = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)

    def average(averaged: Any, current: Any, number: Any) -> None:
        if _is_fixed(averaged[0]):
            for mine, models in zip(averaged, current):
                mine.copy_(models)
        else:
            of_torch(averaged, current, number)

    return average


def _shares(states: Sequence[Mapping[str, Any]], counts: Sequence[float] | None) -> list[float]:
    counts = [1.0] * len(states) if counts is None else [float(count) for count in counts]
    if not states or len(counts) != len(states):
        raise ValueError(f"bn_ext.train.merge_state_dicts: got {len(states)} states and {len(counts)} counts")
    if not all(math.isfinite(count) and count >= 0 for count in counts) or not sum(counts):
        raise ValueError(f"bn_ext.train.merge_state_dicts: counts should be 0 or more, not all 0, got {counts}")
    return [count / sum(counts) for count in counts]


def _is_fixed(value: Any) -> bool:
    """Whether a value has no average."""
    return not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex())


def _average(name: str, states: Sequence[tuple[float, Mapping[str, Any]]], center: Tensor | None = None) -> Tensor:
    """The weighted mean of a tensor, or of its squared distance from ``center``, in double precision."""
    (_, first), *_ = states
    shape, device = first[name].shape, first[name].device
    total = torch.zeros(shape, dtype=torch.promote_types(first[name].dtype, torch.float64), device=device)
    for share, state in states:
        if state[name].shape != shape:
            raise ValueError(
                f"bn_ext.train.merge_state_dicts: {name} is of sizes {tuple(shape)} and {tuple(state[name].shape)}"
            )
        value = state[name].to(total)
        total += share * (value if center is None else (value - center).square())
    return total


def _same(name: str, states: Sequence[Mapping[str, Any]]) -> Any:
    """The value that all states have."""
    values = [state[name] for state in states]
    one = values[0]
    alike = [torch.equal(one, v.to(one)) if isinstance(one, Tensor) else one == v for v in values[1:]]
    if not all(alike):
        raise ValueError(f"bn_ext.train.merge_state_dicts: {name} has no average, and differs between the states")
    return one.clone() if isinstance(one, Tensor) else one
