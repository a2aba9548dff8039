"""What a training loop needs besides the modules: contexts for activation checkpointing."""

from bn_ext.train.checkpoint import checkpoint_contexts

__all__ = ["checkpoint_contexts"]
