"""The commands of ``python -m bn_ext``."""
