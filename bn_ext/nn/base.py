"""The bases of all modules: one operator call in the place of torch's forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bn_ext import activation as activations
from bn_ext._fallback import fell_back
from bn_ext.functional import EXPORTED, as_tensor, check, exporting, finished, masked, not_exportable, operator
from bn_ext.nn.adapted import Mixture
from bn_ext.nn.composed import Rule, check_input, check_operands, composed, move_statistics
from bn_ext.stages import Chain, Moments

# The attributes that a module has while it is frozen by bn_ext.train.freeze. All but the first are for the time after.
FREEZING = ("frozen", "_thawed_training", "_thawed_parameters")


class Ours(torch.nn.Module):
    """A module of ours, or one that will become ours: its repr says so."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "bn_ext")))


class FusedForward(Ours, _NormBase):
    """Statistics, normalization, residual, activation, running statistics and batch counter in one operator call."""

    __constants__ = [*_NormBase.__constants__, "frozen", "masks", "running_share"]  # noqa: RUF012
    # Modules that bn_ext.train.freeze and bn_ext.train.adapt changed have attributes of their own.
    frozen: bool = False
    mixes: ClassVar[bool] = True  # whether bn_ext.train.adapt may change it
    masks: bool = True  # whether a call takes a mask
    running_share: float = 1.0  # of the running statistics in evaluation; the rest of 1 is the batch's

    def train(self, mode: bool = True) -> Any:
        """Sets the mode. A frozen module stays in evaluation, and notes the mode for when it is unfrozen."""
        if not self.frozen:
            return super().train(mode)
        super().train(False)
        self._thawed_training = mode
        return self

    def reset_running_stats(self) -> None:
        """Leaves the statistics of a frozen module as they are: nothing would fill them again."""
        if not self.frozen:
            super().reset_running_stats()

    def extra_repr(self) -> str:
        return super().extra_repr() + self._changed()

    def _changed(self) -> str:
        """Says in a repr what was changed by a helper of training."""
        share = "" if self.running_share == 1 else f", running_share={self.running_share}"
        return ", frozen" * self.frozen + share

    def _rule(self, input: Tensor, mask: Tensor | None) -> Rule | None:
        """Returns the rule by which stages make up this call, or None where one operator answers it.

        A rule that has no mask does not take the call's.
        """
        if self.running_share == 1 or self.training or self.running_mean is None or self.running_var is None:
            return None
        return Mixture(self.running_mean, self.running_var, self.running_share, self.eps)

    def _composed(self, input: Tensor, rule: Rule, chain: Chain) -> Tensor:
        self._check_input_dim(input)
        check_input(input, self.num_features)
        statistics = {"running_mean": self.running_mean, "running_var": self.running_var}
        check_operands(input, chain.residual, weight=self.weight, bias=self.bias, **statistics)
        output, moments = composed(input, self.weight, self.bias, rule, self.eps, chain, self)
        tracks = self.training and self.track_running_stats
        if moments is not None and tracks and self.running_mean is not None:
            self._move(moments, self.running_mean)
        return output

    def _move(self, moments: Moments, running_mean: Tensor) -> None:
        """Moves the running statistics towards the moments of a call."""
        move_statistics(moments, running_mean, self.running_var, self.num_batches_tracked, self.momentum)

    def _for_training(self, input: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None]:
        """Weight and bias of a call in training, and the images of a statistic set."""
        return self.weight, self.bias, None

    def _check_exportable(self) -> None:
        """Raises where torch's batch norm, which an exported graph holds, would compute something else."""

    def _traced(self, input: Any, **options: Any) -> Any:
        """Records a call of this module in a torch.fx graph. torch.fx by itself does so for torch.nn's modules only."""
        given = {name: value for name, value in options.items() if value is not None}
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), given)

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: activations.Name | None,
        activation_param: float | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if mask is not None and not self.masks:
            raise TypeError("this batch norm takes no mask")
        if not is_scripting():
            check(input, activation, activation_param)
            residual = as_tensor(residual, input)
            rule = self._rule(input, mask)
            if mask is not None and rule is not None and rule.mask is None:
                raise TypeError(f"{type(self).__name__}{self._changed()} takes no mask")
            if rule is not None:
                return self._composed(input, rule, Chain(residual, activation, activation_param))
            if exporting():
                self._check_exportable()
                if mask is not None and ((self.training and not self.frozen) or self.running_mean is None):
                    raise not_exportable("a batch norm with a mask", "call eval() first")
                fell_back(input, EXPORTED)
                output = _BatchNorm.forward(self, masked(input, mask))  # type: ignore[arg-type]
                return finished(output, residual, activation, activation_param, mask)
        self._check_input_dim(input)
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        running_mean, running_var = self.running_mean, self.running_var
        set_size: int | None = None
        num_batches_tracked: Tensor | None = None
        momentum: float | None = self.momentum
        if not self.training or self.frozen:
            training = running_mean is None and running_var is None
            if self.running_share != 1.0 and not training:
                raise RuntimeError("TorchScript has no form of a batch norm that bn_ext.train.adapt adapted")
        else:
            training = True
            weight, bias, set_size = self._for_training(input, mask)
            if self.track_running_stats:
                num_batches_tracked = self.num_batches_tracked
            else:
                running_mean = running_var = None
        if num_batches_tracked is None and momentum is None:
            momentum = 0.0
        return operator(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            self.eps,
            residual,
            activation,
            activation_param,
            set_size,
            mask,
        )
