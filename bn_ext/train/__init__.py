"""Helpers for training: statistics kept, frozen, recalibrated, merged; less memory; a diagnosis."""

from bn_ext.train.adapt import adapt
from bn_ext.train.checkpoint import checkpoint_contexts
from bn_ext.train.diagnose import diagnose
from bn_ext.train.freeze import freeze, unfreeze
from bn_ext.train.keep import keep_statistics
from bn_ext.train.merge import averaging, merge_state_dicts
from bn_ext.train.nonfinite import skip_nonfinite
from bn_ext.train.recalibrate import recalibrate
from bn_ext.train.recompute import keep_outputs, recompute_outputs

__all__ = [
    "adapt",
    "averaging",
    "checkpoint_contexts",
    "diagnose",
    "freeze",
    "keep_outputs",
    "keep_statistics",
    "merge_state_dicts",
    "recalibrate",
    "recompute_outputs",
    "skip_nonfinite",
    "unfreeze",
]
