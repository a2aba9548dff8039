"""Whole models: classes converted, graphs rewritten."""
