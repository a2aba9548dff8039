"""Whole models: classes converted, graphs that the compiler captures rewritten, batch norms folded away."""

from bn_ext.graph.folding.fold import folds
from bn_ext.graph.fusion.installed import fusions, unfuse

__all__ = ["folds", "fusions", "unfuse"]
