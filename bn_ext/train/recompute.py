"""Outputs of batch norms made again in the backward instead of kept for it."""

from __future__ import annotations

from functools import partial
from typing import TypeVar
from weakref import ref

from torch import nn

from bn_ext.graph.arguments import check_model
from bn_ext.graph.fusion.installed import surround
from bn_ext.train.recording import recording

Model = TypeVar("Model", bound=nn.Module)


def recompute_outputs(model: Model, /, chains: bool = True) -> Model:
    """Makes outputs of batch norms again in the backward of ``model(...)``, which keeps about half the memory.

    A convolution saves its input, the output of the batch norm before it, which saves its own input too. This output is
    made again from that input by one element-wise pass, with the statistics of the forward: the same bits, so that
    gradients are the same bits. Each is made once a backward, and freed when the last that saved it has read it.
    In a fused model, results of ``cat``, ``add``, ``mul``, max pooling and ``interpolate`` that read such outputs are
    made again too, and so are autocast's copies of parameters in half precision. Nothing is kept that was not kept
    before, but for operands of these, up to half a result's bytes.

    Works on models of :func:`bn_ext.fuse` and :func:`bn_ext.convert`, before or after these. (In a converted model only
    outputs that a layer reads as they are or after a ReLU: another activation makes another tensor of them.) Only
    ``model(...)`` is changed: a method, or a part that is called by itself, keeps its outputs, as do copies, pickles
    and exported programs. Calls without gradients, and under transforms of torch.func, are as before.
    :func:`keep_outputs` undoes it.

    Limits:
        - An input, residual, weight, bias or parameter that is written to between the forward and the backward is an
          error that names it. A write by ``.data`` is not seen.
        - Hooks for saved tensors around the call get all tensors but those that are made again; what hooks inside the
          model save stays theirs.
        - torch.func.grad inside the forward is an error of torch's: it takes no hooks for saved tensors.
        - A partitioner cuts what AOTAutograd or Inductor compiles. ``backend="bn_ext_inductor"`` tells it to make
          outputs again, with or without this call.
        - In a CUDA graph the kernels that make outputs again are captured with the backward. Replays see no writes
          between forward and backward, as in any CUDA graph.
        - :class:`torch.nn.DataParallel` cannot replicate the model: use
          :class:`~torch.nn.parallel.DistributedDataParallel`.

    Args:
        model: any module with batch norms of ours.
        chains: whether a result may be made of another one that is made again, such as a block's output of the output
            of the block before, in chains of up to eight. Without them less is held in the backward, more before it.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or ``chains`` no bool.

    Example:
        >>> model = bn_ext.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        >>> model = bn_ext.train.recompute_outputs(model)
        >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
    """
    check_model("train.recompute_outputs", model)
    if not isinstance(chains, bool):
        kind = type(chains).__name__
        raise TypeError(f"bn_ext.train.recompute_outputs: chains should be True or False, got an object of {kind}")
    surround(model, partial(recording, ref(model), chains))
    return model


def keep_outputs(model: Model, /) -> Model:
    """Undoes :func:`recompute_outputs` in ``model`` and in its parts.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = bn_ext.train.recompute_outputs(bn_ext.convert(nn.Sequential(nn.BatchNorm2d(8))))
        >>> model = bn_ext.train.keep_outputs(model)
    """
    check_model("train.keep_outputs", model)
    for module in model.modules():
        surround(module, None)
    return model
