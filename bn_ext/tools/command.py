"""The command line: ``python -m bn_ext``, ``python -m bn_ext compare``, ``python -m bn_ext bench``."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bn_ext import activation as activations
from bn_ext.tools import info
from bn_ext.tools.bench import Pattern, bench
from bn_ext.tools.compare import compare
from bn_ext.tools.machine import CHANNELS_LAST

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_AUTOCAST = ("bfloat16", "float16")
_MODEL = (
    "torchvision.models:resnet50, or with arguments, \"timm:create_model('resnet50')\"; "
    "the folder that you are in is searched too"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where results are wrong, 2 where the arguments are."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_ext", description="Without a command: what is built, what runs, and a self-check."
    )
    commands = parser.add_subparsers(dest="command", metavar="{compare,bench}")
    _add_compare(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        return info.main()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return options.run(options)
    except _UsageError as error:
        print(f"{parser.prog} {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _UsageError(Exception):
    """The arguments of the command are wrong."""


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="is a model faster with our batch norms?",
        description="Runs a model as it is, converted and fused, in turn: time, memory, error, and what is possible.",
    )
    parser.add_argument("model", metavar="package.module:callable", help=_MODEL)
    parser.add_argument("inputs", metavar="SHAPE", nargs="+", type=_shape, help="of each input, as in 8x3x224x224")
    parser.add_argument("--eval", action="store_true", help="inference in place of a training step")
    parser.add_argument("--autocast", choices=_AUTOCAST, metavar="DTYPE", help=" or ".join(_AUTOCAST))
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    _add_common(parser, "of model and inputs", seconds=10.0)
    parser.set_defaults(run=_compare)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="one shape, against torch's functions and a plain copy",
        description="Times batch norm, and what follows it in the same call, for one shape.",
    )
    parser.add_argument("shape", metavar="SHAPE", type=_shape, help="of the input, as in 8x48x64x64: any rank from 2")
    names = [name for name in activations.NAMES if name != "identity"]
    parser.add_argument("--activation", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--residual", action="store_true", help="with a residual added before the activation")
    _add_common(parser, "of input and residual", seconds=1.0)
    parser.set_defaults(run=_bench)


def _add_common(parser: argparse.ArgumentParser, what: str, seconds: float) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=f"{what}: float32 unless given"
    )
    parser.add_argument("--channels-last", action="store_true", help=f"layout {what}")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu unless given")
    parser.add_argument("--threads", type=_threads, metavar="N", help="torch's choice unless given")
    parser.add_argument("--seconds", type=float, default=seconds, help="of measurement, at the least (%(default)s)")


def _threads(text: str) -> int:
    most = os.cpu_count() or 1
    if text not in map(str, range(1, most + 1)):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {most}, the processors here, got {text}")
    return int(text)


def _device(text: str) -> str:
    """One that holds values: neither one that is not here nor meta."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"cannot compute on {text}: {reason}") from None
    return text


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes as in 8x3x224x224, got {text}") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected positive sizes, got {text}")
    return sizes


def _bench(options: argparse.Namespace) -> int:
    pattern = Pattern(options.activation, options.residual)
    try:
        table = bench(
            options.shape, pattern, DTYPES[options.dtype], options.channels_last, options.device, options.seconds
        )
    except ValueError as error:
        raise _UsageError(error) from error
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    print(table)
    return 0


def _compare(options: argparse.Namespace) -> int:
    dtype = DTYPES[options.dtype]
    model = _made(options.model).to(options.device, dtype)
    inputs = [torch.randn(shape, device=options.device, dtype=dtype) for shape in options.inputs]
    if options.channels_last:
        if not any(len(shape) in CHANNELS_LAST for shape in options.inputs):
            raise _UsageError("channels last has four or five dimensions, and no input has")
        format = next(CHANNELS_LAST[len(shape)] for shape in options.inputs if len(shape) in CHANNELS_LAST)
        model = model.to(memory_format=format)  # type: ignore[call-overload]
        inputs = [x.to(memory_format=CHANNELS_LAST[x.dim()]) if x.dim() in CHANNELS_LAST else x for x in inputs]
    with torch.no_grad():  # once before, to tell what the model cannot do from what we cannot
        _user_code(options.model, model.train(not options.eval), *inputs)
    found = compare(
        model,
        *inputs,
        training=not options.eval,
        autocast=DTYPES[options.autocast] if options.autocast else None,
        compile=options.compile,
        seconds=options.seconds,
    )
    print(found)
    return int(found.failed)


def _made(text: str) -> nn.Module:
    """The model that ``package.module:callable`` gives, called without arguments unless some are written out."""
    path, _, expression = text.partition(":")
    if not all(map(str.isidentifier, path.split("."))):
        raise _spelling(text)
    function, args, kwargs = _call(text, expression)
    found = _user_code(text, importlib.import_module, path)
    for name in function:
        if not hasattr(found, name):
            raise _UsageError(f"{path} has no {'.'.join(function)}")
        found = getattr(found, name)
    model = found if isinstance(found, nn.Module) else _user_code(text, found, *args, **kwargs)
    if not isinstance(model, nn.Module):
        raise _UsageError(f"{text} gives an object of {type(model).__name__}, expected a torch.nn.Module")
    return model


def _user_code(text: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what ``function`` returns. Whatever it raises is a fault of the argument ``text``."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise _UsageError(f"{text} raises {type(error).__name__}: {error}") from error


def _spelling(text: str) -> _UsageError:
    return _UsageError(f"expected package.module:callable, got {text}")


def _call(text: str, expression: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """The dotted name that is called, and the arguments written out behind it."""
    try:
        node = ast.parse(expression, mode="eval").body
        args, kwargs = [], {}
        if isinstance(node, ast.Call):
            args = [ast.literal_eval(arg) for arg in node.args]
            kwargs = {_name(keyword): ast.literal_eval(keyword.value) for keyword in node.keywords}
            node = node.func
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError(expression)
    except (SyntaxError, TypeError, ValueError):
        raise _spelling(text) from None
    return [node.id, *names], args, kwargs


def _name(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("a mapping behind ** has no name")
    return keyword.arg
