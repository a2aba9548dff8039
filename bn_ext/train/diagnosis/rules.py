"""The rules, one for each kind of finding. A rule yields the path of a module and what was found there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext.train.diagnosis.finding import Finding
from bn_ext.train.diagnosis.flow import nonlinearity_before
from bn_ext.train.diagnosis.subject import Norm, Subject, processes

Found = Iterator[tuple[str, str]]

# The standard deviation of n normal values has a relative error of 1 / √(2 (n - 1)): 13 % for 32.
_VALUES = 32
# Wu & He 2018, ResNet-50 on ImageNet: from 16 images a GPU to 8 the error rises by a point, from 32 to 16 it does not.
_IMAGES = 16
# A running average of momentum m weights about (2 - m) / m batches alike: 3 for 0.5.
_MOMENTUM = 0.5
_REST = 0.01  # of the statistics from before the training, that may be left after it

_IOFFE = "Ioffe & Szegedy 2015, arXiv 1502.03167"
_WU = "Wu & He 2018, arXiv 1803.08494"
_JOHNSON = "Wu & Johnson 2021, arXiv 2105.07576"


def useless_biases(subject: Subject) -> Found:
    for path, layer in subject.biases:
        yield path, f"bias of {type_before_parametrizations(layer).__name__} before batch norm"


def dropout_before(subject: Subject) -> Found:
    for norm in _trained(subject):
        if drops := max((input.source.drops for input in norm.inputs if input.source is not None), default=0):
            yield norm.path, f"dropout of {drops:g} before batch norm"


def after_nonlinearity(subject: Subject) -> Found:
    for norm in _trained(subject):
        if name := next(filter(None, (nonlinearity_before(input.source) for input in norm.inputs)), ""):
            yield norm.path, f"batch norm after {name}"


def weight_decay(subject: Subject) -> Found:
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    decays = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"] if p.requires_grad}
    for norm in subject.norms:
        found = {name: float(decays[p]) for p, name in norm.parameters().items() if decays.get(p)}
        if found:
            rates = " and ".join(f"{rate:g}" for rate in sorted({*found.values()}))
            yield norm.path, f"weight decay of {rates} on {' and '.join(found)}"


def few_values(subject: Subject) -> Found:
    for norm in _trained(subject):
        if norm.values is not None and norm.values < _VALUES:
            yield norm.path, f"{norm.values} value{'s' * (norm.values != 1)} per channel in training"


def never_updated(subject: Subject) -> Found:
    for norm in subject.norms:
        if norm.tracks and norm.module.momentum == 0:
            yield norm.path, "statistics never updated: a momentum of 0"
        elif norm.is_untouched and (norm.is_frozen or not norm.module.training):
            yield norm.path, "statistics never updated, and in use: evaluation mode"
        elif norm.is_untouched and not norm.is_used:
            yield norm.path, "statistics never updated: not called with the example"


def few_batches(subject: Subject) -> Found:
    for norm in subject.norms:
        momentum = getattr(norm.module, "momentum", None)
        if not norm.tracks or not isinstance(momentum, (int, float)) or momentum <= 0:
            continue
        left = (1 - momentum) ** (subject.batches or 0)
        if momentum > _MOMENTUM:
            yield norm.path, f"a momentum of {momentum:g} sees {max((2 - momentum) / momentum, 1):.1f} batches"
        elif subject.batches is not None and left > _REST:
            s = "es" * (subject.batches != 1)
            yield norm.path, f"a momentum of {momentum:g} leaves {left:.0%} of the old after {subject.batches} batch{s}"


def accumulation(subject: Subject) -> Found:
    if subject.accumulation > 1 and any(_trained(subject)):
        yield "", f"gradients of {subject.accumulation} batches accumulated beside batch norm"


def not_synchronized(subject: Subject) -> Found:
    for path, wrapper in subject.model.named_modules():
        if not isinstance(wrapper, DistributedDataParallel) or (ranks := processes(wrapper.process_group)) == 1:
            continue
        for norm in _trained(subject):
            inside = f"{norm.path}.".startswith(f"{path}." if path else "")
            images = norm.images if norm.images is not None else subject.batch_size
            if inside and not norm.is_synchronized and images is not None and images < _IMAGES:
                s = "s" * (images != 1)
                yield norm.path, f"{images} image{s} in each of {ranks} processes, not synchronized"


def _trained(subject: Subject) -> Iterator[Norm]:
    return (norm for norm in subject.norms if norm.by_batch)


class Rule(NamedTuple):
    """A kind of finding, with what is the same for all of its kind."""

    find: Callable[[Subject], Found]
    why: str
    remedy: str
    source: str

    def findings(self, subject: Subject) -> Iterator[Finding]:
        return (Finding(path, what, self.why, self.remedy, self.source) for path, what in self.find(subject))


RULES = (
    Rule(
        useless_biases,
        "Batch norm subtracts the mean, and with it any bias: its gradient is rounding error, which Adam turns into a "
        "random walk. Its own bias is what shifts the output.",
        "Make the layer with bias=False. A model that is trained keeps its outputs if the bias goes out of the running "
        "mean, too.",
        f"{_IOFFE}, section 3.2",
    ),
    Rule(
        dropout_before,
        "Dropout raises the variance in training and not in evaluation, where batch norm goes on to divide by the "
        "variance of training.",
        "Drop after the last batch norm only, or use less dropout, or none: batch norm regularizes, too.",
        f"Li et al. 2018, arXiv 1801.05134; {_IOFFE}, section 4.2.1",
    ),
    Rule(
        after_nonlinearity,
        "The paper normalizes before the nonlinearity, where values are closer to normal. Comparisons since have gone "
        "both ways. But behind an activation bn_ext can neither fuse the two nor fold the batch norm into the layer "
        "before.",
        "Try layer, batch norm, activation; keep the order that trains better.",
        f"{_IOFFE}, section 3.2; bn_ext.fuse and bn_ext.fold",
    ),
    Rule(
        weight_decay,
        "Weight and bias of a batch norm set the scale of a layer's output, and decay pulls that towards 0. Usual "
        "recipes decay only the weights of convolutions and linear layers.",
        "Put weight and bias into a parameter group with weight_decay=0.",
        "He et al. 2018, arXiv 1812.01187, section 3.1 (no bias decay)",
    ),
    Rule(
        few_values,
        f"Mean and variance of fewer than {_VALUES} values are noise: the standard deviation of n is off by "
        "1 / √(2 (n - 1)) of itself, and a single value is an error. Training sees other statistics than evaluation.",
        "Use larger batches, SyncBatchNorm over processes, bn_ext.train.freeze for a trained model, or GroupNorm.",
        f"{_WU} (ResNet-50: 23.6 % error at 32 images a GPU, 34.7 % at 2); {_JOHNSON}",
    ),
    Rule(
        never_updated,
        "Evaluation normalizes by the running statistics. Those that no batch has moved are mean 0 and variance 1, or "
        "another training's.",
        "Train in training mode with a momentum above 0, load trained statistics, or run bn_ext.train.recalibrate.",
        f"{_IOFFE}, algorithm 2",
    ),
    Rule(
        few_batches,
        "Running statistics are those of about (2 - momentum) / momentum last batches, and (1 - momentum) ^ n of what "
        "was there before n batches is left. (torch's momentum is 1 minus Keras's.) Evaluation is off by that.",
        "Take a momentum that fits, momentum=None for the average of all batches, or bn_ext.train.recalibrate after "
        "the training.",
        f"{_IOFFE}, algorithm 2; {_JOHNSON}, section 3",
    ),
    Rule(
        accumulation,
        "Each batch is normalized by its own statistics, so accumulated gradients are not those of a batch as large as "
        "all of them; running statistics move once for each.",
        "Count values per channel, momentum and learning rate by the single batch; use SyncBatchNorm or freeze the "
        "batch norms if it is too small.",
        "Hoffer et al. 2017, arXiv 1705.08741 (virtual batches); pytorch#46516",
    ),
    Rule(
        not_synchronized,
        "Under DistributedDataParallel every process normalizes by its own batch, however many there are, and the "
        "running statistics that are saved are one process's.",
        "Convert with bn_ext.SyncBatchNorm.convert_sync_batchnorm before wrapping, or use larger batches.",
        f"{_WU} (ResNet-50: 23.7 % error at 16 images a GPU, 24.8 % at 8); Peng et al. 2017, arXiv 1711.07240",
    ),
)
