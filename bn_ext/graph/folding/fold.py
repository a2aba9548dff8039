"""Batch norm folded into the convolution or linear layer before it, for evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bn_ext.graph.arguments import check_model
from bn_ext.graph.folding.copies import copied, evaluation, twin
from bn_ext.graph.folding.layers import absorbed, rest
from bn_ext.graph.folding.nodes import Nodes
from bn_ext.graph.folding.pairs import Judgement, Pair
from bn_ext.graph.folding.trace import trace
from bn_ext.graph.folding.watch import Watch, located, tensors
from bn_ext.nn.activated import BatchNormAct

Model = TypeVar("Model", bound=nn.Module | ExportedProgram)
_FOLDS = "_bn_ext_folds"
THE_MODEL = "the model"  # the path of the model itself, in words


class Fold(NamedTuple):
    """A record says what became of one batch norm."""

    batch_norm: str  # its path in the model
    into: str  # the path of the layer that holds it now; empty if it is still there
    reason: str  # why the batch norm is still there; empty if it is folded

    def __str__(self) -> str:
        return f"{self.batch_norm}: " + (f"folded into {self.into}" if self.into else f"not folded ({self.reason})")


def folds(model: nn.Module | ExportedProgram) -> list[Fold]:
    """Says what became of each batch norm of a model that :func:`bn_ext.fold` returned.

    Args:
        model: any module or exported program.

    Returns:
        One named tuple for each batch norm: ``batch_norm``, its path; ``into``, the path of the layer that holds it
        now, or an empty string; ``reason``, why it is not folded, or an empty string. The list is empty for a
        model that :func:`bn_ext.fold` did not return.

    Raises:
        TypeError: ``model`` is neither.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> [(fold.batch_norm, fold.into) for fold in bn_ext.graph.folds(bn_ext.fold(model))]
        [('2', '1'), ('0', '')]
    """
    check_model("graph.folds", model, ExportedProgram)
    return vars(model).get(_FOLDS, [])


def fold(model: Model, *args: Any, **kwargs: Any) -> Model:
    """A copy of ``model`` for evaluation, each batch norm folded into the convolution or linear layer before it.

    The copy has the class, methods and hooks of the model and shares with it all but the folded layers. Their new
    weight and bias are computed in float64 and have the dtype, device and requires_grad of the weight, and its memory
    format. In the place of a folded batch norm is what remains of it: :class:`torch.nn.Identity`, or a module that adds
    the residual and applies the activation. :func:`bn_ext.report` shows what was folded and why no more.

    With example inputs the pairs are found in a run of the model, whatever its code does, and the outputs of the folded
    model are compared with the model's. A branch that the run does not take is not seen. All runs are without
    gradients, of copies of the model and of the tensors in the inputs; a tensor in an input that is no container
    of :mod:`torch.utils._pytree` is not copied, and the model may write to it.
    Without example inputs the pairs are found by :mod:`torch.fx` in the model or, where the model cannot be traced, in
    the largest parts that can be traced. Optional arguments have their defaults then, and a part is taken to be called
    as a whole: where its parent cannot be traced, what the parent does with the modules in it is not seen. Nothing is
    compared: a model is folded wrongly if it asks whether it is traced or for ``type(x)`` of a tensor, if it asks for
    the class of a batch norm, or if it asks whether a layer has a bias. Give inputs to a model that does.

    Where only the rank of the input tells what is normalized (by ``BatchNorm1d`` after ``Linear``: the features of
    (N, C), the positions of (N, L, C)), the folded model asserts that it is the one for which folding is right.

    Args:
        model: a module in evaluation mode, or an exported program, as torch.export returns it. It is not changed.
        args, kwargs: example inputs, if any; positional ones may also be given as one tuple.

    Returns:
        The folded copy, of the class of ``model``.

    Raises:
        ValueError: a model or a batch norm in training mode, or a module that is not initialized.
        TypeError: ``model`` is neither a module nor an exported program, or has an attribute that cannot be copied.
        AssertionError: outputs that are off by more than rounding explains.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = bn_ext.fold(model, torch.randn(2, 3, 8, 8))
        >>> type(folded[1])
        <class 'torch.nn.modules.linear.Identity'>
    """
    check_model("fold", model, ExportedProgram)
    if len(args) == 1 and type(args[0]) is tuple and not kwargs:
        (args,) = args
    if isinstance(model, ExportedProgram):
        return _fold_program(model, args, kwargs)  # type: ignore[return-value]
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in tensors(module)):
            raise ValueError(f"fold: {name or 'the model'} is not initialized, call the model first")
        if module.training and (module is model or isinstance(module, (_BatchNorm, BatchNormAct))):
            instead = " or fold the program that it was made of" if isinstance(model, GraphModule) else ""
            raise ValueError(f"fold: {name or 'the model'} is in training mode, call model.eval() first{instead}")
    folded = twin(model)
    found: list[Fold] = []
    expected = _outputs(model, args, kwargs) if args or kwargs else None
    while True:  # a batch norm may follow another that is folded
        watch = Watch(twin(folded, own=True))
        if args or kwargs:
            with evaluation():
                watch.run(*copied(args), **copied(kwargs))
        else:
            trace(watch)
        pairs, reasons = Judgement(watch).pairs()
        new = [_fold_pair(folded, watch, pair) for pair in pairs]
        if not any(one.into for one in new):
            break
        found += [one for one in new if one.into]
    if args or kwargs:
        _check(_outputs(folded, args, kwargs, "the folded model"), expected)
    vars(folded)[_FOLDS] = found + new + [Fold(name, "", reason) for name, reason in reasons.items()]
    return folded  # type: ignore[return-value]


def _fold_pair(folded: nn.Module, watch: Watch, pair: Pair) -> Fold:
    """Folds in ``folded`` a pair that was seen in a copy of it."""
    path, into = watch.paths[pair.batch_norm], watch.paths[pair.owner]
    layer, norm = folded.get_submodule(into), folded.get_submodule(path)
    parameters = absorbed(pair.layer, pair.affine)
    if parameters is None:
        return Fold(path, "", "the folded parameters would not be finite")
    for module, watched in ((layer, pair.owner), (norm, pair.batch_norm)):
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if any(not tensor.equal(getattr(watched, name)) for name, tensor in own.items()):
            return Fold(path, "", f"the model writes to the tensors of {into} or {path}")
    layer._parameters.update(zip(pair.names, parameters, strict=True))
    remains = rest(norm, pair.layer, pair.plain, f"{into} holds {path}, folded").eval()
    # The object stays the same, so that references to it stay valid.
    norm.__class__ = type(remains)
    vars(norm).clear()
    vars(norm).update(vars(remains))
    return Fold(path, into or THE_MODEL, "")


def _fold_program(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    nodes = Nodes(program)
    found = [Fold(*names) for names in nodes.fold()]
    folded = nodes.program()
    if args or kwargs:
        expected = _outputs(program.module(), args, kwargs)
        _check(_outputs(folded.module(), args, kwargs, "the folded model"), expected)
    vars(folded)[_FOLDS] = found
    return folded


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str = "the model") -> Any:
    with evaluation(), located(what):
        return twin(model, own=True)(*copied(args), **copied(kwargs))


def _check(outputs: Any, expected: Any) -> None:
    """Compares outputs: kinds; floating-point values to half the digits of their type, relative to the largest."""
    (actual, form), (wanted, wanted_form) = (pytree.tree_flatten(each) for each in (outputs, expected))
    if form != wanted_form:
        raise AssertionError(f"fold: the folded model returns {form}, the model {wanted_form}")
    for i, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        if _kind(one) != _kind(other):
            raise AssertionError(f"fold: output {i} differs: {_kind(one)} instead of {_kind(other)}")
        if isinstance(other, Tensor) and (other.is_floating_point() or other.is_complex()) and other.numel():
            tolerance = torch.finfo(other.dtype).eps ** 0.5 * other.nan_to_num(0, 0, 0).abs().max().item()
            torch.testing.assert_close(
                one, other, rtol=0, atol=tolerance, equal_nan=True, msg=f"fold: output {i} differs: {{}}".format
            )


def _kind(output: Any) -> str:
    is_tensor = isinstance(output, Tensor)
    return f"{output.dtype} of {tuple(output.shape)} on {output.device}" if is_tensor else type(output).__name__
