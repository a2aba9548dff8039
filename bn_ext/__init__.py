"""Batch normalization for PyTorch as fused kernels: ``bn_ext.BatchNorm2d`` drops in for ``torch.nn.BatchNorm2d``."""

from bn_ext import activation, functional
from bn_ext.checkpoint import checkpoint_contexts
from bn_ext.graph.conversion.convert import convert, revert
from bn_ext.graph.folding.fold import fold
from bn_ext.graph.fusion.fuse import fuse
from bn_ext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from bn_ext.tools.compare import compare

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "activation",
    "checkpoint_contexts",
    "compare",
    "convert",
    "fold",
    "functional",
    "fuse",
    "revert",
]
__version__ = "0.2.0"
