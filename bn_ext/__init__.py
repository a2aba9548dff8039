"""Batch normalization for PyTorch as fused kernels: ``bn_ext.BatchNorm2d`` drops in for ``torch.nn.BatchNorm2d``.

A tour; the docstring of each name has its arguments, shapes and errors::

    model = bn_ext.convert(model)              # torch's and timm's batch norms become ours, in place; revert undoes it
    model = bn_ext.fuse(model)                 # batch norm, addition and activation become one call, in training too
    folded = bn_ext.fold(model.eval(), x)      # a copy for inference: batch norms go into the layers before them
    print(bn_ext.report(model))                # what runs on our kernels, what is fused, what is not and why
    print(bn_ext.compare(model, x))            # whether the model is faster, by how much, and at what error

    bn = bn_ext.BatchNorm2d(64)                # or by hand: torch's constructor and state_dict
    y = bn(x, residual, activation="relu")     # relu(bn(x) + residual) in one pass
    act = bn_ext.BatchNormAct2d(64, activation="silu")         # the two as one module, for nn.Sequential
    model = bn_ext.SyncBatchNorm.convert_sync_batchnorm(model) # statistics over the processes that train it
    y = bn_ext.functional.batch_norm(x, mean, var, training=True)  # the function behind the modules

    bn_ext.train.freeze(model)                 # and keep_statistics, skip_nonfinite, recalibrate, adapt, ...

In a shell, ``python -m bn_ext`` says what is built and what runs, and checks results against float64.
"""

from bn_ext import activation, cuda, data, functional, stages, train
from bn_ext._fallback import set_warn_fallback
from bn_ext.functional import plan
from bn_ext.graph.conversion.convert import convert, revert
from bn_ext.graph.folding.fold import fold
from bn_ext.graph.fusion.fuse import fuse
from bn_ext.graph.report import report
from bn_ext.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNorm,
)
from bn_ext.tools.compare import compare
from bn_ext.train import checkpoint_contexts

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "SyncBatchNorm",
    "activation",
    "checkpoint_contexts",
    "compare",
    "convert",
    "cuda",
    "data",
    "fold",
    "functional",
    "fuse",
    "plan",
    "report",
    "revert",
    "set_warn_fallback",
    "stages",
    "train",
]
__version__ = "0.2.0"
