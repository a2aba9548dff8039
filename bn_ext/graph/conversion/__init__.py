"""Batch norm classes of torch and its ecosystem become ours, and theirs again."""
