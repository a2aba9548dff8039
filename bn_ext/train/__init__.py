"""A training loop finds here, besides the modules, what changes how a step is taken."""

from bn_ext.train.checkpoint import checkpoint_contexts
from bn_ext.train.recompute import keep_outputs, recompute_outputs

__all__ = ["checkpoint_contexts", "keep_outputs", "recompute_outputs"]
