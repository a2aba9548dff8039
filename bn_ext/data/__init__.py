"""Mini-batches whose composition suits batch statistics."""

from bn_ext.data.stratified import StratifiedBatchSampler

__all__ = ["StratifiedBatchSampler"]
