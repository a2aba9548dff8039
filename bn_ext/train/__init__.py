"""A training loop finds here, besides the modules, the contexts for activation checkpointing."""

from bn_ext.train.checkpoint import checkpoint_contexts

__all__ = ["checkpoint_contexts"]
