"""Batch norm with statistics for each of several domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.jit import is_tracing
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from bn_ext import activation as activations
from bn_ext.functional import as_tensor, check, exporting, operator
from bn_ext.nn.base import FREEZING, FusedForward
from bn_ext.nn.composed import Rule, check_training, transformed
from bn_ext.stages import Chain, Moments, Statistics, Sums


@dataclass(frozen=True)
class OfBatch(Rule):
    """The samples of a domain share statistics, a set each. Sums over a domain have a fixed order."""

    domain: Tensor  # of each sample
    num_domains: int
    affine_per_domain: bool
    eps: float
    set_size = 1

    def _sum(self, rows: Tensor) -> Tensor:
        """Over the samples of each domain, (N, ...) to (D, ...): NaN in one domain stays there."""
        members = self.domain.view(-1, *[1] * (rows.dim() - 1))
        return torch.stack([torch.where(members == d, rows, 0).sum(0) for d in range(self.num_domains)])

    def _rows(self, of_domains: Tensor) -> Tensor:
        return of_domains.index_select(0, self.domain)

    def merged(self, moments: Moments) -> Moments:
        values = moments.counts.unsqueeze(1)
        counts = self._sum(moments.counts)
        mean = self._sum(moments.mean * values) / counts.clamp(min=1).unsqueeze(1)
        between = (moments.mean - self._rows(mean)).square() * values
        return Moments(counts, mean, self._sum(moments.m2 + between))

    def statistics(self, merged: Moments) -> Statistics:
        return Statistics(*map(self._rows, merged.each(self.eps)))

    def of_sets(self, parameter: Tensor | None) -> Tensor | None:
        return self._rows(parameter) if self.affine_per_domain and parameter is not None else parameter

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        return Sums(*(self._rows(self._sum(part)) for part in sums)), weight

    def gradients(self, sums: Sums, statistics: Statistics) -> tuple[Tensor, Tensor]:
        if not self.affine_per_domain:
            return sums.gradients(statistics)
        return self._sum(sums.dz_xmu * statistics.invstd), self._sum(sums.dz)

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        samples = self._sum(x.new_ones(x.size(0))).clamp(min=1).unsqueeze(1)

        def mean(t: Tensor) -> Tensor:
            return self._rows(self._sum(t.mean(2)) / samples).unsqueeze(2)

        centre = mean(x)
        return centre, mean((x - centre).square())


@dataclass(frozen=True)
class Running(OfBatch):
    """The running statistics of each sample's domain, through which no gradient goes."""

    running_mean: Tensor
    running_var: Tensor
    reduces = False

    def given(self) -> Moments:
        # Moments of one value have the variance as their sum of squares.
        mean, var = self.running_mean.double(), self.running_var.double()
        return Moments(mean.new_ones(mean.size(0)), mean, var)

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        return Sums(*map(torch.zeros_like, sums)), weight

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self._rows(self.running_mean), self._rows(self.running_var)
        return mean.to(x.dtype).unsqueeze(2), var.to(x.dtype).unsqueeze(2)


def _check_number(num_domains: Any) -> None:
    if type(num_domains) is not int:
        raise TypeError(f"num_domains should be an int, got {type(num_domains).__name__}")
    if num_domains < 1:
        raise ValueError(f"num_domains should be positive, got {num_domains}")


def _batch_norms(given: Any) -> list[Any]:
    """A batch norm alone, and behind a split one those of the other splits."""
    name = type(given).__name__
    if not isinstance(given, _BatchNorm):
        raise TypeError(f"from_batch_norm: expected a batch norm of torch, got {name}")
    for part in ("drop", "act"):
        behind = getattr(given, part, None)
        if behind is not None and type(behind) is not nn.Identity:
            what = f"{name} with {type(behind).__name__} behind it, as its {part}"
            instead = "replace that by torch.nn.Identity() and call it, or give activation= in the call"
            raise ValueError(f"from_batch_norm: expected a batch norm alone, got {what}: {instead}")
    if any(map(is_lazy, given.state_dict(keep_vars=True).values())):
        raise ValueError(f"from_batch_norm: {name} is not initialized: call it once")
    return [given, *getattr(given, "aux_bn", ())]


def _freezing(batch_norms: list[Any]) -> dict[str, Any]:
    """The attributes that bn_ext.train.freeze set on these batch norms, which have to be the same on all of them."""
    if any(getattr(one, "running_share", 1) != 1 for one in batch_norms):
        raise ValueError("from_batch_norm: domains take no bn_ext.train.adapt: undo it by adapt(batch_norm, 1)")
    found = [{name: vars(one)[name] for name in FREEZING if name in vars(one)} for one in batch_norms]
    if any(one != found[0] for one in found):
        raise ValueError("from_batch_norm: some of the splits are frozen, some not: bn_ext.train.unfreeze(batch_norm)")
    return found[0]


class DomainBatchNorm(FusedForward):
    """The base of the three classes of batch norm with domains."""

    mixes = False

    def __init__(self, num_features: int, num_domains: int, affine_per_domain: bool = False, **options: Any) -> None:
        _check_number(num_domains)
        if type(affine_per_domain) is not bool:
            given = type(affine_per_domain).__name__
            raise TypeError(f"affine_per_domain should be a bool, got {given}: give other options by name")
        super().__init__(num_features, **options)
        self.num_domains = num_domains
        self.affine_per_domain = affine_per_domain
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.expand(num_domains, *buffer.shape).clone()
        for name, parameter in self._parameters.items() if affine_per_domain else ():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(parameter.detach().expand(num_domains, -1).clone())

    @classmethod
    def from_batch_norm(
        cls, batch_norm: nn.Module, num_domains: int | None = None, affine_per_domain: bool = False
    ) -> Any:
        """Makes one whose domains all begin with the parameters and statistics of a plain batch norm, which are copied.

        timm's ``SplitBatchNorm2d``, which has a batch norm for each split of a batch, gives its batch norms to the
        domains, the main one to domain 0, and parameters of their own. What is made of a frozen one is frozen.

        Args:
            batch_norm: a batch norm of torch or a subclass.
            num_domains: required, but of a split one.
            affine_per_domain: whether each domain gets a copy of weight and bias.

        Raises:
            TypeError: a module of another class; no ``num_domains``, or one that is no int.
            ValueError: a ``num_domains`` below 1, or another than there are batch norms in a split one; a batch norm
                with an activation or a dropout of its own, as timm's may be; an adapted one, a partly frozen one, or
                one that is not initialized.
        """
        if num_domains is not None:
            _check_number(num_domains)
        sources = _batch_norms(batch_norm)
        plain = sources[0]
        freezing = _freezing(sources)
        if len(sources) > 1:
            if num_domains not in (None, len(sources)):
                raise ValueError(f"from_batch_norm: {num_domains} domains for a batch norm of {len(sources)} splits")
            affine_per_domain = True
        else:
            if num_domains is None:
                raise TypeError("from_batch_norm: give the number of domains, num_domains")
            sources *= num_domains
        made = cls(
            plain.num_features,
            len(sources),
            affine_per_domain,
            eps=plain.eps,
            momentum=plain.momentum,
            affine=plain.affine,
            track_running_stats=plain.track_running_stats,
        )
        for name, buffer in plain._buffers.items():
            made._buffers[name] = None if buffer is None else torch.stack([one._buffers[name] for one in sources])
        for name in made._parameters:
            parameters = [getattr(one, name) for one in sources]
            if parameters[0] is not None:
                copied = torch.stack(parameters) if affine_per_domain else parameters[0].clone()
                made._parameters[name] = nn.Parameter(copied.detach(), parameters[0].requires_grad)
            else:
                made._parameters[name] = None
        made.train(plain.training)
        vars(made).update(freezing)
        return made

    def extra_repr(self) -> str:
        own = f"num_domains={self.num_domains}, affine_per_domain={self.affine_per_domain}"
        return f"{_NormBase.extra_repr(self)}, {own}, bn_ext{self._changed()}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(f"TorchScript has no form of {type(self).__name__}: use torch.compile or torch.export")

    def forward(
        self,
        input: Tensor,
        domain: int | Tensor,
        residual: Tensor | None = None,
        activation: activations.Name | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        if isinstance(input, Proxy):
            rest = {"residual": residual, "activation": activation, "activation_param": activation_param}
            return self._traced(input, domain=domain, **rest)
        check(input, activation, activation_param)
        self._check_input_dim(input)
        if self.training:
            check_training(input, self.num_features, self.eps)
        chain = Chain(as_tensor(residual, input), activation, activation_param)
        if isinstance(domain, Tensor):
            return self._composed(input, self._by(self._indices(input, domain)), chain)
        # NumPy's integers are no int, but numbers; its arrays have the attribute, too.
        is_number = isinstance(domain, int) or (hasattr(domain, "__index__") and not getattr(domain, "ndim", 0))
        if isinstance(domain, bool) or not is_number:
            raise TypeError(f"domain should be an int or a tensor, got {type(domain).__name__}")
        if not isinstance(domain, int):
            domain = int(domain)
        if not 0 <= domain < self.num_domains:
            raise IndexError(f"domain should be from 0 to {self.num_domains - 1}, got {domain}")
        if exporting():  # where the operator would stay
            return self._composed(input, self._by(input.new_full((input.size(0),), domain, dtype=torch.int64)), chain)
        return self._of_one(input, domain, chain)

    def _of_one(self, input: Tensor, domain: int, chain: Chain) -> Tensor:
        """All of the batch belongs to one domain: one operator."""

        def row(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[domain]

        weight, bias = map(row, (self.weight, self.bias)) if self.affine_per_domain else (self.weight, self.bias)
        by_batch = self.training or self.running_mean is None
        reads = not self.training or self.track_running_stats
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked if by_batch else None)
        buffers = buffers if reads and self.running_mean is not None else (None, None, None)
        copies = is_compiling() and by_batch
        if copies:
            # Inductor passes the first row to an operator that writes to a row whose number is a variable.
            index = torch.full((1,), domain, device=input.device)
            mean, var, counter = (None if t is None else t.index_select(0, index).squeeze(0) for t in buffers)
        else:
            mean, var, counter = map(row, buffers)
        momentum = 0.0 if counter is None and self.momentum is None else self.momentum
        output = operator(input, weight, bias, mean, var, counter, by_batch, momentum, self.eps, *chain[:3])
        for buffer, new in zip(buffers, (mean, var, counter)) if copies else ():
            if buffer is not None and new is not None:
                buffer[domain].copy_(new)
        return output

    def _by(self, domain: Tensor) -> Rule:
        settings = domain, self.num_domains, self.affine_per_domain, self.eps
        if self.training or self.running_mean is None or self.running_var is None:
            return OfBatch(*settings)
        return Running(*settings, self.running_mean.clone(), self.running_var.clone())

    def _indices(self, input: Tensor, domain: Tensor) -> Tensor:
        """The domains of the samples. On a GPU their values are not looked at, which would make it wait."""
        if domain.is_floating_point() or domain.is_complex() or domain.dtype == torch.bool:
            raise TypeError(f"domain should be of an integer type, got {domain.dtype}")
        domain = domain.long().clone()  # the backward reads it again, whatever the caller does with it
        if domain.dim() == 0:
            domain = domain.expand(input.size(0))
        if domain.dim() != 1 or (not is_tracing() and domain.size(0) != input.size(0)):
            raise ValueError(f"domain should have one index a sample, ({input.size(0)},), got {tuple(domain.shape)}")
        if domain.device != input.device:
            raise RuntimeError(f"domain is on {domain.device} but input is on {input.device}")
        has_values = not (is_compiling() or exporting() or transformed() or isinstance(domain, FakeTensor))
        if has_values and domain.device.type == "cpu" and domain.numel() > 0:
            least, most = domain.aminmax()
            if least < 0 or most >= self.num_domains:
                wrong = int(least if least < 0 else most)
                raise IndexError(f"domain should be from 0 to {self.num_domains - 1}, got {wrong}")
        return domain


class DomainBatchNorm1d(DomainBatchNorm):
    """Batch norm with statistics for each of several domains, in one batch or in batches of their own.

    It is :class:`DomainBatchNorm2d` for other shapes.

    Args:
        num_features, num_domains, affine_per_domain, **options: as for :class:`DomainBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).
        - domain: a number, or (N,).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: as :class:`DomainBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.DomainBatchNorm1d(8, num_domains=2)
        >>> bn(torch.randn(4, 8), torch.tensor([0, 1, 1, 0])).shape
        torch.Size([4, 8])
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class DomainBatchNorm2d(DomainBatchNorm):
    """Batch norm with statistics for each of several domains, in one batch or in batches of their own.

    ``module(input, domain, residual=None, activation=None, activation_param=None)`` normalizes by the statistics of the
    domain: of all of the batch, if ``domain`` is a number, or of each sample, if it is a tensor of indices. Samples of
    a domain may stand anywhere in the batch: they are neither sorted nor copied, and a GPU is not waited for. Where a
    tensor gives a domain at most one value per channel, the output is the bias, and its running statistics and counter
    stay; a number is refused there, as by :class:`BatchNorm2d`.

    It is no subclass of torch's, which would take no domain. Running statistics are (domains, C), the counter
    (domains,); weight and bias (C,), or (domains, C). :meth:`from_batch_norm` makes one of a plain batch norm or of
    timm's ``SplitBatchNorm2d``.

    Args:
        num_features: C, the number of channels.
        num_domains: the number of domains.
        affine_per_domain: whether each domain has a weight and a bias of its own.
        options: by name: ``eps``, ``momentum``, ``affine``, ``track_running_stats``, ``device`` and ``dtype``, as for
            :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, H, W), of any strides.
        - domain: a number, or (N,).

    Raises:
        TypeError: a ``num_domains`` that is no int, an ``affine_per_domain`` that is no bool; in a call, a ``domain``
            that is neither an int nor a tensor of integers.
        ValueError: a ``num_domains`` below 1; in a call, other than one index a sample, or what :class:`BatchNorm2d`
            refuses.
        IndexError: in a call, a domain that is none. A GPU asserts that indices are in range, which ends the process.
        RuntimeError: in a call, as :class:`BatchNorm2d`; by TorchScript; a second derivative with indices, a residual
            and an activation such as relu.
        NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.DomainBatchNorm2d(8, num_domains=3)
        >>> x, domain = torch.randn(6, 8, 5, 5), torch.tensor([0, 2, 0, 2, 2, 0])
        >>> torch.allclose(bn(x, domain)[domain == 2], bn(x[domain == 2], 2), atol=1e-6)
        True
        >>> bn.num_batches_tracked
        tensor([1, 0, 2])

    Source: Xie et al. 2020, arXiv 1911.09665, with a batch norm for adversarial examples; Chang et al. 2019, arXiv
    1906.03950, for domains.
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class DomainBatchNorm3d(DomainBatchNorm):
    """Batch norm with statistics for each of several domains, in one batch or in batches of their own.

    It is :class:`DomainBatchNorm2d` for other shapes.

    Args:
        num_features, num_domains, affine_per_domain, **options: as for :class:`DomainBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.
        - domain: a number, or (N,).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: as :class:`DomainBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.DomainBatchNorm3d(8, num_domains=2, affine_per_domain=True)
        >>> bn(torch.randn(4, 8, 2, 5, 5), 1).shape, bn.weight.shape
        (torch.Size([4, 8, 2, 5, 5]), torch.Size([2, 8]))
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
