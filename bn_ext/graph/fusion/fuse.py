"""Makes batch norm, the addition after it and the activation after that one call, throughout a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from torch import nn

from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion.convert import make_ours
from bn_ext.graph.fusion.installed import is_compiled, uninstall

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, /, *args: Any, modes: Collection[str] = ("train", "eval"), **kwargs: Any) -> Model:
    """Makes ``activation(batch_norm(input) + residual)``, both optional, one call wherever ``model(...)`` does so.

    Batch norms become ours first (:func:`bn_ext.convert`). Then each call of ``model`` is captured as torch.compile
    captures it, rewritten, and run without a compiler: once for each way that its Python code takes, kept for later
    calls that take the same. Every spelling counts: modules, functions, methods, operators, in place or not,
    ``F.batch_norm`` of any class. What cannot be captured runs as it is, and what is around it is fused still.

    The model stays the object that it is, with its class, methods, hooks and ``state_dict``. Only ``model(...)`` is
    fused: a method, or a part that is called by itself, runs as it is, as do copies, pickles and exported programs.
    :func:`bn_ext.report` shows what was fused and why no more; :func:`bn_ext.revert` undoes it. To compile a fused
    model too, use ``torch.compile(model, backend="bn_ext_inductor")``: other backends refuse it.

    Limits:
        - After 64 calls that had to be captured, such as with a number that is another at each call, the model runs as
          it is, with one warning. It also does while a hook of all modules is registered.
        - The backward of an activation reads the bias of its batch norm: a bias that is written to between a forward
          and its backward is an error, or makes gradients wrong unseen if it is written to by ``.data``.
        - A model with checkpointed regions gives no second derivatives.
        - While a fused model runs, Dynamo's errors in functions that its parts compile by themselves are suppressed.
          Parts that were compiled by themselves before become parts of its graphs.
        - torch.jit.script takes the model after :func:`bn_ext.revert`.
        - :class:`torch.nn.DataParallel` cannot replicate it: use :class:`~torch.nn.parallel.DistributedDataParallel`.

    Args:
        model: any module.
        args, kwargs: inputs, if given: the model is captured and checked with them now, not at its first call.
            Parameters, buffers, random and training state stay as they are; other attributes that the forward changes
            are changed by several calls.
        modes: "train" and "eval", those in which to check; in the first gradients are recorded, in the second not.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: other modes.
        AssertionError: with these inputs the outputs are not those of the plain model, up to rounding. The message
            names the batch norm. Tensors in tuples, lists, dicts and registered pytrees are compared, others are not.
            After this or any other error with these inputs the model is left unfused.
        RuntimeError: ``model.compile()`` was called before.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = bn_ext.fuse(model, torch.randn(2, 3, 8, 8))
        >>> bn_ext.graph.fusions(model)[0].fused
        ('relu',)
    """
    check_model("fuse", model)
    if not isinstance(modes, Collection) or isinstance(modes, str) or any(m not in ("train", "eval") for m in modes):
        raise ValueError(f"bn_ext.fuse: modes should be a sequence of 'train' and 'eval', got {modes!r}")
    if is_compiled(model):
        raise RuntimeError(
            "bn_ext.fuse: the model is compiled in place already, which fusing would undo; compile it after fusing, "
            "by model.compile(backend='bn_ext_inductor')"
        )
    from bn_ext.graph.fusion.check import check
    from bn_ext.graph.fusion.fused import install

    make_ours(model)  # the batch norms that it leaves are captured by the functions that they call
    install(model)
    if args or kwargs:
        try:
            check(model, modes, args, kwargs)
        except BaseException:
            uninstall(model)
            raise
    return model
