"""Whole models: one rewriting of the graphs that Dynamo captures, and the ways to it."""

from bn_ext.graph.installed import fusions, unfuse

__all__ = ["fusions", "unfuse"]
