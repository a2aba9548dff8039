"""The modules: batch norms that take torch's constructor and state, and batch norms with an activation."""

from bn_ext.nn.activated import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from bn_ext.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]
