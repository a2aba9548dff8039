"""The modules: batch norms that take torch's constructor and state, batch norms with an activation, and batch norms by
other sets of values."""

from bn_ext.nn.activated import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from bn_ext.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_ext.nn.domain import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from bn_ext.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from bn_ext.nn.last import BatchNormLast
from bn_ext.nn.shared import SharedBatchNorm1d, SharedBatchNorm2d, SharedBatchNorm3d
from bn_ext.nn.sync import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormLast",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "SharedBatchNorm1d",
    "SharedBatchNorm2d",
    "SharedBatchNorm3d",
    "SyncBatchNorm",
]
