"""The check of arguments that the functions for whole models share."""

from __future__ import annotations

from torch import nn


def check_model(function: str, model: object, *others: type) -> None:
    """Raises TypeError, which names what was got, unless ``model`` is a module or of one of the ``others``."""
    if not isinstance(model, (nn.Module, *others)):
        kinds = " or ".join(["torch.nn.Module", *(other.__name__ for other in others)])
        got = f"the class {model.__name__}" if isinstance(model, type) else f"an object of {type(model).__name__}"
        raise TypeError(f"bn_ext.{function}: model should be a {kinds}, got {got}")
